"""Authorization decisions by Cedar policies (`cluster/policies/*.cedar`).

The policies are parsed once for each process. An action is denied if no policy permits it, or if any policy forbids it.
The edge's rules are compiled from the same policies (`Policy.roles_for`), so edge and replicas decide in the same way.
Rights of each role, within the boundaries below:

    data_engineer    writes, pushes features, applies definitions, reads public and internal columns, wraps their keys
    data_scientist   reads columns of every class, builds training sets, trains, registers and exports models, predicts
    ml_engineer      registers, exports and imports models, deploys them outside production, rolls out and back,
                     predicts, writes outcomes, compacts logs
    approver         approves and exports models, deploys, rolls out and back, in every environment
    auditor          reads the ledger
    service          predicts, writes outcomes, reads features online by key, pushes features
    admin            everything
    supervisor       restarts what the ledger records as serving (the cluster's own process)
    every role       reads metadata and public columns

Boundaries for all roles:

- The principal's tenant is the resource's tenant.
- The resource's region is this process's region or a permitted region. Metadata and the ledger may be read anywhere.
- If the token's scope names models, the model is one of them.
- If a non-public column lists purposes, the principal's purpose is one of them. A sensitive column always needs a
purpose.
- In production, no principal approves, deploys or rolls out a model that it registered itself. Every environment except
local, test and staging is production. This boundary does not apply to a rollback.

Every request is checked against the schema. Without a schema, Cedar skips a policy if an attribute is missing, and a
skipped `forbid` forbids nothing.
"""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import cedarpy

from cluster.errors import AccessDenied, ConfigError
from cluster.security.tokens.roles import Role

if TYPE_CHECKING:
    from cluster.security.tokens.principal import Principal

POLICY_FOLDER = Path(__file__).resolve().parents[2] / "policies"
SCHEMA_NAME = "schema.cedarschema"
NOT_EVALUATED = "not-evaluated"
"""Policy id in the decision if Cedar could not evaluate the request. The decision is always a denial."""
MAX_CACHED_DECISIONS = 4096


class Action(enum.StrEnum):
    """Action of a principal. The Cedar schema has the same actions."""

    predict = "predict"
    write_outcome = "write_outcome"
    read_metadata = "read_metadata"
    read_columns = "read_columns"
    read_online = "read_online"
    push_features = "push_features"
    write_features = "write_features"
    apply_definitions = "apply_definitions"
    build_training_set = "build_training_set"
    train_model = "train_model"
    register_model = "register_model"
    export_model = "export_model"
    import_model = "import_model"
    approve_model = "approve_model"
    deploy = "deploy"
    rollout = "rollout"
    rollback = "rollback"
    compact_log = "compact_log"
    schedule_runs = "schedule_runs"
    submit_jobs = "submit_jobs"
    read_jobs = "read_jobs"
    control_jobs = "control_jobs"
    restart_serving = "restart_serving"
    wrap_key = "wrap_key"
    unwrap_key = "unwrap_key"
    create_key = "create_key"
    manage_keys = "manage_keys"
    manage_cluster = "manage_cluster"
    read_ledger = "read_ledger"


EDGE_ACTIONS = (
    Action.predict,
    Action.write_outcome,
    Action.read_online,
    Action.push_features,
    Action.read_metadata,
    Action.manage_cluster,
)
"""Actions that the edge distinguishes by path."""


