"""The search space of a sweep: what is accepted, what is refused, and what is drawn from it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from jobs.sweep.space import Choices, Range, Space, draw, parse_space
from jobs.train.families import resolve_family
from tests.samples import frozen_network
from tests.unit.jobs.test_defaults import composed

LIGHTGBM = {"family": "lightgbm"}


def parsed(space: dict[str, Any], model: dict[str, Any] = LIGHTGBM) -> Space:
    return parse_space(space, model, resolve_family(model))


@pytest.mark.parametrize("family", ["lightgbm", "tabular_network", "ft_transformer"])
def test_each_family_has_a_space(family: str) -> None:
    """`model=` selects it. All its bounds are accepted by the family."""
    config = composed("sweep", f"model={family}")
    model = config["model"] | config["sweep"]["model"]
    assert parsed(config["sweep"]["space"], model).keys() >= {"learning_rate"}


def test_a_family_of_ones_own_has_a_space() -> None:
    """The hyper-parameters are those of its module. The type decides whether values are whole numbers."""
    model = {"family": "mine", "module": frozen_network.__name__}
    space = parsed({"epochs": {"from": 1, "to": 3}, "learning_rate": {"from": 1e-3, "to": 0.1}}, model)
    assert space["epochs"] == Range(low=1, high=3, is_log=False, is_whole=True)
    assert space["learning_rate"] == Range(low=1e-3, high=0.1, is_log=False, is_whole=False)


def test_an_optional_whole_number_is_whole() -> None:
    """`batch_size` is `int | None`."""
    space = parsed({"batch_size": {"from": 16, "to": 64, "log": True}}, {"family": "tabular_network"})
    assert space["batch_size"] == Range(low=16, high=64, is_log=True, is_whole=True)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "sweep.space is empty"),
        ({"learnin_rate": {"from": 0.1, "to": 0.2}}, "no hyper-parameter 'learnin_rate'.*'learning_rate'"),
        ({"width": {"choices": [64]}}, "family 'lightgbm' has no hyper-parameter 'width'"),
        ({"learning_rate": 0.1}, "sweep.space.learning_rate must be"),
        ({"learning_rate": {"from": 0.1}}, "got the keys from"),
        ({"learning_rate": {"from": 0.1, "to": 0.2, "step": 1}}, "got the keys from, to, step"),
        ({"learning_rate": {"from": 0.2, "to": 0.1}}, "from must not be above"),
        ({"learning_rate": {"from": "a", "to": 0.1}}, "from must be a number, got 'a'"),
        ({"learning_rate": {"from": 0.1, "to": float("inf")}}, "to must be a number"),
        ({"learning_rate": {"from": 0.1, "to": 2.0}}, "2.0 is refused: model.learning_rate must be between"),
        ({"learning_rate": {"from": 0.0, "to": 0.5, "log": True}}, "log=true needs a positive"),
        ({"learning_rate": {"from": 0.1, "to": 0.5, "log": "yes"}}, "log must be true or false"),
        ({"num_leaves": {"from": 2.5, "to": 8}}, "from must be a whole number, got 2.5"),
        ({"num_leaves": {"choices": []}}, "choices must be a list with at least one value"),
        ({"num_leaves": {"choices": [8, 8]}}, "must be different numbers"),
        ({"num_leaves": {"choices": [[8]]}}, "must be different numbers"),
        ({"num_leaves": {"choices": ["many"]}}, "sweep.space.num_leaves: many is refused"),
    ],
)
def test_a_wrong_space_is_refused(space: dict[str, Any], message: str) -> None:
    """The message names the hyper-parameter and what is wrong."""
    with pytest.raises(ConfigError, match=message):
        parsed(space)


@given(st.integers(0, 2**31 - 1), st.integers(1, 1000))
def test_draws_are_inside_and_depend_on_seed_and_number_only(seed: int, trial: int) -> None:
    """So a sweep that continues draws the same parameters."""
    space: Space = {
        "a": Range(low=1e-4, high=1e-2, is_log=True, is_whole=False),
        "b": Range(low=2, high=5, is_log=True, is_whole=True),
        "c": Range(low=-1, high=1, is_log=False, is_whole=True),
        "d": Choices(values=("x", None, 3)),
    }
    drawn = draw(space, seed=seed, trial=trial)
    assert drawn == draw(space, seed=seed, trial=trial)
    assert 1e-4 <= drawn["a"] <= 1e-2
    assert drawn["b"] in range(2, 6)
    assert drawn["c"] in (-1, 0, 1)
    assert drawn["d"] in ("x", None, 3)


def test_all_whole_numbers_are_drawn() -> None:
    """Also the bounds."""
    for is_log in (False, True):
        space: Space = {"n": Range(low=1, high=4, is_log=is_log, is_whole=True)}
        assert {draw(space, seed=0, trial=trial)["n"] for trial in range(100)} == {1, 2, 3, 4}
