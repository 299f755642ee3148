"""The demo's report: self-contained, correct, and complete even if figures are missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.pipeline.report import formats
from jobs.pipeline.report.charts import Dots, dot_chart, nice_ticks
from jobs.pipeline.report.figures import (
    drift_rows,
    joint_drift,
    ranked_inputs,
    share_rows,
    split_interval,
    unusual_hours,
)
from jobs.pipeline.report.page import DemoReport, StageRun, render

VOID = {"meta", "br", "img", "link", "input", "hr"}


def summary(**changes: Any) -> dict[str, Any]:
    """Return the summary of a successful run."""
    year = {"estimated_auc": 0.9041, "realised_auc": 0.9076, "rows": 3203, "outcomes": 3203}
    return {
        "rows": {"person": {"ingested": 1100, "stored": 1075, "quarantined": 25}},
        "training_set": {"rows": 68785, "hash": "9f2c1e7a"},
        "variants": {
            "champion": {"family": "lightgbm", "version": 1, "auc": 0.9043, "accuracy": 0.8312},
            "challenger": {"family": "tabular_network", "version": 2, "auc": 0.902, "accuracy": 0.8287},
            "broken": {"family": "lightgbm", "version": 3, "auc": 0.5033, "accuracy": 0.517},
        },
        "requests": {"sent": 16000, "errors": 0, "p50_ms": 6.42, "p99_ms": 21.7},
        "shares": {
            "champion": {"weight": 0.8, "share": 0.8024},
            "challenger": {"weight": 0.2, "share": 0.1976},
        },
        "prediction_log_rows": 16002,
        "orphans": 2,
        "monitor": {"champion": {"2016": year}, "challenger": {"2016": year | {"realised_auc": None}}},
        "rollback_ms": 143.2,
        "ledger": {"events": 74, "verified": True},
        "seconds": {"source": 3.2, "train_network": 83.4},
    } | changes


def measure(value: float, upper: float, alert: bool) -> dict[str, Any]:
    return {"value": value, "lower_threshold": None, "upper_threshold": upper, "alert": alert}


MORE_MONITORING: dict[str, Any] = {
    "ranking": [
        {"column": "person__AGEP", "alerts": 3, "kinds": ["drift", "missing"], "chunks": ["2016"], "worst": 1.2},
        {"column": "_score", "alerts": 1, "kinds": ["drift"], "chunks": ["2017"], "worst": 1.1},
    ],
    "reconstruction": {"2016": measure(1.01, 1.05, False), "2017": measure(1.093, 1.05, True)},
    "traffic": {
        "requests": {"2026-11-30T09": measure(20, 90.4, False), "2026-11-30T10": measure(300, 90.4, True)},
        "refused": {"2026-11-30T10": measure(0.31, 0.05, True)},
        "unseen": {},
    },
}  # fmt: skip
"""What releases before the figures of this kind did not have."""


def full_report() -> DemoReport:
    """Return a report with everything that the page can show."""
    bins = [{"mean_probability": rate, "positive_rate": rate, "rows": 10} for rate in (0.1, 0.5, 0.9)]
    evaluation = {
        "metrics": {"ece": 0.0081, "brier": 0.118, "rows": 17196, "calibration": bins},
        "slices": {"person__SEX": {"1": {"rows": 8123, "auc": 0.912}, "2": {"rows": 9, "judged": False}}},
    }
    drift = {"person__AGEP": {"2017": {"value": 0.0807, "upper_threshold": 0.0659, "alert": True}}}
    return DemoReport(
        summary=summary(),
        stages=[StageRun(name="train", title="Train", seconds=83.4, commands=["python -m jobs.train seed=1"])],
        evaluations={"champion": evaluation, "challenger": evaluation},
        monitor={
            "variants": {"champion": {"2016": {"estimate": {"lower": 0.897, "upper": 0.911}}}},
            "details": {"champion": {"drift": drift} | MORE_MONITORING},
        },
        quarantine={"person": {"AGEP outside 0 to 120": 25}},
        check={
            "verdict": "breached", "treatment": 0.497, "control": 0.908, "treatment_outcomes": 402,
            "control_outcomes": 389,
        },
        urls={"Edge": "https://127.0.0.1:8443"},
        finished_at="23 November 2026",
    )  # fmt: skip


class Page(HTMLParser):
    """Parser that checks the nesting of tags, and collects links, ids, tags and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def page_text(html: str) -> str:
    """Return the text of a page with single spaces."""
    return " ".join(Page(html).text.split())


