"""Who may do what: Cedar policies (`cluster/policies/*.cedar`), parsed once and asked for every decision.

Denied is what no policy permits, and what any policy forbids. The edge's rules are compiled from the same policies
(`Policy.roles_for`), so edge and replica cannot disagree. What each role may do, before the boundaries below:

    data_engineer    writes, pushes features, applies definitions, reads public and internal columns, wraps their keys
    data_scientist   reads columns of every class, builds training sets, trains and registers models, predicts
    ml_engineer      registers models, deploys them outside production, rolls out and back, predicts, writes outcomes,
                     compacts logs
    approver         approves models, deploys, rolls out and back, in every environment
    auditor          reads the ledger
    service          predicts, writes outcomes, reads features online by key, pushes features
    admin            everything
    supervisor       starts again what the ledger says serves (the cluster's own process)
    every role       reads metadata and public columns

Boundaries hold for all of them: the principal's tenant is the resource's; its region is this process's or a permitted
one (metadata and the ledger may be read from anywhere); a model is one that its token's scope names, where that names
any; a column that is not public is used for a purpose that the
resource lists, where it lists any; a sensitive one never without a purpose; and in production, which is every
environment not known to be another, nobody approves, deploys or rolls out a model that he registered himself. A
rollback is always possible.

Every request is checked against the schema. Without one, Cedar skips a policy that fails for want of an attribute,
and a skipped `forbid` forbids nothing.
"""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cedarpy

from cluster.errors import AccessDenied, ConfigError
from cluster.security.tokens.roles import Role

if TYPE_CHECKING:
    from cluster.security.tokens.principal import Principal

POLICY_FOLDER = Path(__file__).resolve().parents[2] / "policies"
SCHEMA_NAME = "schema.cedarschema"
NOT_EVALUATED = "not-evaluated"
"""Stands for the policies where Cedar could not read the request; always a denial."""
MAX_REMEMBERED = 4096


class Action(enum.StrEnum):
    """What a principal does; each is an action of the schema."""

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
    approve_model = "approve_model"
    deploy = "deploy"
    rollout = "rollout"
    rollback = "rollback"
    compact_log = "compact_log"
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
"""What the edge tells apart by path."""


class KeyAttributes(Protocol):
    """What the policies want to know of a key; `KeyInfo` has it."""

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
    """What an action is done to; the columns of one class, where it has columns."""

    kind: str
    """What it is, as messages name it: "feature view", "model", "key", "ledger"."""
    name: str
    column_class: str = "public"
    purposes: tuple[str, ...] = ()
    """What it may be used for; empty allows every purpose."""
    region: str = "local"
    tenant: str = "default"
    registered_by: str = ""
    """Subject of who registered the model; releasing one in production needs it."""
    serves: bool = False
    """Whether the ledger says that it answers requests now."""

    @classmethod
    def of_key(cls, key: KeyAttributes) -> Resource:
        """The resource that a key is."""
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
    """Whether, and by which policies."""

    allowed: bool
    policies: tuple[str, ...]
    """Ids of the policies that decided, sorted; empty where no policy permits it."""


@dataclass(frozen=True, slots=True)
class _Asker:
    """Of a principal what decides; two of its tokens are the same asker."""

    subject: str
    role: str
    purpose: str = ""
    tenant: str = "default"
    entrypoint: str = ""
    models: tuple[str, ...] | None = None