class KeyAttributes(Protocol):
    """Attributes of a key that the policies need; `KeyInfo` has them."""

    @property
    def name(self) -> str: ...
    @property
    def column_class(self) -> str: ...
    @property
    def purposes(self) -> tuple[str, ...]: ...
    @property
    def region(self) -> str: ...
    @property
    def tenant(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Resource:
    """Target of an action. A target with columns stands for its columns of one class."""

    kind: str
    """Kind of resource, as messages name it: "feature view", "model", "key", "ledger"."""
    name: str
    column_class: str = "public"
    purposes: tuple[str, ...] = ()
    """Permitted purposes; empty permits every purpose."""
    region: str = "local"
    tenant: str = "default"
    registered_by: str = ""
    """Subject that registered the model; required to release it in production."""
    serves: bool = False
    """Whether the ledger records that the resource serves requests now."""
    exceeds_token: bool = False
    """Whether the resource is a job with rights that the principal's token does not have."""

    @classmethod
    def from_key(cls, key: KeyAttributes) -> Resource:
        """Return the resource of a key."""
        return cls(
            kind="key",
            name=key.name,
            column_class=key.column_class,
            purposes=tuple(key.purposes),
            region=key.region,
            tenant=key.tenant,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Result of a policy evaluation."""

    allowed: bool
    policies: tuple[str, ...]
    """Ids of the deciding policies, sorted; empty if no policy permits the action."""


@dataclass(frozen=True, slots=True)
class _Subject:
    """Attributes of a principal that decisions depend on.

    Two tokens of one principal give equal subjects, so they share cached decisions.
    """

    subject: str
    role: str
    purpose: str = ""
    tenant: str = "default"
    entrypoint: str = ""
    models: tuple[str, ...] | None = None


class Policy:
    """The policies of one process, which runs in one region."""

    def __init__(self, text: str, schema: str, *, region: str, permitted_regions: Iterable[str]) -> None:
        self._parsed = _parse(text, schema)
        self._region = region
        self._permitted_regions = tuple(permitted_regions)
        self._source = (text, schema)
        self._cache: dict[tuple[_Subject, str, Resource, str], Decision] = {}

    @classmethod
    def load(
        cls, extra: str | None = None, *, region: str = "local", permitted_regions: Iterable[str] = ()
    ) -> Policy:
        """Load the project's policies, and an operator's own policies.

        Args:
            extra: Cedar text of further policies.
            region: region of this process.
            permitted_regions: other regions whose data this process may use.

        Raises:
            ConfigError: a policy cannot be parsed, does not fit the schema, or has no unique id.
        """
        files = sorted(POLICY_FOLDER.glob("*.cedar"))
        if not files:
            raise ConfigError(f"No policies in {POLICY_FOLDER}. Install Falaj with its *.cedar files.")
        text = "\n".join([*(file.read_text() for file in files), extra or ""])
        schema = (POLICY_FOLDER / SCHEMA_NAME).read_text()
        return cls(text, schema, region=region, permitted_regions=permitted_regions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the policies as text, because Cedar's handles cannot cross a process boundary."""
        return _restore, (*self._source, self._region, self._permitted_regions)

    def in_region(self, region: str) -> Policy:
        """Return the same policies for a process in another region."""
        return Policy(*self._source, region=region, permitted_regions=self._permitted_regions)

    @property
    def names(self) -> tuple[str, ...]:
        """Ids of all policies, sorted."""
        return tuple(sorted(self._parsed.advice))

    def decide(
        self, principal: Principal, action: Action, resource: Resource, *, environment: str = "local"
    ) -> Decision:
        """Decide whether a principal may do an action on a resource. Unknown values are denied, without an error."""
        subject = _Subject(
            subject=principal.subject,
            role=str(principal.role),
            purpose=principal.purpose,
            tenant=principal.tenant,
            entrypoint=principal.entrypoint,
            models=principal.models,
        )
        return self._decide(subject, action, resource, environment)

    def check(
        self, principal: Principal, action: Action, resource: Resource, *, environment: str = "local"
    ) -> Decision:
        """Require that a principal may do an action on a resource, and return the decision.

        Raises:
            AccessDenied: the action is denied. The message names the policies that forbid it, and their advice.
        """
        decision = self.decide(principal, action, resource, environment=environment)
        if not decision.allowed:
            others = {role: replace(principal, role=role) for role in Role}
            roles = [
                role
                for role, other in others.items()
                if self.decide(other, action, resource, environment=environment).allowed
            ]
            raise AccessDenied(self._refusal(principal, action, resource, decision, roles))
        return decision

    def roles_for(self, action: Action) -> frozenset[Role]:
        """Return the roles that may do an action on a public resource of the default tenant.

        The policies are evaluated for each role.
        """
        any_resource = Resource(kind="path", name="*", region=self._region)
        return frozenset(
            role
            for role in Role
            if self._decide(_Subject("edge", role.value), action, any_resource, "local").allowed
        )

    def _decide(self, subject: _Subject, action: str, resource: Resource, environment: str) -> Decision:
        key = (subject, str(action), resource, environment)
        decision = self._cache.get(key)
        if decision is None:
            decision = self._evaluate(*key)
            if len(self._cache) >= MAX_CACHED_DECISIONS:
                self._cache.clear()
            self._cache[key] = decision
        return decision

    def _evaluate(self, subject: _Subject, action: str, resource: Resource, environment: str) -> Decision:
        request = {
            "principal": {"type": "User", "id": subject.subject},
            "action": {"type": "Action", "id": action},
            "resource": {"type": "Resource", "id": resource.name},
            "context": {
                "environment": environment,
                "region": self._region,
                "permitted_regions": list(self._permitted_regions),
            },
        }
        try:
            entities = _entities(subject, resource)
            result = cedarpy.is_authorized(request, self._parsed.policies, entities, self._parsed.schema)
        except (ValueError, TypeError):  # a text is not UTF-8, or an attribute is not JSON
            return Decision(allowed=False, policies=(NOT_EVALUATED,))
        if result.decision is cedarpy.Decision.NoDecision or result.diagnostics.errors:
            return Decision(allowed=False, policies=(NOT_EVALUATED,))
        ids = result.diagnostics.id_annotations_by_reason
        return Decision(allowed=result.allowed, policies=tuple(sorted(ids.values())))

    def _refusal(
        self,
        principal: Principal,
        action: Action,
        resource: Resource,
        decision: Decision,
        roles: Sequence[Role],
    ) -> str:
        attempt = f"{action.replace('_', ' ')} on {resource.kind} '{resource.name}' ({resource.column_class})"
        purpose = f" for purpose '{principal.purpose}'" if principal.purpose else " without a purpose"
        if not decision.policies:
            role = f"the role {' or '.join(roles)}" if roles else "another role"
            reason = f"no policy permits it. Use {role}, or ask an admin."
        else:
            advice = [self._parsed.advice.get(name, "") for name in decision.policies]
            reason = " ".join([f"forbidden by {', '.join(decision.policies)}.", *filter(None, advice)])
        return f"Role {principal.role} may not {attempt}{purpose}: {reason}"


def _restore(text: str, schema: str, region: str, permitted_regions: tuple[str, ...]) -> Policy:
    return Policy(text, schema, region=region, permitted_regions=permitted_regions)


def _entities(subject: _Subject, resource: Resource) -> list[dict[str, Any]]:
    return [
        {
            "uid": {"type": "User", "id": subject.subject},
            "attrs": {
                "subject": subject.subject,
                "purpose": subject.purpose,
                "tenant": subject.tenant,
                "entrypoint": subject.entrypoint,
                "scoped": subject.models is not None,
                "models": list(subject.models or ()),
            },
            "parents": [{"type": "Role", "id": subject.role}],
        },
        {
            "uid": {"type": "Resource", "id": resource.name},
            "attrs": {
                "kind": resource.kind,
                "name": resource.name,
                "column_class": resource.column_class,
                "purposes": list(resource.purposes),
                "region": resource.region,
                "tenant": resource.tenant,
                "registered_by": resource.registered_by,
                "serves": resource.serves,
                "exceeds_token": resource.exceeds_token,
            },
            "parents": [],
        },
    ]


class _Parsed(NamedTuple):
    schema: cedarpy.Schema
    policies: cedarpy.PolicySet
    advice: dict[str, str]
    """Maps policy id to the policy's advice for a denied principal."""


@functools.lru_cache(maxsize=4)
def _parse(text: str, schema: str) -> _Parsed:
    """Parse policies, once per process for each text. Cedar's objects are immutable."""
    parsed_schema = _parse_schema(schema)
    return _Parsed(parsed_schema, _parse_policies(text, parsed_schema), _parse_advice(text))


def _parse_schema(text: str) -> cedarpy.Schema:
    try:
        return cedarpy.Schema.from_str(text)
    except ValueError as error:
        raise ConfigError(f"The policies' schema cannot be parsed: {error}.") from error


def _parse_policies(text: str, schema: cedarpy.Schema) -> cedarpy.PolicySet:
    try:
        policies = cedarpy.PolicySet.from_str(text)
    except ValueError as error:
        raise ConfigError(f"The policies cannot be parsed: {error}.") from error
    validation = cedarpy.validate_policies(text, schema)
    if not validation.validation_passed:
        problems = "; ".join(str(error) for error in validation.errors)
        raise ConfigError(f"The policies do not fit {SCHEMA_NAME}: {problems}.")
    return policies


def _parse_advice(text: str) -> dict[str, str]:
    """Return the advice of each policy, by policy id.

    Raises:
        ConfigError: an id is missing or used twice, so decisions would be ambiguous; or the text contains a template.
    """
    parsed = json.loads(cedarpy.policies_to_json_str(text))
    if parsed.get("templates"):
        raise ConfigError("The policies contain a template, which has no effect. Write it as a policy.")
    advice: dict[str, str] = {}
    for policy in parsed["staticPolicies"].values():
        notes = policy.get("annotations") or {}
        name = notes.get("id")
        if not name or name in advice or name == NOT_EVALUATED:
            raise ConfigError(f"Each policy needs a unique @id, got {name!r}.")
        advice[name] = notes.get("advice") or ""
    return advice
