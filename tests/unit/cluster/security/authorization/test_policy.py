"""The rights of each role, as a second table that the policies must equal."""

from __future__ import annotations

import dataclasses
import itertools
from typing import cast

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import AccessDenied
from cluster.security.authorization.policy import EDGE_ACTIONS, POLICY_FOLDER, Action, Policy, Resource
from cluster.security.keys.store import COLUMN_CLASSES
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from feature_jobs.store.definitions.views import Sensitivity
from tests.samples.principals import columns, who

DE, DS, ML, AP, AU, SE, AD, SU = Role
ALL = frozenset(Role) - {SU}

# Roles that may do each action, if no boundary forbids it. Keys have their own table below.
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
    Action.export_model: frozenset({DS, ML, AP, AD}),
    Action.import_model: frozenset({ML, AD}),
    Action.approve_model: frozenset({AP, AD}),
    Action.deploy: frozenset({ML, AP, AD}),
    Action.rollout: frozenset({ML, AP, AD}),
    Action.rollback: frozenset({ML, AP, AD}),
    Action.compact_log: frozenset({ML, AD}),
    Action.schedule_runs: frozenset({DE, DS, ML, AD}),
    Action.submit_jobs: frozenset({DE, DS, ML, AP, AD}),
    Action.read_jobs: frozenset({AU, AD}),
    Action.control_jobs: frozenset({AD}),
    Action.restart_serving: frozenset({AD}),
    Action.wrap_key: frozenset({AD}),
    Action.unwrap_key: frozenset({AD}),
    Action.create_key: frozenset({AD}),
    Action.schedule_runs: frozenset({DE, DS, ML, AD}),
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
USES_DATA = {Action.read_columns, Action.read_online, Action.build_training_set, Action.predict}
USES_DATA |= {Action.unwrap_key, Action.export_model, Action.import_model}
UNWRAPS: dict[str, dict[str, frozenset[Role]]] = {
    "features": READS | {"public": frozenset({DS, AD})},
    "training_sets": dict.fromkeys(COLUMN_CLASSES, frozenset({DS, AD})),
    "quarantine": dict.fromkeys(COLUMN_CLASSES, frozenset({AD})) | {"internal": frozenset({DE, AD})},
    "online": dict.fromkeys(COLUMN_CLASSES, frozenset({SE, AD})) | {"internal": frozenset({DE, SE, AD})},
    "push": dict.fromkeys(COLUMN_CLASSES, frozenset({AD})),
    "predictions": dict.fromkeys(COLUMN_CLASSES, frozenset({DS, ML, AP, AD})),
    "outcomes": dict.fromkeys(COLUMN_CLASSES, frozenset({DS, ML, AP, AD})),
    "models": dict.fromkeys(COLUMN_CLASSES, frozenset({DS, ML, AP, SE, AD})),
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


def expected(role: Role, action: Action, column_class: str, listed: tuple[str, ...], purpose: str) -> bool:
    """Return whether the table allows an action on columns with these listed purposes."""
    roles = READS[column_class] if action is Action.read_columns else TABLE[action]
    if role not in roles:
        return False
    if action not in USES_DATA or column_class == "public" or role is AD:
        return True  # an admin needs no purpose in the environment "local"
    return (not listed or purpose in listed) and (column_class != "sensitive" or purpose != "")


@pytest.mark.parametrize("role", list(Role))
def test_policies_equal_the_table(policy: Policy, role: Role) -> None:
    """Checks every combination of action, column class and purpose."""
    purposes = ((), ("credit",), ("credit", "fraud"), ("fraud",))
    for action, column_class, listed, purpose in itertools.product(
        Action, COLUMN_CLASSES, purposes, ("", "credit")
    ):
        decision = policy.decide(who(role, purpose), action, columns(column_class, listed))
        case = (role, action, column_class, listed, purpose)
        assert decision.allowed == expected(*case), case
        assert not decision.allowed or decision.policies


@pytest.mark.parametrize("role", list(Role))
def test_key_rights_depend_on_name_and_class(policy: Policy, role: Role) -> None:
    """The first part of a key's name and its class decide who may use it."""
    for folder, column_class in itertools.product(UNWRAPS, COLUMN_CLASSES):
        key = Resource(kind="key", name=f"{folder}/income/{column_class}", column_class=column_class)
        unwraps = policy.decide(who(role, "credit"), Action.unwrap_key, key).allowed
        assert unwraps == (role in UNWRAPS[folder][column_class]), key.name
        assert policy.decide(who(role), Action.wrap_key, key).allowed == (role in WRAPS[folder]), key.name


@pytest.mark.parametrize("folder", sorted(UNWRAPS.keys() - {"models"}))
@pytest.mark.parametrize("role", list(Role))
def test_key_class_is_at_least_the_class_in_its_name(policy: Policy, folder: str, role: Role) -> None:
    """Holds for every role. A higher class is allowed. Names of model keys are free."""
    for class_in_name, column_class in itertools.product(COLUMN_CLASSES, COLUMN_CLASSES):
        key = Resource(kind="key", name=f"{folder}/income/{class_in_name}", column_class=column_class)
        decision = policy.decide(who(role, "credit"), Action.create_key, key)
        below = COLUMN_CLASSES.index(column_class) < COLUMN_CLASSES.index(class_in_name)
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
def test_quarantine_keys_need_the_right_entrypoint(
    policy: Policy, entrypoint: str, role: Role, may: bool
) -> None:
    """A data engineer's ingestion and replay may read the quarantine. A data scientist may list it, for a listed
    purpose."""
    key = Resource(
        kind="key", name="quarantine/income/sensitive", column_class="sensitive", purposes=("credit",)
    )
    listed_purpose, other_purpose = (who(role, word, entrypoint=entrypoint) for word in ("credit", "fraud"))
    assert policy.decide(listed_purpose, Action.unwrap_key, key).allowed == may
    assert not policy.decide(other_purpose, Action.unwrap_key, key).allowed


@pytest.mark.parametrize("job", ["materialize", "compact", "retain", "stream"])
def test_jobs_that_move_values_may_unwrap_every_class(policy: Policy, job: str) -> None:
    """A data engineer without such a job may not."""
    engineer = who(Role.data_engineer, "credit")
    moving = dataclasses.replace(engineer, entrypoint=f"feature_jobs.{job}")
    for folder in ("features", "online", "push"):
        key = Resource(kind="key", name=f"{folder}/income/sensitive", column_class="sensitive")
        assert policy.decide(moving, Action.unwrap_key, key).allowed
        assert not policy.decide(engineer, Action.unwrap_key, key).allowed


def test_only_log_compaction_may_wrap_log_keys_for_an_ml_engineer(policy: Policy) -> None:
    """Without that job, an ML engineer can read records but not add any."""
    engineer = who(Role.ml_engineer, "credit")
    compacting = dataclasses.replace(engineer, entrypoint="jobs.compact_log")
    for folder in ("predictions", "outcomes", "features"):
        key = Resource(kind="key", name=f"{folder}/income/sensitive", column_class="sensitive")
        assert policy.decide(compacting, Action.wrap_key, key).allowed == (folder != "features")
        assert not policy.decide(engineer, Action.wrap_key, key).allowed


@pytest.mark.parametrize("role", list(Role))
def test_scope_limits_a_role_to_its_models(policy: Policy, role: Role) -> None:
    """A scope never adds rights, and does not limit other kinds of resources."""
    principal = who(role, "credit")
    for action, models in itertools.product(Action, (None, (), ("loan",), ("other", "loan"), ("other",))):
        scoped = dataclasses.replace(principal, models=models)
        loan = Resource(kind="model", name="loan")
        allowed_by_role = policy.decide(principal, action, loan).allowed
        in_scope = models is None or "loan" in models
        decision = policy.decide(scoped, action, loan)
        assert decision.allowed == (allowed_by_role and in_scope), (action, models)
        assert ("model-out-of-scope" in decision.policies) == (not in_scope)
        view = columns()
        assert policy.decide(scoped, action, view).allowed == policy.decide(principal, action, view).allowed


def test_every_action_is_in_the_table_and_the_schema(policy: Policy) -> None:
    """Fails for a new action without policies, which only the admin could do."""
    assert set(TABLE) | {Action.read_columns} == set(Action)
    for action in Action:
        assert policy.decide(who(Role.admin), action, columns()).allowed, action


def test_supervisor_may_only_restart_serving_models(policy: Policy) -> None:
    """Holds in every environment and for every registrant. The supervisor gets no data and no key."""
    supervisor = who(Role.supervisor, "credit", subject="system:supervisor")
    model = Resource(kind="model", name="m", registered_by="system:supervisor")
    serving = dataclasses.replace(model, serves=True)
    for environment in ("local", "production"):
        for action in Action:
            assert not policy.decide(supervisor, action, model, environment=environment).allowed, action
            serves = policy.decide(supervisor, action, serving, environment=environment)
            assert serves.allowed == (action is Action.restart_serving), action
        other = dataclasses.replace(serving, tenant="other")
        assert not policy.decide(supervisor, Action.restart_serving, other, environment=environment).allowed
    assert not policy.decide(who(Role.ml_engineer), Action.restart_serving, serving).allowed


def test_edge_roles_come_from_the_policies(policy: Policy) -> None:
    """The edge's rules cannot differ from the replica's."""
    assert {action: policy.roles_for(action) for action in EDGE_ACTIONS} == {
        action: TABLE[action] for action in EDGE_ACTIONS
    }
    narrower = Policy.load(
        '@id("no-predictions") forbid (principal in Role::"service", action == Action::"predict", resource);'
    )
    assert narrower.roles_for(Action.predict) == TABLE[Action.predict] - {Role.service}


def test_policies_fit_the_schema_and_have_unique_ids() -> None:
    """Each `forbid` has advice."""
    text = "\n".join(file.read_text() for file in POLICY_FOLDER.glob("*.cedar"))
    assert cedarpy.validate_policies(text, (POLICY_FOLDER / "schema.cedarschema").read_text())
    names = Policy.load().names
    assert len(names) == len(set(names)) == text.count("@id(")
    assert len(names) == text.count("permit (") + text.count("forbid (")
    assert text.count("forbid (") == text.count("@advice(")


names = st.sampled_from(["", "credit", "fraud", "alice", "other", "default", "local", "eu"])
principals = st.builds(
    Principal, subject=names, role=st.sampled_from(Role), purpose=names, expires_at=st.just(0), tenant=names
)
resources = st.builds(
    Resource,
    kind=names,
    name=st.sampled_from(["features/a/b", "models/m", "x"]),
    column_class=st.sampled_from([*COLUMN_CLASSES, "secret"]),
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
def test_added_forbids_never_allow_more(
    policy: Policy,
    narrowed: list[Policy],
    principal: Principal,
    action: Action,
    resource: Resource,
    environment: str,
) -> None:
    """A request that is allowed with further `forbid`s is allowed without them."""
    before = policy.decide(principal, action, resource, environment=environment).allowed
    for narrower in narrowed:
        assert before or not narrower.decide(principal, action, resource, environment=environment).allowed


@settings(max_examples=60, deadline=None)
@given(st.text(), principals, st.sampled_from(Action), resources)
def test_unknown_role_may_do_nothing(
    policy: Policy, role: str, principal: Principal, action: Action, resource: Resource
) -> None:
    """Holds for every name of a role."""
    unknown = dataclasses.replace(principal, role=cast(Role, f"_{role}"), tenant=resource.tenant)
    assert not policy.decide(unknown, action, resource).allowed


def test_column_classes_are_equal_in_policies_key_store_and_definitions() -> None:
    """Cedar text cannot import the list, and feature definitions have their own enum."""
    expected_list = "[" + ", ".join(f'"{name}"' for name in COLUMN_CLASSES) + "]"
    boundaries = (POLICY_FOLDER / "boundaries.cedar").read_text()
    assert f"{expected_list}.contains(resource.column_class)" in boundaries
    assert [sensitivity.value for sensitivity in Sensitivity] == list(COLUMN_CLASSES)


@pytest.mark.parametrize("role", list(Role))
def test_submitters_control_their_own_jobs_only(policy: Policy, role: Role) -> None:
    """The auditor reads all jobs, and the admin controls all. A service or a supervisor has no jobs."""
    mine = Resource(kind="job", name="job-1", registered_by="alice")
    for subject, is_own in (("alice", True), ("bob", False)):
        principal = who(role, subject=subject)
        submits = role in (DE, DS, ML, AP)
        controls = policy.decide(principal, Action.control_jobs, mine).allowed
        assert controls == (role is AD or (is_own and submits))
        assert policy.decide(principal, Action.read_jobs, mine).allowed == (controls or role is AU)
        assert policy.decide(principal, Action.submit_jobs, mine).allowed == (submits or role is AD)


def test_only_scoring_may_write_scores(policy: Policy) -> None:
    """Those who may read predictions read scores. The job may not wrap the keys of the prediction log, so that it
    cannot forge records."""
    key = Resource(kind="key", name="scores/loan/personal", column_class="personal")
    log_key = Resource(kind="key", name="predictions/loan/personal", column_class="personal")
    for role in (Role.data_scientist, Role.ml_engineer):
        scoring = who(role, "credit", entrypoint="jobs.score")
        for action in (Action.create_key, Action.wrap_key):
            assert policy.decide(scoring, action, key).allowed
            assert not policy.decide(who(role, "credit"), action, key).allowed
        assert not policy.decide(scoring, Action.wrap_key, log_key).allowed
    public = dataclasses.replace(key, column_class="public")
    assert not policy.decide(
        who(Role.data_scientist, "credit", entrypoint="jobs.score"), Action.create_key, public
    ).allowed
    for role in Role:
        may = role in (Role.data_scientist, Role.ml_engineer, Role.approver, Role.admin)
        assert policy.decide(who(role, "credit"), Action.unwrap_key, key).allowed == may


def test_a_refusal_names_the_roles_that_may() -> None:
    """So the caller knows whom to ask."""
    view = Resource(kind="feature view", name="income", region="local")
    with pytest.raises(AccessDenied, match=r"Use the role data_engineer or admin, or ask an admin\.$"):
        Policy.load().check(who(Role.data_scientist), Action.apply_definitions, view)
