"""Boundaries that hold for every role, messages of denials, and the loading of policies."""

from __future__ import annotations

import pickle
from typing import cast

import pytest

from cluster.errors import AccessDenied, ConfigError
from cluster.security.authorization import policy as policy_module
from cluster.security.authorization.policy import NOT_EVALUATED, Action, Policy, Resource
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from tests.samples.principals import columns, who

RELEASES = {Action.approve_model, Action.deploy, Action.rollout}


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
    """They also hold for the admin and for every action."""
    resource = Resource(kind="model", name="m", **changes)
    for action in Action:
        decision = policy.decide(who(role, "credit"), action, resource, environment="staging")
        if deciding == "other-region" and action in (Action.read_metadata, Action.read_ledger):
            assert deciding not in decision.policies
        else:
            assert (decision.allowed, decision.policies) == (False, (deciding,)), action


def test_permitted_region_counts_as_own_region() -> None:
    """Only the operator of a process can permit a region; a request cannot."""
    eu, admin = columns(region="eu"), who(Role.admin)

    def reads(policy: Policy, environment: str) -> bool:
        return policy.decide(admin, Action.read_columns, eu, environment=environment).allowed

    assert not reads(Policy.load(region="us"), "staging")
    assert reads(Policy.load(region="us"), "local"), 'the environment "local" has no region'
    assert reads(Policy.load(region="eu"), "staging")
    permitted = Policy.load(region="us", permitted_regions=["eu"])
    assert reads(permitted, "staging")
    assert permitted.roles_for(Action.predict) == Policy.load().roles_for(Action.predict)


@pytest.mark.parametrize("environment", ["production", "prod", "Production", ""])
@pytest.mark.parametrize("action", sorted(RELEASES))
def test_registrant_may_not_release_the_model_in_production(
    policy: Policy, action: Action, environment: str
) -> None:
    """Environments with unknown names refuse it, too. Other known environments allow it."""
    model = Resource(kind="model", name="loan", registered_by="alice")
    for role in (Role.admin, Role.approver):
        decision = policy.decide(who(role), action, model, environment=environment)
        assert (decision.allowed, decision.policies) == (False, ("four-eyes",))
        assert policy.decide(who(role, subject="bob"), action, model, environment=environment).allowed
        for elsewhere in ("local", "test", "staging"):
            assert policy.decide(who(role), action, model, environment=elsewhere).allowed


def test_model_without_registrant_is_not_released_in_production(policy: Policy) -> None:
    """Without a registrant, the four-eyes rule cannot be checked."""
    model = Resource(kind="model", name="m")
    decision = policy.decide(who(Role.approver), Action.deploy, model, environment="production")
    assert (decision.allowed, decision.policies) == (False, ("registrant-unknown",))


def test_admin_needs_a_purpose_except_in_local(policy: Policy) -> None:
    """In the environment "local", the admin owns the keys anyway."""
    admin, listed = who(Role.admin), columns("personal", ("credit",))
    assert policy.decide(admin, Action.read_columns, listed, environment="local").allowed
    for environment in ("test", "staging", "production"):
        decision = policy.decide(admin, Action.read_columns, listed, environment=environment)
        assert (decision.allowed, decision.policies) == (False, ("purpose-not-listed",))


def test_registrant_may_roll_back_in_production(policy: Policy) -> None:
    model = Resource(kind="model", name="loan", registered_by="alice")
    assert policy.decide(who(Role.ml_engineer), Action.rollback, model, environment="production").allowed


def test_ml_engineer_deploys_only_outside_production(policy: Policy) -> None:
    """This is also true for models that another principal registered."""
    model = Resource(kind="model", name="loan", registered_by="alice")
    bob = who(Role.ml_engineer, subject="bob")
    assert policy.decide(bob, Action.deploy, model, environment="staging").allowed
    assert not policy.decide(bob, Action.deploy, model, environment="production").allowed
    assert policy.decide(bob, Action.rollout, model, environment="production").allowed


def test_denial_names_policies_and_advice(policy: Policy) -> None:
    """A default denial says that no policy permits the action."""
    with pytest.raises(
        AccessDenied, match=r"purpose-not-listed.*Use a token for a purpose that the resource lists"
    ):
        policy.check(who(Role.data_scientist, "ads"), Action.read_columns, columns("personal", ("credit",)))
    with pytest.raises(AccessDenied, match=r"auditor may not predict on .*no policy permits it"):
        policy.check(who(Role.auditor), Action.predict, columns())
    assert policy.decide(who(Role.auditor), Action.predict, columns()).policies == ()


def test_unreadable_request_is_denied(policy: Policy) -> None:
    """Cedar skips a `forbid` if an attribute is missing. With the schema, the request is denied instead."""
    king = Principal(subject="a", role=cast(Role, "king"), purpose="credit", expires_at=0)
    no_utf8 = who(Role.admin, subject="\ud800")
    no_text = who(Role.admin, cast(str, 3))
    for principal in (king, no_utf8, no_text):
        decision = policy.decide(principal, Action.read_metadata, columns())
        assert (decision.allowed, decision.policies) == (False, (NOT_EVALUATED,))
    assert not policy.decide(who(Role.admin), cast(Action, "fly"), columns()).allowed


@pytest.mark.parametrize("name", ['a" b', "a\\", "a::b", 'x"}]}', "\n", "*"])
def test_special_characters_in_a_subject_have_no_effect(policy: Policy, name: str) -> None:
    """A subject cannot inject policy or JSON text."""
    model = Resource(kind="model", name=name, registered_by=name)
    decision = policy.decide(who(Role.approver, subject=name), Action.deploy, model, environment="production")
    assert decision.policies == ("four-eyes",)
    other = who(Role.approver, subject="b")
    assert policy.decide(other, Action.deploy, model, environment="production").allowed


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
def test_invalid_policies_are_refused(extra: str) -> None:
    """A missing or duplicate id, a template, and names outside the schema are refused."""
    with pytest.raises(ConfigError):
        Policy.load(extra)


def test_policies_are_parsed_once_per_process() -> None:
    """Each policy object still has its own region."""
    before = policy_module._parse.cache_info().misses
    here, there = Policy.load(region="us"), pickle.loads(pickle.dumps(Policy.load(region="eu")))  # noqa: S301 - our own
    assert policy_module._parse.cache_info().misses <= before + 1
    eu = columns(region="eu")
    assert not here.decide(who(Role.admin), Action.read_columns, eu, environment="staging").allowed
    assert there.decide(who(Role.admin), Action.read_columns, eu, environment="staging").allowed


def test_operator_can_add_policies() -> None:
    """Added permissions stay within the boundaries."""
    policy = Policy.load('@id("auditors-predict") permit (principal in Role::"auditor", action, resource);')
    assert policy.decide(who(Role.auditor), Action.predict, columns()).policies == ("auditors-predict",)
    assert not policy.decide(who(Role.auditor), Action.predict, columns(tenant="other")).allowed


def test_pickled_policy_keeps_its_region_and_additions() -> None:
    """A worker gets the same decisions."""
    extra = '@id("no") forbid (principal, action == Action::"predict", resource);'
    there = pickle.loads(pickle.dumps(Policy.load(extra, region="eu")))  # noqa: S301 - our own
    assert there.decide(who(Role.admin), Action.predict, columns(region="eu")).policies == ("no",)
