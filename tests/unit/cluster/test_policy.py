"""Who may do what: the table agreed upon, spelt out a second time, and the boundaries that hold for everybody."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import cast

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import AccessDenied, ConfigError
from cluster.security.authorization import policy as policy_module
from cluster.security.authorization.policy import (
    EDGE_ACTIONS,
    NOT_EVALUATED,
    POLICY_FOLDER,
    Action,
    Policy,
    Resource,
)
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role

CLASSES = ("public", "internal", "personal", "sensitive")
DE, DS, ML, AP, AU, SE, AD, SU = Role
ALL = frozenset(Role) - {SU}

# Without keys, which have a table of their own: what each action needs where no boundary is in the way.
TABLE: dict[Action, frozenset[Role]] = {
    Action.predict: frozenset({SE, ML, DS, AD}),
    Action.write_outcome: frozenset({SE, ML, AD}),
    Action.read_metadata: ALL,
    Action.read_online: frozenset({SE, AD}),
    Action.push_features: frozenset({DE, SE, AD}),
    Action.write_features: frozenset({DE, AD}),
    Action.apply_definitions: frozenset({DE, AD}),
    Action.build_training_set: frozenset({DS, AD}),
    Action.train_model: frozenset({DS, AD}),
    Action.register_model: frozenset({DS, ML, AD}),
    Action.approve_model: frozenset({AP, AD}),
    Action.deploy: frozenset({ML, AP, AD}),
    Action.rollout: frozenset({ML, AP, AD}),
    Action.rollback: frozenset({ML, AP, AD}),
    Action.compact_log: frozenset({ML, AD}),
    Action.restart_serving: frozenset({AD}),
    Action.wrap_key: frozenset({AD}),
    Action.unwrap_key: frozenset({AD}),
    Action.create_key: frozenset({AD}),
    Action.manage_keys: frozenset({AD}),
    Action.manage_cluster: frozenset({AD}),
    Action.read_ledger: frozenset({AU, AD}),
}
READS: dict[str, frozenset[Role]] = {
    "public": ALL,
    "internal": frozenset({DE, DS, AD}),
    "personal": frozenset({DS, AD}),
    "sensitive": frozenset({DS, AD}),
}
USES_DATA = {
    Action.read_columns,
    Action.read_online,
    Action.build_training_set,
    Action.predict,
    Action.unwrap_key,
}
RELEASES = {Action.approve_model, Action.deploy, Action.rollout}
UNWRAPS: dict[str, dict[str, frozenset[Role]]] = {
    "features": READS | {"public": frozenset({DS, AD})},
    "training_sets": dict.fromkeys(CLASSES, frozenset({DS, AD})),
    "quarantine": dict.fromkeys(CLASSES, frozenset({AD})) | {"internal": frozenset({DE, AD})},
    "online": dict.fromkeys(CLASSES, frozenset({SE, AD})) | {"internal": frozenset({DE, SE, AD})},
    "push": dict.fromkeys(CLASSES, frozenset({AD})),
    "predictions": dict.fromkeys(CLASSES, frozenset({DS, ML, AP, AD})),
    "outcomes": dict.fromkeys(CLASSES, frozenset({DS, ML, AP, AD})),
    "models": dict.fromkeys(CLASSES, frozenset({DS, ML, AP, SE, AD})),
}
WRAPS = {
    "features": frozenset({DE, DS, AD}),
    "training_sets": frozenset({DS, AD}),
    "quarantine": frozenset({DE, AD}),
    "online": frozenset({DE, SE, AD}),
    "push": frozenset({DE, SE, AD}),
    "predictions": frozenset({SE, AD}),
    "outcomes": frozenset({SE, AD}),
    "models": frozenset({DS, ML, AD}),
}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load()


def who(role: Role, purpose: str = "", *, subject: str = "alice", tenant: str = "default") -> Principal:
    return Principal(subject=subject, role=role, purpose=purpose, expires_at=0, tenant=tenant)


def columns(column_class: str = "public", purposes: tuple[str, ...] = (), **changes: str) -> Resource:
    return Resource(
        kind="feature view", name="income", column_class=column_class, purposes=purposes, **changes
    )


def expected(role: Role, action: Action, column_class: str, listed: tuple[str, ...], purpose: str) -> bool:
    roles = READS[column_class] if action is Action.read_columns else TABLE[action]
    if role not in roles:
        return False
    if action not in USES_DATA or column_class == "public" or role is AD:
        return True  # the admin of a machine of his own needs no purpose
    return (not listed or purpose in listed) and (column_class != "sensitive" or purpose != "")


@pytest.mark.parametrize("role", list(Role))
def test_the_policies_are_the_table_agreed_upon(policy: Policy, role: Role) -> None:
    """Every action, class and fit of purpose."""
    purposes = ((), ("credit",), ("credit", "fraud"), ("fraud",))
    for action, column_class, listed, purpose in itertools.product(Action, CLASSES, purposes, ("", "credit")):
        decision = policy.decide(who(role, purpose), action, columns(column_class, listed))
        case = (role, action, column_class, listed, purpose)
        assert decision.allowed == expected(*case), case
        assert not decision.allowed or decision.policies


@pytest.mark.parametrize("role", list(Role))
def test_keys_follow_what_they_protect(policy: Policy, role: Role) -> None:
    """By the first part of a key's name, and its class."""
    for folder, column_class in itertools.product(UNWRAPS, CLASSES):
        key = Resource(kind="key", name=f"{folder}/income/{column_class}", column_class=column_class)
        unwraps = policy.decide(who(role, "credit"), Action.unwrap_key, key).allowed
        assert unwraps == (role in UNWRAPS[folder][column_class]), key.name
        assert policy.decide(who(role), Action.wrap_key, key).allowed == (role in WRAPS[folder]), key.name