class Policy:
    """The policies of one process, which runs in one region."""

    def __init__(self, text: str, schema: str, *, region: str, permitted_regions: Iterable[str]) -> None:
        self._schema, self._policies, self._advice = _parsed(text, schema)
        self._region = region
        self._permitted_regions = tuple(permitted_regions)
        self._source = (text, schema)
        self._remembered: dict[tuple[_Asker, str, Resource, str], Decision] = {}

    @classmethod
    def load(
        cls, extra: str | None = None, *, region: str = "local", permitted_regions: Iterable[str] = ()
    ) -> Policy:
        """The project's policies, and an operator's own besides.

        Args:
            extra: Cedar text of further policies.
            region: where this process runs.
            permitted_regions: further regions whose data may be used here.

        Raises:
            ConfigError: a policy that cannot be parsed, does not fit the schema, or has no id of its own.
        """
        files = sorted(POLICY_FOLDER.glob("*.cedar"))
        if not files:
            raise ConfigError(f"No policies in {POLICY_FOLDER}. Install Falaj with its *.cedar files.")
        text = "\n".join([*(file.read_text() for file in files), extra or ""])
        schema = (POLICY_FOLDER / SCHEMA_NAME).read_text()
        return cls(text, schema, region=region, permitted_regions=permitted_regions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Crosses a process boundary as text, because Cedar's handles cannot."""
        return _restored, (*self._source, self._region, self._permitted_regions)

    @property
    def names(self) -> tuple[str, ...]:
        """The ids of all policies, sorted."""
        return tuple(sorted(self._advice))

    def decide(
        self, principal: Principal, action: Action, resource: Resource, *, environment: str = "local"
    ) -> Decision:
        """Whether a principal may do an action to a resource; never raises for what it does not know."""
        asker = _Asker(
            subject=principal.subject,
            role=str(principal.role),
            purpose=principal.purpose,
            tenant=principal.tenant,
            entrypoint=principal.entrypoint,
            models=principal.models,
        )
        return self._decide(asker, action, resource, environment)

    def check(
        self, principal: Principal, action: Action, resource: Resource, *, environment: str = "local"
    ) -> Decision:
        """The decision, where it is a permission.

        Raises:
            AccessDenied: naming the policies that forbid it, and what would help.
        """
        decision = self.decide(principal, action, resource, environment=environment)
        if not decision.allowed:
            raise AccessDenied(self._refusal(principal, action, resource, decision))
        return decision

    def roles_for(self, action: Action) -> frozenset[Role]:
        """The roles that may do an action to a public resource of the default tenant, found by asking for each."""
        anything = Resource(kind="path", name="*", region=self._region)
        return frozenset(
            role
            for role in Role
            if self._decide(_Asker("edge", role.value), action, anything, "local").allowed
        )

    def _decide(self, asker: _Asker, action: str, resource: Resource, environment: str) -> Decision:
        question = (asker, str(action), resource, environment)
        known = self._remembered.get(question)
        if known is None:
            known = self._evaluate(*question)
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[question] = known
        return known

    def _evaluate(self, asker: _Asker, action: str, resource: Resource, environment: str) -> Decision:
        request = {
            "principal": {"type": "User", "id": asker.subject},
            "action": {"type": "Action", "id": action},
            "resource": {"type": "Resource", "id": resource.name},
            "context": {
                "environment": environment,
                "region": self._region,
                "permitted_regions": list(self._permitted_regions),
            },
        }
        try:
            result = cedarpy.is_authorized(request, self._policies, _entities(asker, resource), self._schema)
        except (ValueError, TypeError):  # text that is no UTF-8, attributes that are no JSON
            return Decision(allowed=False, policies=(NOT_EVALUATED,))
        if result.decision is cedarpy.Decision.NoDecision or result.diagnostics.errors:
            return Decision(allowed=False, policies=(NOT_EVALUATED,))
        ids = result.diagnostics.id_annotations_by_reason
        return Decision(allowed=result.allowed, policies=tuple(sorted(ids.values())))

    def _refusal(self, principal: Principal, action: Action, resource: Resource, decision: Decision) -> str:
        what = f"{action.replace('_', ' ')} on {resource.kind} '{resource.name}' ({resource.column_class})"
        purpose = f" for purpose '{principal.purpose}'" if principal.purpose else " without a purpose"
        if not decision.policies:
            reason = "no policy permits it. Ask somebody with a role that may, or an admin for another role."
        else:
            advice = [self._advice.get(name, "") for name in decision.policies]
            reason = " ".join([f"forbidden by {', '.join(decision.policies)}.", *filter(None, advice)])
        return f"Role {principal.role} may not {what}{purpose}: {reason}"


def _restored(text: str, schema: str, region: str, permitted_regions: tuple[str, ...]) -> Policy:
    return Policy(text, schema, region=region, permitted_regions=permitted_regions)


def _entities(asker: _Asker, resource: Resource) -> list[dict[str, Any]]:
    return [
        {
            "uid": {"type": "User", "id": asker.subject},
            "attrs": {
                "subject": asker.subject,
                "purpose": asker.purpose,
                "tenant": asker.tenant,
                "entrypoint": asker.entrypoint,
                "scoped": asker.models is not None,
                "models": list(asker.models or ()),
            },
            "parents": [{"type": "Role", "id": asker.role}],
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
            },
            "parents": [],
        },
    ]


@functools.lru_cache(maxsize=4)
def _parsed(text: str, schema: str) -> tuple[cedarpy.Schema, cedarpy.PolicySet, dict[str, str]]:
    """Once in a process for each text; what Cedar gives is never changed."""
    parsed = _parsed_schema(schema)
    return parsed, _parsed_policies(text, parsed), _advice(text)


def _parsed_schema(text: str) -> cedarpy.Schema:
    try:
        return cedarpy.Schema.from_str(text)
    except ValueError as error:
        raise ConfigError(f"The policies' schema cannot be parsed: {error}.") from error


def _parsed_policies(text: str, schema: cedarpy.Schema) -> cedarpy.PolicySet:
    try:
        policies = cedarpy.PolicySet.from_str(text)
    except ValueError as error:
        raise ConfigError(f"The policies cannot be parsed: {error}.") from error
    found = cedarpy.validate_policies(text, schema)
    if not found.validation_passed:
        problems = "; ".join(str(error) for error in found.errors)
        raise ConfigError(f"The policies do not fit {SCHEMA_NAME}: {problems}.")
    return policies


def _advice(text: str) -> dict[str, str]:
    """Each policy's id and what it advises to whom it forbids something.

    Raises:
        ConfigError: an id is missing or given twice, so that a decision could not be told from it; or a template.
    """
    parsed = json.loads(cedarpy.policies_to_json_str(text))
    if parsed.get("templates"):
        raise ConfigError("The policies have a template, which decides nothing. Write it as a policy.")
    advice: dict[str, str] = {}
    for policy in parsed["staticPolicies"].values():
        notes = policy.get("annotations") or {}
        name = notes.get("id")
        if not name or name in advice or name == NOT_EVALUATED:
            raise ConfigError(f"Each policy needs an @id of its own, got {name!r}.")
        advice[name] = notes.get("advice") or ""
    return advice
