"""Commands whose options contradict each other: exit code 2, and a message that names the option."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RefusedError, RolloutError
from cluster.ledger import Ledger
from cluster.ledger.events import DeploymentRemoved, LedgerEvent, RolloutWeightChanged, ShadowStarted, Subject
from cluster.security.acting import Actor
from cluster.security.manage_keys import main as manage_keys
from feature_jobs.stream import main as stream
from serve_apps.deploy import DeployConfig
from serve_apps.deploy import main as deploy
from serve_apps.edge.haproxy.routes import routes
from serve_apps.edge.limits import main as limits
from serve_apps.rollout.__main__ import main as rollout
from serve_apps.rollout.__main__ import start
from serve_apps.rollout.assignment import Arm, assign, bounds, mixes_arms
from serve_apps.rollout.comparison.evaluation import describe
from serve_apps.rollout.comparison.guardrail import Finding, Verdict
from serve_apps.rollout.config import RolloutAction, RolloutConfig
from serve_apps.rollout.serving_state import ModelState, read_states
from serve_apps.undeploy import require_number
from tests.processes.commands import run_main
from tests.samples.rollouts import DEPLOYED, STARTED, deployed
from tests.unit.serve_apps.rollout.test_state import fold


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (rollout, "action=promote name=m weight=5", "`weight` means nothing with `action=promote`"),
        (rollout, "action=weight name=m", "Give the new weight"),
        (deploy, "action=restore name=m", "`name` means nothing with `action=restore`"),
        (limits, "action=show principal=a", "`principal` means nothing with `action=show`"),
        (manage_keys, "key=features/v/personal", "`key` means nothing with `action=rotate_kek`"),
        (stream, "view=v kafka.consumers=2", "`kafka` means nothing with `source=push`"),
    ],
)
def test_unused_option_is_refused(
    command: Callable[[], None], words: str, message: str, tmp_path: Path
) -> None:
    """It is refused before anything is done, and without a cluster."""
    result = run_main(command, *words.split(), f"storage.root={tmp_path}")
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.001}, "weight must be 0.01 to 100"),
        ({"weight": 0.015}, "steps of 0.01"),
        ({"weight": 100.01}, "weight must be"),
        ({"share": 0.001}, "share must be"),
        ({"weight": math.nan}, "weight must be 0.01 to 100"),
        ({"weight": math.inf}, "weight must be 0.01 to 100"),
        ({"max_drop": math.nan}, "max_drop must be a finite number"),
        ({"max_drop": -0.1}, "max_drop must be a finite number"),
        ({"variant": "../zz"}, "variant must be"),
        ({"variant": "a|b"}, "variant must be"),
        ({"variant": "shadow"}, "reserved name"),
        ({"variant": "champion"}, "reserved name"),
    ],
)
def test_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    """A weight of less than a bucket would never treat a unit."""
    with pytest.raises(ValueError, match=message):
        RolloutConfig(name="m", **options)


@pytest.mark.parametrize("weight", [0.01, 0.07, 0.29, 33.33, 50, 99.99, 100])
def test_every_whole_number_of_buckets_is_a_weight(weight: float) -> None:
    """Despite floating-point rounding."""
    assert RolloutConfig(name="m", weight=weight, share=weight).weight == weight
    assert bounds(weight).treatment_below == round(weight * 100)


def test_variant_with_invalid_characters_is_refused() -> None:
    """A deployment refuses it, too."""
    with pytest.raises(ValueError, match="variant must be"):
        DeployConfig(variant="a b")


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=6), st.binary(min_size=1, max_size=4))
def test_allowed_weights_never_make_a_treated_unit_control(buckets: list[int], unit: bytes) -> None:
    """For any sequence of weights; a control unit may be treated, which ends the comparison and is remarked."""
    reached, was_treated = 0.0, False
    for weight in (number / 100 for number in buckets):
        if mixes_arms(reached, weight):
            continue
        reached = max(reached, weight)
        arm = assign("salt", unit, bounds(weight))
        assert not (was_treated and arm is Arm.control)
        was_treated |= arm is Arm.treatment


@pytest.mark.parametrize(
    ("reached", "weight", "refused"),
    [(100, 50, True), (60, 45, True), (60, 40, False), (60, 60, False), (50, 1, False), (5, 100, False)],
)
def test_weight_decreases_only_while_the_arms_stay_apart(
    reached: float, weight: float, refused: bool
) -> None:
    """Up to 50 % always."""
    assert mixes_arms(reached, weight) is refused


SERVED: tuple[LedgerEvent, ...] = (
    *(*DEPLOYED, deployed(3), deployed(4), STARTED),
    ShadowStarted(model="m", version=3, app="m-v3", share=1),
)
REMOVED = DeploymentRemoved(name="m", version=4, app="m-v4", reason="old")


def test_state_has_the_greatest_weight() -> None:
    """The greatest weight says which units were ever treated."""
    weights = (RolloutWeightChanged(model="m", rollout="r", weight=weight) for weight in (60, 30))
    running = fold([*SERVED, *weights])["m"].rollout
    assert running is not None
    assert (running.weight, running.reached) == (30, 60)


def test_second_rollout_is_refused_with_the_running_version(tmp_path: Path) -> None:
    """The message says how to end it."""
    config = RolloutConfig(action=RolloutAction.start, name="m", version="5")
    ledger, state = Ledger(f"sqlite:///{tmp_path}/ledger.db"), fold(SERVED)["m"]
    with pytest.raises(RolloutError, match=r"with version 2\. End it first with `action=promote` or"):
        start(config, ledger, cast(Actor, None), state)


def test_removed_version_has_no_application(tmp_path: Path) -> None:
    """It has none until it is deployed again. An older release refuses the event instead of ignoring it."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    for event in (*SERVED, REMOVED):
        ledger.append(event, actor="t")
    state = read_states(ledger)["m"]
    assert state.apps == {1: "m-v1", 2: "m-v2", 3: "m-v3"}
    assert routes({"m": state}, {}).entries["m"].startswith("m-v1|m-v2|")
    assert Subject.serving.includes(REMOVED.type)
    assert fold([*SERVED, REMOVED, deployed(4)])["m"].apps[4] == "m-v4"


@pytest.mark.parametrize(
    ("version", "part"),
    [(1, "the champion"), (2, "the treatment of rollout r"), (3, "the shadow"), (4, None)],
)
def test_usage_of_a_version_is_described(version: int, part: str | None) -> None:
    """Only a version without requests may be removed."""
    state: ModelState = fold(SERVED)["m"]
    assert state.usage_of(version) == part


@pytest.mark.parametrize(
    ("verdict", "treatment", "message"),
    [
        (Verdict.too_few, None, "500 of each are needed"),
        (Verdict.undefined, None, "but roc_auc is undefined if all are of one class"),
        (Verdict.holds, 0.8, "roc_auc 0.800 against 0.900 in control"),
    ],
)
def test_promotion_explains_a_missing_verdict(
    verdict: Verdict, treatment: float | None, message: str
) -> None:
    """Enough outcomes of one class are not too few."""
    finding = Finding(
        verdict=verdict,
        metric="roc_auc",
        treatment=treatment,
        control=0.9,
        treatment_outcomes=400,
        control_outcomes=700,
    )
    words = describe(finding, min_outcomes=500)
    assert message in words
    assert "400 outcomes of the treatment and 700 of the control" in words


@pytest.mark.parametrize("version", ["latest", "champion", "2x"])
def test_removal_needs_a_version_number(version: str) -> None:
    """The meaning of `latest` may change meanwhile."""
    with pytest.raises(RefusedError, match="Give the number"):
        require_number(version)
    require_number("2")