def test_page_is_valid_and_loads_nothing() -> None:
    """Tags nest, ids are unique, and the only link is the one from the report."""
    html = render(full_report())
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert page.links == ["https://127.0.0.1:8443"]
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"url\((?!#tip\))|@import", html)


def test_every_chart_is_valid_xml_with_a_label() -> None:
    """A browser accepts broken SVG, but other readers of the page do not."""
    charts = re.findall(r"<svg.*?</svg>", render(full_report()), flags=re.DOTALL)
    roots = [ElementTree.fromstring(chart) for chart in charts]  # noqa: S314 - our own output
    assert len(roots) >= 6
    assert all("aria-label" in root.attrib or root.get("aria-hidden") == "true" for root in roots)


@pytest.mark.parametrize(
    "figure",
    ["68,785", "9f2c1e7a", "0.9043", "0.0081", "16,000", "6.4 ms", "143 ms", "74 events", "AGEP outside 0 to 120",
     "0.497", "402 and 389", "1 min 23 s", "python -m jobs.train seed=1", "no outcomes", "80.2%", "0.081"],
)  # fmt: skip
def test_page_shows_the_figures_of_the_run(figure: str) -> None:
    """Each figure is formatted for readers."""
    assert figure in page_text(render(full_report()))


def test_missing_parts_are_left_out() -> None:
    """An empty summary gives a page without sections. A summary without further outputs is enough."""
    assert "<h2" not in render(DemoReport(summary={})).replace('<h2 id="loop">', "")
    page = page_text(render(DemoReport(summary=summary())))
    assert "train network" in page
    assert "Why rows were quarantined" not in page
    assert "Inputs with the largest drift" not in page


def test_page_shows_errors() -> None:
    """Lost rows, failed requests, answers without a log row, a wrong split and a broken chain."""
    bad = summary(
        rows={"person": {"ingested": 10, "stored": 8, "quarantined": 1}},
        requests={"sent": 100, "errors": 3},
        prediction_log_rows=90,
        orphans=0,
        shares={"champion": {"weight": 0.8, "share": 0.5}},
        ledger={"events": 7, "verified": False},
    )
    html = render(DemoReport(summary=bad))
    page = page_text(html)
    assert '<strong class="bad">no</strong>' in html
    assert "<dd>97</dd>" in html
    assert "of 100 sent, 3 errors" in page
    assert "The log has 90 rows for 97 answers." in page
    assert "outside" in page
    assert "The chain is broken." in page
    assert "hash chain BROKEN" in page


def test_text_from_data_is_escaped() -> None:
    """Names and reasons can contain HTML."""
    evil = "<script>alert(1)</script>"
    report = DemoReport(
        summary=summary(
            variants={evil: {"family": evil, "version": 1, "auc": 0.9, "accuracy": 0.8}},
            shares={evil: {"weight": 0.5, "share": 0.5}},
            monitor={evil: {evil: {"estimated_auc": 0.9, "realised_auc": 0.9}}},
        ),
        evaluations={evil: {"slices": {evil: {evil: {"rows": 60, "auc": 0.9}}}, "metrics": {}}},
        quarantine={evil: {evil: 1}},
        stages=[StageRun(name=evil, title=evil, seconds=1, commands=[evil])],
    )
    assert "script" not in Page(render(report)).tags


