"""The answers of the scoring client, and the outcomes that are matched with them."""

from __future__ import annotations

import polars as pl
import pytest

from jobs.pipeline.outcomes import OutcomesConfig, match_outcomes
from jobs.pipeline.traffic import Answer, EntityKey, answers_frame, choose_people


@pytest.mark.parametrize("keys", [["B-0249", "B-0250", "B-0251"], [249, 250, 251]])
def test_answers_and_outcomes_are_matched_for_keys_that_are_texts_or_numbers(keys: list[EntityKey]) -> None:
    """Failed requests come first, so nothing can be guessed from the first rows, and they get no outcome."""
    people = pl.DataFrame({"bike_id": keys, "broke_down": [0, 1, 1]})
    chosen = choose_people(people, key="bike_id", offset=0, count=3)
    answers = [Answer(chosen[0], None, None, 503, 1.0)]
    answers += [Answer(key, f"p-{key}", "champion", 200, 2.5) for key in chosen[1:]]
    frame = answers_frame(answers, key="bike_id", key_type=people.schema["bike_id"])
    assert frame["bike_id"].to_list() == chosen
    config = OutcomesConfig(
        name="m",
        answers="a",
        people="b",
        key="bike_id",
        label="broke_down",
        observed_at="2026-11-30T00:00:00Z",
    )
    outcomes = match_outcomes(config, frame, people)
    label = dict(zip(people["bike_id"], people["broke_down"], strict=True))
    assert {one["prediction_id"]: one["outcome"] for one in outcomes} == {
        f"p-{key}": label[key] for key in chosen[1:]
    }


def test_no_answers_give_an_empty_table() -> None:
    """The columns are there, so that the outcomes' command can read the file."""
    frame = answers_frame([], key="bike_id", key_type=pl.String())
    assert frame.columns == ["bike_id", "prediction_id", "variant", "status", "latency_ms"]
    assert frame.is_empty()