@pytest.mark.parametrize("folder", sorted(UNWRAPS.keys() - {"models"}))
@pytest.mark.parametrize("role", list(Role))
def test_no_key_is_of_a_lower_class_than_its_name_says(policy: Policy, folder: str, role: Role) -> None:
    """Whoever makes it; a higher one is his own loss. A model may be called as he likes."""
    for named, stated in itertools.product(CLASSES, CLASSES):
        key = Resource(kind="key", name=f"{folder}/income/{named}", column_class=stated)
        decision = policy.decide(who(role, "credit"), Action.create_key, key)
        below = CLASSES.index(stated) < CLASSES.index(named)
        assert ("class-below-the-name" in decision.policies) == below, key
    model = Resource(kind="key", name="models/a/sensitive", column_class="internal")
    assert policy.decide(who(Role.ml_engineer), Action.create_key, model).allowed


@pytest.mark.parametrize(
    ("entrypoint", "role", "may"),
    [
        ("feature_jobs.ingest", DE, True),
        ("feature_jobs.replay", DE, True),
        ("feature_jobs.quarantine", DE, False),
        ("feature_jobs.quarantine", DS, True),
        ("feature_jobs.ingest", DS, False),
        ("", DS, False),
    ],
)
def test_the_quarantine_is_read_by_ingestion_and_shown_to_readers(
    policy: Policy, entrypoint: str, role: Role, may: bool
) -> None:
    """An engineer's jobs read it and show nothing; whoever may read the columns may look at it, for a purpose."""
    key = Resource(
        kind="key", name="quarantine/income/sensitive", column_class="sensitive", purposes=("credit",)
    )
    asker = Principal(subject="a", role=role, purpose="credit", expires_at=0, entrypoint=entrypoint)
    stranger = Principal(subject="a", role=role, purpose="fraud", expires_at=0, entrypoint=entrypoint)
    assert policy.decide(asker, Action.unwrap_key, key).allowed == may
    assert not policy.decide(stranger, Action.unwrap_key, key).allowed


@pytest.mark.parametrize("job", ["materialize", "compact", "retain", "stream"])
def test_jobs_that_move_values_unwrap_every_class_of_them(policy: Policy, job: str) -> None:
    """A data engineer alone sees none of them."""
    engineer = who(Role.data_engineer, "credit")
    moving = dataclasses.replace(engineer, entrypoint=f"feature_jobs.{job}")
    for folder in ("features", "online", "push"):
        key = Resource(kind="key", name=f"{folder}/income/sensitive", column_class="sensitive")
        assert policy.decide(moving, Action.unwrap_key, key).allowed
        assert not policy.decide(engineer, Action.unwrap_key, key).allowed


def test_the_job_that_compacts_logs_writes_under_their_keys(policy: Policy) -> None:
    """An ML engineer alone reads records, and cannot add any."""
    engineer = who(Role.ml_engineer, "credit")
    compacting = dataclasses.replace(engineer, entrypoint="jobs.compact_log")
    for folder in ("predictions", "outcomes", "features"):
        key = Resource(kind="key", name=f"{folder}/income/sensitive", column_class="sensitive")
        assert policy.decide(compacting, Action.wrap_key, key).allowed == (folder != "features")
        assert not policy.decide(engineer, Action.wrap_key, key).allowed