@given(low=st.floats(0, 1), span=st.floats(1e-4, 1))
def test_ticks_cover_the_range(low: float, span: float) -> None:
    """No point is drawn outside the axes."""
    ticks = nice_ticks(low, low + span)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= low + span - 1e-9
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)


def test_split_interval_contains_99_percent_of_correct_splits() -> None:
    """Compared with simulated splits."""
    lower, upper = split_interval(0.2, 12_000)
    shares = np.random.default_rng(0).binomial(12_000, 0.2, size=20_000) / 12_000
    inside = float(((shares >= lower) & (shares <= upper)).mean())
    assert inside == pytest.approx(0.99, abs=0.003)
    assert split_interval(0.2, 0) == (0.0, 1.0)


def test_share_outside_its_interval_is_marked() -> None:
    """With 12,000 requests and a weight of 80%, a share of 80.2% is inside and 82% is outside."""
    shares = {"a": {"weight": 0.8, "share": 0.802}, "b": {"weight": 0.8, "share": 0.82}}
    assert [row.within for row in share_rows(shares, 12_000)] == [True, False]


def test_drift_is_ordered_by_distance_over_threshold() -> None:
    """The largest drift comes first, in its worst period. Columns without a value are left out."""
    drift = {
        "calm": {"2016": {"value": 0.05, "upper_threshold": 0.1, "alert": False}},
        "moved": {
            "2016": {"value": 0.02, "upper_threshold": 0.03, "alert": False},
            "2017": {"value": 0.06, "upper_threshold": 0.03, "alert": True},
        },
        "unknown": {"2016": {"value": None, "upper_threshold": 0.03, "alert": False}},
    }
    rows = drift_rows({"details": {"champion": {"drift": drift}}})
    assert [(row.name, row.period, list(row.alerts)) for row in rows] == [
        ("moved", "2017", ["2017"]),
        ("calm", "2016", []),
    ]


def test_monitoring_shows_ranked_inputs_joint_drift_and_unusual_traffic() -> None:
    """Hours without an alert are left out. Results of an older release have none of the three parts."""
    details = {"details": {"champion": MORE_MONITORING}}
    assert [(row.name, row.alerts, row.reasons) for row in ranked_inputs(details)] == [
        ("person__AGEP", 3, "drift, nulls"),
        ("the model's own score", 1, "drift"),
    ]
    assert [(row.period, row.alert) for row in joint_drift(details)] == [("2016", False), ("2017", True)]
    assert [(row.kind, row.hour, row.value, row.usual) for row in unusual_hours(details)] == [
        ("number of requests", "2026-11-30T10", "300", "0 to 90"),
        ("requests without an answer", "2026-11-30T10", "31.0%", "0.0% to 5.0%"),
    ]
    old = {"details": {"champion": {"drift": {}}}}
    assert ranked_inputs(old) == joint_drift(old) == unusual_hours(old) == []
    page = render(full_report())
    for title in ("Inputs with most alerts", "Drift of all inputs together", "Unusual traffic"):
        assert title in page


def test_chart_without_values_is_empty() -> None:
    """Axes without points would be useless."""
    assert dot_chart([Dots(label="a", values=[None])], label="x", number=formats.score) == ""


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (formats.seconds(4.25), "4.2 s"),
        (formats.seconds(59.6), "1 min 0 s"),
        (formats.milliseconds(6.42), "6.4 ms"),
        (formats.milliseconds(1500), "1.5 s"),
        (formats.points(-0.0024), "−0.2 pp"),
        (formats.points(0.0001), "0 pp"),
        (formats.score(None), "–"),
        (formats.count(0, "error"), "no errors"),
        (formats.count(1, "error"), "1 error"),
        (formats.count(1200, "error"), "1,200 errors"),
    ],
)
def test_numbers_are_formatted(actual: str, expected: str) -> None:
    """For readers of the report."""
    assert actual == expected
