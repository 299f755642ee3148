"""A run is killed at any moment and started again: each row is in the output exactly once."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RefusedError
from cluster.ledger.events import ScoringFinished, ScoringStarted
from jobs.score import files
from jobs.score.config import InputFormat
from jobs.score.lock import run_lock
from jobs.score.source import InputFile, Source, parts_of
from tests.projects.batch_scoring import ScoringProject
from tests.unit.jobs.score.test_scores import SIGNATURES, people


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Let the `moment`-th write of a file end the run, before or after it has written."""
    count = 0
    command = importlib.import_module("jobs.score.__main__")
    write_bytes, write_parquet = files.write_bytes, files.write_parquet

    def counted(write: Any) -> Any:
        def write_or_die(first: Any, second: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment and moment % 2:
                raise Killed
            result = write(first, second)
            if count == moment:
                raise Killed
            return result

        return write_or_die

    for module in (files, command):
        monkeypatch.setattr(module, "write_bytes", counted(write_bytes))
    monkeypatch.setattr(files, "write_parquet", counted(write_parquet))


def test_a_run_continues_after_a_kill_at_every_write(
    project: ScoringProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was written when it was killed, the scores are those of a run that was not, and each row is there
    once."""
    project.register(SIGNATURES.binary)
    project.write(people(), row_group_size=100)
    project.score(part_rows=100, output="whole")
    expected = project.scores("whole").drop("prediction_id", "time", "as_of")
    for moment in range(1, 13):
        output = f"killed at {moment}"
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                project.score(part_rows=100, output=output)
        project.score(part_rows=100, output=output)
        assert project.scores(output).drop("prediction_id", "time", "as_of").equals(expected), moment
        assert len(list((project.root / output).glob("part-*"))) == 5
        rows = pl.scan_parquet(project.root / output / "part-*.parquet").select(pl.len()).collect().item()
        assert rows == 500
    assert len(list(project.ledger.entries(ScoringStarted))) == 13
    assert len(list(project.ledger.entries(ScoringFinished))) == 13


def test_parts_that_are_done_are_not_written_again(
    project: ScoringProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed writes only the missing parts. A finished run writes nothing."""

    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (project.root / "scores").glob("part-*")}

    project.register(SIGNATURES.binary)
    project.write(people(), row_group_size=100)
    with monkeypatch.context() as patch:
        kill_at(patch, 6)  # the run's name, then rows and result of parts 0 and 1, then rows of part 2
        with pytest.raises(Killed):
            project.score(part_rows=100)
    killed = times()
    assert len(killed) == 3
    finished = project.score(part_rows=100)
    whole = times()
    kept = {name for name, time in killed.items() if whole[name] == time}
    assert kept == {"part-00000-00000.parquet", "part-00001-00000.parquet"}
    assert project.score(part_rows=100) == finished
    assert times() == whole


def test_an_empty_output_gets_a_new_run(project: ScoringProject) -> None:
    """A pipeline moves a stage's earlier output aside. The same command then scores again, under a new id. An id that
    the caller gave is not used again."""
    project.register(SIGNATURES.binary)
    project.write(people())
    first = project.score()
    shutil.move(project.root / "scores", project.root / "aside")
    second = project.score()
    assert second.run == f"{first.run}-2"
    assert project.scores()["probability"].equals(project.scores("aside")["probability"])
    project.score(output="named", run="nightly")
    shutil.rmtree(project.root / "named")
    with pytest.raises(RefusedError, match=r"Run 'nightly' is finished, and its output .* is gone"):
        project.score(output="named", run="nightly")


def test_other_settings_under_an_id_are_refused(project: ScoringProject) -> None:
    """The message names the setting. Changed rows are refused, too."""
    project.register(SIGNATURES.binary)
    project.write(people())
    project.score(run="nightly-7")
    project.register(SIGNATURES.binary)
    for options, name in (
        ({"version": "2"}, "version=1"),
        ({"version": "1", "keep": ["note"]}, "keep="),
        ({"version": "1", "part_rows": 7}, "part_rows=250000"),
    ):
        with pytest.raises(RefusedError, match=f"Run 'nightly-7' was started with {name}"):
            project.score(run="nightly-7", **options)
    project.write(people(seed=1))
    with pytest.raises(RefusedError, match="was started with input_hash="):
        project.score(run="nightly-7", version="1")


def test_two_commands_do_not_work_on_one_run(project: ScoringProject, tmp_path: Path) -> None:
    """The second one is refused while the first one runs, and not after its kill."""
    code = (
        "import sys; from pathlib import Path; from jobs.score.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1]), 'r'):\n    print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(  # it ends with this process, because its input ends then
        [sys.executable, "-c", code, str(tmp_path / "runs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with (
        pytest.raises(RefusedError, match="Another command works on run 'r'"),
        run_lock(tmp_path / "runs", "r"),
    ):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with run_lock(tmp_path / "runs", "r"):
        pass


@given(
    groups=st.lists(st.lists(st.integers(0, 50), max_size=6), min_size=1, max_size=4),
    part_rows=st.integers(1, 60),
)
def test_parts_cover_each_row_once(groups: list[list[int]], part_rows: int) -> None:
    """No part has more rows than allowed, and the parts are in the order of the rows."""
    listed, first = [], 0
    for number, sizes in enumerate(groups):
        listed.append(InputFile(path=f"{number}", rows=sum(sizes), first_row=first, row_groups=tuple(sizes)))
        first += sum(sizes)
    source = Source(uri="x", format=InputFormat.parquet, files=tuple(listed), schema=pa.schema([]))
    parts = parts_of(source, part_rows)
    covered = [row for part in parts for row in range(part.first_row, part.first_row + part.rows)]
    assert covered == list(range(first))
    assert all(part.rows <= part_rows for part in parts)
    for part in parts:
        sizes = [groups[int(part.file.path)][number] for number in part.row_groups or ()]
        assert part.skip + part.rows <= sum(sizes)
        assert part.skip == 0 or len(sizes) == 1