@pytest.mark.parametrize("role", list(Role))
def test_a_scope_narrows_a_role_to_its_models(policy: Policy, role: Role) -> None:
    """It widens nothing, and says nothing of what is no model."""
    asker = who(role, "credit")
    for action, models in itertools.product(Action, (None, (), ("loan",), ("other", "loan"), ("other",))):
        scoped = dataclasses.replace(asker, models=models)
        loan = Resource(kind="model", name="loan")
        before = policy.decide(asker, action, loan).allowed
        within = models is None or "loan" in models
        decision = policy.decide(scoped, action, loan)
        assert decision.allowed == (before and within), (action, models)
        assert ("model-out-of-scope" in decision.policies) == (not within)
        view = columns()
        assert policy.decide(scoped, action, view).allowed == policy.decide(asker, action, view).allowed


def test_every_action_is_in_the_table_and_in_the_schema(policy: Policy) -> None:
    """A new action without policies is denied to all but the admin, which a test should say before a user does."""
    assert set(TABLE) | {Action.read_columns} == set(Action)
    for action in Action:
        assert policy.decide(who(Role.admin), action, columns()).allowed, action


def test_the_roles_are_those_of_the_schema(policy: Policy) -> None:
    """Each of a person reads metadata; none is missing from the lists in the policies."""
    for role in ALL:
        assert policy.decide(who(role), Action.read_metadata, columns()).allowed


def test_the_supervisor_restarts_what_serves_and_does_nothing_else(policy: Policy) -> None:
    """In every environment, whoever registered the model; no data, no key, no version that the ledger does not name."""
    me = who(Role.supervisor, "credit", subject="system:supervisor")
    model = Resource(kind="model", name="m", registered_by="system:supervisor")
    for environment in ("local", "production"):
        for action in Action:
            assert not policy.decide(me, action, model, environment=environment).allowed, action
            serves = policy.decide(
                me, action, dataclasses.replace(model, serves=True), environment=environment
            )
            assert serves.allowed == (action is Action.restart_serving), action
        other = dataclasses.replace(model, serves=True, tenant="other")
        assert not policy.decide(me, Action.restart_serving, other, environment=environment).allowed
    engineer = who(Role.ml_engineer)
    assert not policy.decide(
        engineer, Action.restart_serving, dataclasses.replace(model, serves=True)
    ).allowed


def test_the_edges_roles_come_from_the_policies(policy: Policy) -> None:
    """Its rules cannot differ from the replica's."""
    assert {action: policy.roles_for(action) for action in EDGE_ACTIONS} == {
        action: TABLE[action] for action in EDGE_ACTIONS
    }
    narrower = Policy.load(
        '@id("no-predictions") forbid (principal in Role::"service", action == Action::"predict", resource);'
    )
    assert narrower.roles_for(Action.predict) == TABLE[Action.predict] - {Role.service}


def test_the_policies_fit_their_schema_and_have_names_of_their_own() -> None:
    """And each `forbid` says what would help."""
    text = "\n".join(file.read_text() for file in POLICY_FOLDER.glob("*.cedar"))
    assert cedarpy.validate_policies(text, (POLICY_FOLDER / "schema.cedarschema").read_text())
    names = Policy.load().names
    assert (
        len(names) == len(set(names)) == text.count("@id(") == text.count("permit (") + text.count("forbid (")
    )
    assert text.count("forbid (") == text.count("@advice(")


@pytest.mark.parametrize(
    ("changes", "deciding"),
    [
        ({"tenant": "other"}, "other-tenant"),
        ({"region": "eu"}, "other-region"),
        ({"column_class": "secret"}, "unknown-column-class"),
    ],
)
@pytest.mark.parametrize("role", list(Role))
def test_boundaries_hold_for_every_role(
    policy: Policy, role: Role, changes: dict[str, str], deciding: str
) -> None:
    """The admin too, whatever he does."""
    resource = Resource(kind="model", name="m", **changes)
    for action in Action:
        decision = policy.decide(who(role, "credit"), action, resource, environment="staging")
        if deciding == "other-region" and action in (Action.read_metadata, Action.read_ledger):
            assert deciding not in decision.policies
        else:
            assert (decision.allowed, decision.policies) == (False, (deciding,)), action


def test_a_permitted_region_is_as_ones_own() -> None:
    """Only the operator of a process permits it; nothing in a request can."""
    eu, admin = columns(region="eu"), who(Role.admin)

    def reads(policy: Policy, environment: str) -> bool:
        return policy.decide(admin, Action.read_columns, eu, environment=environment).allowed

    assert not reads(Policy.load(region="us"), "staging")
    assert reads(Policy.load(region="us"), "local"), "a machine of one's own has no region to speak of"
    assert reads(Policy.load(region="eu"), "staging")
    permitted = Policy.load(region="us", permitted_regions=["eu"])
    assert reads(permitted, "staging")
    assert permitted.roles_for(Action.predict) == TABLE[Action.predict]


