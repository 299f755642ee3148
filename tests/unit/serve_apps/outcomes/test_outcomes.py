"""`POST /v1/outcomes` accepts only outcomes that the model can predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.records.reading import count_records, read_outcomes
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.keys.access import key_store
from tests.servers.replica import MODEL, Replica, running_replica

FLAGS = ModelSignature(
    task=Task.binary, inputs=(InputSpec(name="x", dtype="double"),), label="y", classes=(False, True)
)
WORDS = dataclasses.replace(FLAGS, task=Task.multiclass, classes=("high", "low", "mid"))


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with running_replica(tmp_path_factory.mktemp("replica"), FLAGS) as running:
        yield running.at_outcomes


def post(replica: Replica, *outcomes: Any, prediction_id: str = "p") -> tuple[int, dict[str, Any]]:
    items = [
        {"prediction_id": prediction_id, "row": row, "outcome": outcome}
        for row, outcome in enumerate(outcomes)
    ]
    return replica.json("/v1/outcomes", {"model": MODEL, "outcomes": items})


def folder(replica: Replica) -> Path:
    return Path(replica.places.outcomes(MODEL))


@pytest.mark.parametrize("wrong", ["true", "yes", 2, 0.5, "1"])
def test_impossible_outcome_is_refused_by_field(replica: Replica, wrong: object) -> None:
    """Nothing of the request is written; the message names what is accepted."""
    before = count_records(folder(replica))
    status, content = post(replica, True, wrong)
    assert (status, content["code"]) == (400, 400)
    assert "outcomes[1].outcome must be one of the model's classes False, True, got" in content["error"]
    assert count_records(folder(replica)) == before


def test_outcome_is_stored_as_its_class(replica: Replica) -> None:
    """A later outcome of the same prediction replaces it."""
    store = key_store(replica.keys)
    for sent, expected in (([1, 0.0], [True, False]), ([False, True], [False, True])):
        assert post(replica, *sent, prediction_id="again") == (200, {"accepted": 2})
        known = read_outcomes(folder(replica), store).filter(prediction_id="again")
        assert known.sort("row")["outcome"].to_list() == expected


def test_outcome_may_be_of_any_version(tmp_path: Path) -> None:
    """Of a version registered since, and of the old one, whose predictions still get outcomes."""
    with running_replica(tmp_path, FLAGS) as running:
        replica = running.at_outcomes
        assert post(replica, "low")[0] == 400
        replica.register(WORDS)
        assert post(replica, "low", True)[0] == 200
        expected = "'high', 'low', 'mid' or one of the model's classes False, True"
        assert expected in post(replica, "x")[1]["error"]


def test_outcomes_of_an_unknown_model_are_404(replica: Replica) -> None:
    body = {"model": "other", "outcomes": [{"prediction_id": "p", "outcome": 1}]}
    assert replica.json("/v1/outcomes", body)[0] == 404
