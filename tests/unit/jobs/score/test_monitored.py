"""Monitoring reads the scores of a run by columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from cluster.errors import RefusedError
from cluster.registry import Registry
from cluster.runtime import InputSpec, OutcomeParser, load_model
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.storage import layout
from jobs.monitor.calculation.figures import compute_figures
from jobs.monitor.calculation.frames import build_frames
from jobs.monitor.chunks import CHUNK, assign_chunks
from jobs.monitor.config import MonitorConfig, Period
from jobs.monitor.logged import ScoredLog
from jobs.monitor.reference import References
from jobs.monitor.run import MonitorRun
from jobs.monitor.scored import match_by_id, read_scored
from jobs.train.data import read_training_set
from tests.projects.batch_scoring import MODEL, ScoringProject
from tests.samples.signatures import of_each_task
from tests.unit.jobs.monitor.inline_tasks import InlineRay

INPUTS = (
    InputSpec(name="age", dtype="double"),
    InputSpec(name="sex", dtype="string", categories=("f", "m")),
)
SIGNATURES = of_each_task(*INPUTS)
ROWS = 4000


def people(*, shift: float = 0.0) -> pa.Table:
    """Return rows with inputs, times of two years, and an outcome that depends on the age."""
    draw = np.random.default_rng(1)
    age = draw.normal(40, 20, ROWS)
    at = np.datetime64("2024-06-01", "us") + (np.arange(ROWS) % 2) * np.timedelta64(365, "D")
    return pa.table(
        {
            "person_id": range(ROWS),
            "age": age + shift,
            "sex": draw.choice(["f", "m"], ROWS),
            "event_timestamp": pa.array(at, pa.timestamp("us", "UTC")),
            "truth": np.where(age + draw.normal(0, 5, ROWS) > 45, "yes", "no"),
        }
    )


def read(project: ScoringProject, output: str, **options: Any) -> ScoredLog:
    config = MonitorConfig(
        storage=project.storage,
        name=MODEL,
        reference="r",
        label="truth",
        predictions=str(project.root / output),
        **options,
    )
    return read_scored(config, project.ledger, project.access)


def test_figures_of_scored_rows_are_computed(project: ScoringProject) -> None:
    """Performance with outcomes of a column, and drift: 30 years more are an alert. The scores are encrypted."""
    output = ".falaj/jobs/scores"
    project.register(SIGNATURES.binary)
    project.write(people(shift=30))
    project.score(output=output, keep=["person_id", "truth"], keep_inputs=True, part_rows=1500)
    served = read(project, output, outcome="truth").served
    assert (served.name, served.rows.height, served.failed) == ("batch v1", ROWS, 0)
    version = Registry(project.ledger, layout(project.storage)).get(MODEL, 1)
    model = load_model(version, key_store(project.access))
    chunks = assign_chunks(served.rows, Period.year, min_rows=300)
    assert chunks[CHUNK].unique(maintain_order=True).to_list() == ["2024", "2025"]
    reference = pl.DataFrame(pl.from_arrow(people()))
    figures = compute_figures(
        build_frames(model=model, reference=reference, served=chunks, label="truth"), chunks, min_outcomes=300
    )
    assert figures["drift"]["age"]["2024"]["alert"]
    assert not figures["drift"]["sex"]["2024"]["alert"]
    assert figures["periods"]["2025"]["outcomes"] == ROWS // 2
    assert figures["periods"]["2025"]["realised_auc"] > 0.5


def test_a_run_of_scoring_is_monitored_as_a_whole(
    project: ScoringProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A year is a chunk. The figures have the form of those of the log."""
    InlineRay(monkeypatch)
    project.register(SIGNATURES.binary)
    project.write(people(shift=30))
    project.write(people(), "reference.parquet")
    project.score(keep=["truth"], keep_inputs=True)
    config = MonitorConfig(
        storage=project.storage,
        name=MODEL,
        reference=str(project.root / "reference.parquet"),
        label="truth",
        predictions=str(project.root / "scores"),
        outcome="truth",
        split=None,
    )
    places, files = layout(project.storage), protected_files(project.access)
    run = MonitorRun(
        config=config,
        places=places,
        ledger=project.ledger,
        actor=project.actor(),
        references=References(
            config.reference,
            lambda path: read_training_set(path, files, places=places, ledger=project.ledger),
        ),
        attach=lambda: None,
    )
    figures = run.measure_scores(read_scored(config, project.ledger, project.access)).figures
    assert (figures["status"], figures["rows"], figures["outcomes"]) == ("measured", ROWS, ROWS)
    assert list(figures["periods"]) == ["2024", "2025"]
    assert figures["drift"]["age"]["2025"]["alert"]
    assert set(figures["left_out"].values()) == {0}


def test_all_tasks_are_read_in_the_signatures_types(project: ScoringProject) -> None:
    """Probabilities of a multiclass model by class, and values of a regression."""
    for number, signature in enumerate(SIGNATURES[1:]):
        project.register(signature)
        project.write(people())
        project.score(output=f"scores{number}")
        served = read(project, f"scores{number}").served
        build_frames(
            model=load_model(served.version, key_store(project.access)),
            reference=pl.DataFrame(pl.from_arrow(people())).with_columns(
                pl.lit(1 if signature.classes is None else "a").alias("truth")
            ),
            served=assign_chunks(served.rows, Period.year, min_rows=1),
            label="truth",
        )
        assert served.rows.height == ROWS


def test_outcomes_are_matched_by_id() -> None:
    """A row of an answer other than 0, and a value that is no class, are counted."""
    rows = pl.DataFrame({"prediction_id": ["a", "b", "c"]})
    outcomes = pl.DataFrame(
        {
            "prediction_id": ["c", "a", "b", "z"],
            "row": [0, 0, 1, 0],
            "outcome": ["yes", "odd", "yes", "yes"],
        }
    )
    matched, unknown = match_by_id(rows, outcomes, OutcomeParser(SIGNATURES.binary))
    assert matched["outcome"].to_list() == [None, None, "yes"]
    assert matched["odd_outcome"].to_list() == [True, False, False]
    assert unknown == 1


def test_changed_or_unfinished_scores_are_refused(project: ScoringProject) -> None:
    """A changed file, a changed manifest, and a folder without one."""
    project.register(SIGNATURES.binary)
    project.write(people())
    project.score()
    folder = project.root / "scores"
    file = next(folder.glob("part-*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(RefusedError, match="was changed since the run"):
        read(project, "scores")
    file.write_bytes(whole)
    manifest = folder / "_manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"rows": 4000', '"rows": 4001'))
    with pytest.raises(RefusedError, match="ledger has no finished run"):
        read(project, "scores")
    manifest.unlink()
    with pytest.raises(RefusedError, match="so it is no finished run of"):
        read(project, "scores")