@pytest.mark.parametrize("environment", ["production", "prod", "Production", ""])
@pytest.mark.parametrize("action", sorted(RELEASES))
def test_who_registered_a_model_does_not_release_it(policy: Policy, action: Action, environment: str) -> None:
    """In production, and where an environment's name is not known; elsewhere he may."""
    model = Resource(kind="model", name="loan", registered_by="alice")
    for role in (Role.admin, Role.approver):
        own = policy.decide(who(role), action, model, environment=environment)
        assert (own.allowed, own.policies) == (False, ("four-eyes",))
        assert policy.decide(who(role, subject="bob"), action, model, environment=environment).allowed
        for elsewhere in ("local", "test", "staging"):
            assert policy.decide(who(role), action, model, environment=elsewhere).allowed


def test_a_model_of_unknown_origin_is_not_released_in_production(policy: Policy) -> None:
    """Nobody could say whether four eyes saw it."""
    decision = policy.decide(
        who(Role.approver), Action.deploy, Resource(kind="model", name="m"), environment="production"
    )
    assert (decision.allowed, decision.policies) == (False, ("registrant-unknown",))


def test_the_admin_needs_a_purpose_but_on_a_machine_of_his_own(policy: Policy) -> None:
    """There the keys are his anyway."""
    admin, listed = who(Role.admin), columns("personal", ("credit",))
    assert policy.decide(admin, Action.read_columns, listed, environment="local").allowed
    for environment in ("test", "staging", "production"):
        decision = policy.decide(admin, Action.read_columns, listed, environment=environment)
        assert (decision.allowed, decision.policies) == (False, ("purpose-not-listed",))


def test_a_rollback_needs_no_second_pair_of_eyes(policy: Policy) -> None:
    """Whoever sees the damage ends it."""
    model = Resource(kind="model", name="loan", registered_by="alice")
    assert policy.decide(who(Role.ml_engineer), Action.rollback, model, environment="production").allowed


def test_an_ml_engineer_deploys_outside_production_alone(policy: Policy) -> None:
    """Somebody else's model too."""
    model, bob = (
        Resource(kind="model", name="loan", registered_by="alice"),
        who(Role.ml_engineer, subject="bob"),
    )
    assert policy.decide(bob, Action.deploy, model, environment="staging").allowed
    assert not policy.decide(bob, Action.deploy, model, environment="production").allowed
    assert policy.decide(bob, Action.rollout, model, environment="production").allowed


def test_a_denial_says_which_policies_and_what_helps(policy: Policy) -> None:
    """And a default denial that no policy permits it."""
    with pytest.raises(
        AccessDenied, match=r"purpose-not-listed.*Use a token for a purpose that the resource lists"
    ):
        policy.check(who(Role.data_scientist, "ads"), Action.read_columns, columns("personal", ("credit",)))
    with pytest.raises(AccessDenied, match=r"auditor may not predict on .*no policy permits it"):
        policy.check(who(Role.auditor), Action.predict, columns())
    assert policy.decide(who(Role.auditor), Action.predict, columns()).policies == ()


def test_a_request_that_cannot_be_read_is_denied(policy: Policy) -> None:
    """Cedar skips a `forbid` that fails for want of an attribute; the schema makes it a refusal instead."""
    king = Principal(subject="a", role=cast(Role, "king"), purpose="credit", expires_at=0)
    no_utf8 = who(Role.admin, subject="\ud800")
    no_text = who(Role.admin, cast(str, 3))
    for principal in (king, no_utf8, no_text):
        decision = policy.decide(principal, Action.read_metadata, columns())
        assert (decision.allowed, decision.policies) == (False, (NOT_EVALUATED,))
    assert not policy.decide(who(Role.admin), cast(Action, "fly"), columns()).allowed


@pytest.mark.parametrize("name", ['a" b', "a\\", "a::b", 'x"}]}', "\n", "*"])
def test_a_subject_is_only_a_subject(policy: Policy, name: str) -> None:
    """Whatever it is called."""
    model = Resource(kind="model", name=name, registered_by=name)
    own = policy.decide(who(Role.approver, subject=name), Action.deploy, model, environment="production")
    assert own.policies == ("four-eyes",)
    assert policy.decide(
        who(Role.approver, subject="b"), Action.deploy, model, environment="production"
    ).allowed


