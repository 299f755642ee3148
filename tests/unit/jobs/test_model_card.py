"""The model card: made from the ledger alone, escaped, and complete also for old events."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelNotFound
from cluster.ledger import Ledger
from cluster.ledger.events import (
    ModelDeployed,
    ModelEvaluated,
    ModelMonitored,
    ModelRegistered,
    ModelReinstated,
    ModelReproduced,
    ModelRetired,
)
from jobs.model_card import __main__ as command
from jobs.model_card.content import Card
from jobs.model_card.history import read_history
from jobs.model_card.pages import render_html, render_markdown
from jobs.model_card.sections import card

METRICS: dict[str, Any] = {
    "rows": 400,
    "auc": 0.81234,
    "accuracy": 0.75,
    "ece": 0.03,
    "brier": 0.16,
    "calibration": [{"lower": 0.1, "upper": 0.2, "rows": 9, "mean_probability": 0.15, "positive_rate": 0.2}],
}


def ledger_with(folder: Path, *events: Any) -> Ledger:
    """Return a ledger with a registered version and more events."""
    ledger = Ledger(f"sqlite:///{folder}/l.db")
    registered = ModelRegistered(
        name="loan",
        version=1,
        family="lightgbm",
        task="binary",
        manifest_hash="m",
        files={"model.txt": "s"},
        lineage={
            "training_set_hash": "f" * 64,
            "table_versions": {"income": 3},
            "service": "credit",
            "service_version": "v" * 20,
            "git_commit": "abc",
            "config": {
                "label": "repaid",
                "split": {"column": "id", "modulo": 4, "remainder": 3},
                "parameters": {"rounds": 40},
            },
            "seed": 7,
        },
        metrics=METRICS,
        warnings=["leak: input 'x' determines label <b>'y'</b>"],
    )
    ledger.append(registered, actor="alice")
    for event in events:
        ledger.append(event, actor="bob")
    return ledger


def evaluated(**changes: Any) -> ModelEvaluated:
    values: dict[str, Any] = {
        "name": "loan",
        "version": 1,
        "data_hash": "d" * 64,
        "rows": 400,
        "metrics": METRICS,
        "slices": {
            "sex": {"f": {"rows": 200, "judged": True, "auc": 0.8}, "m": {"rows": 3, "judged": False}}
        },
        "chosen_rows": "held_out",
        "intervals": {
            "level": 0.95,
            "replicates": 1000,
            "seed": 0,
            "entity_columns": ["id"],
            "entities": 99,
            "metrics": {"auc": [0.7, 0.9], "accuracy": None},
        },
        "fairness": {
            "sex": {
                "groups": {
                    name: {
                        "rows": 200,
                        "positive_rows": 90,
                        "judged": True,
                        "selection_rate": rate,
                        "true_positive_rate": rate,
                    }
                    for name, rate in (("f", 0.5), ("m", 0.6))
                },
                "demographic_parity_difference": 0.1,
                "equal_opportunity_difference": None,
                "demographic_parity_difference_interval": [0.02, 0.2],
                "equal_opportunity_difference_interval": None,
            }
        },
        "threshold": {
            "false_positive": 1.0,
            "false_negative": 5.0,
            "validation_rows": 90,
            "chosen": 0.2,
            "current": 0.5,
            "cost_of_chosen": 0.3,
            "cost_of_current": 0.9,
            "if_calibrated": 1 / 6,
        },
        "attributions": {"method": "tree SHAP", "rows": 400, "inputs": {"income__amount": 0.8, "town": 0.1}},
        "robustness": {
            "metric": "auc",
            "rows": 400,
            "unchanged": 0.81,
            "missing": {"income__amount": 0.5, "town": 0.8},
            "shifted": {"income__amount": 0.7, "town": 0.8},
            "some_missing": {"10%": 0.78, "30%": 0.7},
        },
        "requirements": {"auc": {"bound": 0.9, "rule": "at least", "value": 0.81, "met": False}},
    }
    return ModelEvaluated(**values | changes)


def make(ledger: Ledger) -> Card:
    return card(read_history(ledger, "loan", "latest"))


def test_a_card_has_what_the_ledger_knows(tmp_path: Path) -> None:
    """Both pages have quality with intervals, groups, inputs, monitoring, reproduction, warnings and evidence."""
    monitored = ModelMonitored(
        model="loan",
        variant="champion",
        version=1,
        periods={"2024": {"rows": 500, "estimated_auc": 0.8, "realised_auc": None}},
        drift={"income__amount": ["2024"]},
        inputs={},
        results="r",
        reconstruction=["2024"],
    )
    reproduced = ModelReproduced(
        name="loan",
        version=1,
        copy_name="loan-rebuilt",
        copy_version=1,
        training_set="rebuilt",
        same_files={"model.txt": True},
        largest_difference=0.0,
        metrics={},
        libraries={"numpy": ["1", "2"]},
    )
    deployed = ModelDeployed(name="loan", version=1, variant="champion", app="a", route_prefix="/a")
    ledger = ledger_with(tmp_path, evaluated(), monitored, reproduced, deployed)
    page = make(ledger)
    for text in (render_html(page), render_markdown(page)):
        for expected in (
            "loan version 1",
            "0.8123",
            "0.7 to 0.9",
            "NOT met",
            "Fairness by sex",
            "tree SHAP",
            "0.02 to 0.2",
            "2024",
            "all inputs together",
            "numpy",
            "It is deployed",
            "Evidence",
        ):
            assert expected in text, expected
    html = render_html(page)
    assert html.count("<svg") >= 6
    assert "<b>" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_texts_of_the_ledger_are_no_markup(tmp_path: Path) -> None:
    """A group's name can be any text of the data."""
    hostile = "[x](http://e.vil)<script>|"
    groups = {hostile: {"rows": 200, "judged": True, "auc": 0.8}}
    page = make(ledger_with(tmp_path, evaluated(slices={"sex": groups})))
    assert "<script>" not in render_html(page)
    assert "](http" not in render_markdown(page)


