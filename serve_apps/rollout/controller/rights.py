"""What the principal that started a rollout may do now. The policies can have changed since the start."""

from __future__ import annotations

from typing import Any

from cluster.registry import Registry
from cluster.security.authorization.policy import Action, Policy
from cluster.security.tokens.principal import principal_from_json


class StarterRights:
    """Decides by the policies of this release.

    Args:
        registry: The registry of the cluster.
        policy: The policies.
        region: Region of this process.
        environment: Environment of the cluster, such as "production".
    """

    def __init__(self, registry: Registry, policy: Policy, *, region: str, environment: str) -> None:
        self._registry = registry
        self._policy = policy
        self._region = region
        self._environment = environment

    def refusal(self, starter: dict[str, Any], model: str, version: int) -> str:
        """Return why the starter may not roll out a version, or "" if the starter may.

        Raises:
            ModelNotFound: The version is not registered.
        """
        principal = principal_from_json(starter)
        target = self._registry.get(model, version).resource(region=self._region)
        decision = self._policy.decide(principal, Action.rollout, target, environment=self._environment)
        if decision.allowed:
            return ""
        return f"{principal.subject} may not roll out version {version} of '{model}' any more"