@pytest.mark.parametrize(
    "extra",
    [
        "permit (principal, action, resource);",
        '@id("four-eyes") forbid (principal, action, resource);',
        '@id("not-evaluated") forbid (principal, action, resource);',
        '@id("x") permit (principal in Role::"king", action, resource);',
        '@id("x") forbid (principal, action, resource) when { resource.colour == "red" };',
        '@id("x") permit (principal, action == Action::"fly", resource);',
        '@id("x") permit (principal == ?principal, action, resource);',
        "permit (",
    ],
)
def test_policies_that_cannot_be_meant_are_refused(extra: str) -> None:
    """No name, a name twice, or something that the schema does not have."""
    with pytest.raises(ConfigError):
        Policy.load(extra)


def test_the_policies_are_parsed_once_in_a_process() -> None:
    """Regions are each policy's own all the same."""
    before = policy_module._parse.cache_info().misses
    here, there = Policy.load(region="us"), pickle.loads(pickle.dumps(Policy.load(region="eu")))  # noqa: S301 - our own
    assert policy_module._parse.cache_info().misses <= before + 1
    eu = columns(region="eu")
    assert not here.decide(who(Role.admin), Action.read_columns, eu, environment="staging").allowed
    assert there.decide(who(Role.admin), Action.read_columns, eu, environment="staging").allowed


def test_an_operator_adds_policies_of_his_own() -> None:
    """Permissions too, within the boundaries."""
    policy = Policy.load('@id("auditors-predict") permit (principal in Role::"auditor", action, resource);')
    assert policy.decide(who(Role.auditor), Action.predict, columns()).policies == ("auditors-predict",)
    assert not policy.decide(who(Role.auditor), Action.predict, columns(tenant="other")).allowed


def test_a_policy_crosses_to_a_worker() -> None:
    """With its region and what was added."""
    extra = '@id("no") forbid (principal, action == Action::"predict", resource);'
    there = pickle.loads(pickle.dumps(Policy.load(extra, region="eu")))  # noqa: S301 - our own
    assert there.decide(who(Role.admin), Action.predict, columns(region="eu")).policies == ("no",)


names = st.sampled_from(["", "credit", "fraud", "alice", "other", "default", "local", "eu"])
principals = st.builds(
    Principal, subject=names, role=st.sampled_from(Role), purpose=names, expires_at=st.just(0), tenant=names
)
resources = st.builds(
    Resource,
    kind=names,
    name=st.sampled_from(["features/a/b", "models/m", "x"]),
    column_class=st.sampled_from([*CLASSES, "secret"]),
    purposes=st.lists(names, max_size=2).map(tuple),
    region=names,
    tenant=names,
    registered_by=names,
)
FORBIDS = (
    'forbid (principal in Role::"admin", action, resource);',
    'forbid (principal, action in Action::"use_data", resource) unless { principal.purpose == "credit" };',
    'forbid (principal, action, resource) when { resource.region != "eu" };',
    'forbid (principal, action == Action::"read_metadata", resource) when { context.environment == "local" };',
)


@pytest.fixture(scope="module")
def narrowed() -> list[Policy]:
    sets = [combo for size in (1, 2, 4) for combo in itertools.combinations(FORBIDS, size)]
    return [
        Policy.load("\n".join(f'@id("extra-{n}") {text}' for n, text in enumerate(combo))) for combo in sets
    ]


@settings(max_examples=60, deadline=None)
@given(principals, st.sampled_from(Action), resources, st.sampled_from(["local", "production"]))
def test_adding_forbids_never_widens(
    policy: Policy,
    narrowed: list[Policy],
    principal: Principal,
    action: Action,
    resource: Resource,
    environment: str,
) -> None:
    """What is allowed with further `forbid`s was allowed without them."""
    before = policy.decide(principal, action, resource, environment=environment).allowed
    for narrower in narrowed:
        assert before or not narrower.decide(principal, action, resource, environment=environment).allowed


@settings(max_examples=60, deadline=None)
@given(st.text(), principals, st.sampled_from(Action), resources)
def test_no_role_that_does_not_exist_may_anything(
    policy: Policy, role: str, principal: Principal, action: Action, resource: Resource
) -> None:
    """Whatever it is called."""
    stranger = Principal(
        subject=principal.subject,
        role=cast(Role, f"_{role}"),
        purpose=principal.purpose,
        expires_at=0,
        tenant=resource.tenant,
    )
    assert not policy.decide(stranger, action, resource).allowed