def test_a_card_without_an_evaluation_says_so(tmp_path: Path) -> None:
    """Its metrics are those of training. An old evaluation has no intervals."""
    text = render_markdown(make(ledger_with(tmp_path)))
    assert "Metrics of the training job" in text
    assert "no intervals" in text
    old = ModelEvaluated(
        name="loan", version=1, data_hash="d", rows=9, metrics={"rows": 9, "auc": 0.6}, slices={}
    )
    (tmp_path / "old").mkdir()
    text = render_markdown(make(ledger_with(tmp_path / "old", old)))
    assert "0.6" in text
    assert "no intervals" in text


def test_the_newest_held_out_evaluation_is_the_main_one(tmp_path: Path) -> None:
    """An evaluation on all rows of other data is listed after it."""
    other = evaluated(chosen_rows="all", data_hash="e" * 64, metrics=METRICS | {"auc": 0.55})
    newest = evaluated(metrics=METRICS | {"auc": 0.83})
    text = render_markdown(make(ledger_with(tmp_path, evaluated(), newest, other)))
    quality, others = text.partition("## Other evaluations")[::2]
    assert "0.83" in quality
    assert "0.8123" not in text
    assert "0.55" in others


def test_a_later_run_does_not_hide_what_an_earlier_run_measured(tmp_path: Path) -> None:
    """A gate such as `require.auc=0.8` measures no groups. Both events are named."""
    gate = evaluated(fairness={}, slices={}, threshold={}, metrics=METRICS | {"auc": 0.83})
    text = render_markdown(make(ledger_with(tmp_path, evaluated(), gate)))
    assert "0.83" in text
    assert "Fairness by sex" in text
    assert "From event 2 (ModelEvaluated)." in text
    assert "From events 3 (ModelEvaluated), 2 (ModelEvaluated)." in text


def test_inputs_are_sorted_by_their_attribution(tmp_path: Path) -> None:
    """The ledger sorts keys by name."""
    inputs = {"a": 0.1, "b": 0.3, "c": 0.2}
    attributions = {"method": "tree SHAP", "rows": 9, "inputs": inputs}
    text = render_markdown(make(ledger_with(tmp_path, evaluated(attributions=attributions))))
    assert text.index("| b | 0.3") < text.index("| c | 0.2") < text.index("| a | 0.1")


def test_a_retired_version_is_marked(tmp_path: Path) -> None:
    """Until it is reinstated."""
    ledger = ledger_with(tmp_path, ModelRetired(name="loan", version=1, reason="too old"))
    assert make(ledger).lead.endswith("too old.")
    ledger.append(ModelReinstated(name="loan", version=1, reason="mistake"), actor="bob")
    assert "too old" not in make(ledger).lead


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    """The message names the known ones."""
    with pytest.raises(ModelNotFound, match=r"no version 7\. Known: 1\."):
        read_history(ledger_with(tmp_path), "loan", 7)


def test_the_command_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs no running cluster. Another extension is refused in one line."""
    (tmp_path / ".falaj").mkdir()
    ledger_with(tmp_path / ".falaj").close()
    (tmp_path / ".falaj" / "l.db").rename(tmp_path / ".falaj" / "ledger.db")
    arguments = ["card", "--root", str(tmp_path / ".falaj"), "--model", "loan"]
    outputs = [tmp_path / "cards" / "loan.html", tmp_path / "cards" / "loan.md"]
    monkeypatch.setattr(sys, "argv", [*arguments, *(f"--output={path}" for path in outputs)])
    command.main()
    assert [path.read_text()[:9] for path in outputs] == ["<!doctype", "# loan ve"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output=x.pdf"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "must end with .md or .html" in capsys.readouterr().err
