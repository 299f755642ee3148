"""What a policy needs of the two versions. The command checks it before a rollout starts.

It needs the keys of both versions. A start over HTTP has none, so there the reader of outcomes refuses later, and its
metric gets no units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import RolloutError, did_you_mean
from cluster.ledger import Ledger
from cluster.registry import Registry
from cluster.security.acting import Actor
from cluster.security.keys.access import key_store
from cluster.statistics.policy import Form
from cluster.storage import layout
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.evidence.paired import require_same_inputs
from serve_apps.rollout.policy.spec import RolloutSpec

if TYPE_CHECKING:
    from cluster.runtime.signature import ModelSignature


def check_versions(
    config: RolloutConfig, ledger: Ledger, actor: Actor, *, treatment: int, champion: int
) -> None:
    """Require that the policy's metrics and signals can be computed for these versions.

    Raises:
        RolloutError: an input is missing or is no number, or the versions have different inputs.
    """
    policy = config.rollout
    if policy is None or not _needs_signatures(policy):
        return
    from cluster.runtime.loader import load_signature  # imported here, so that other actions do not wait

    registry, store = Registry(ledger, layout(config.storage)), key_store(actor.access)
    ours, theirs = (load_signature(registry.get(config.name, one), store) for one in (treatment, champion))
    require_computable(policy, ours, theirs)


def _needs_signatures(policy: RolloutSpec) -> bool:
    forms = {one.form for one in policy.metrics}
    return bool(forms & {Form.paired, Form.adjusted}) or any(one.column for one in policy.signals)


def require_computable(policy: RolloutSpec, treatment: ModelSignature, champion: ModelSignature) -> None:
    """Require that the policy's metrics and signals can be computed for versions with these signatures.

    Raises:
        RolloutError: see `check_versions`.
    """
    if not policy.is_shadow and any(one.form is Form.paired for one in policy.metrics):
        require_same_inputs(treatment, champion)
    signatures = (champion,) if policy.is_shadow else (treatment, champion)
    for metric in policy.metrics:
        if metric.covariate:
            for signature in signatures:
                _require_input(signature, metric.covariate, what="covariate", is_number=True)
    for signal in policy.signals:
        if signal.column:
            for signature in signatures:
                _require_input(signature, signal.column, what="column", is_number=False)


def _require_input(signature: ModelSignature, name: str, *, what: str, is_number: bool) -> None:
    inputs = {spec.name: spec for spec in signature.inputs}
    if name not in inputs:
        raise RolloutError(
            f"rollout: the {what} '{name}' is no input of both versions, so it is not logged."
            f"{did_you_mean(name, inputs)}"
        )
    if is_number and (inputs[name].categories is not None or inputs[name].length is not None):
        raise RolloutError(f"rollout: the {what} '{name}' must be a number, and it is a category or a list.")
