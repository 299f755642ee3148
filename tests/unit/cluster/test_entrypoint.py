"""How a job starts and ends: exit codes, one-line refusals, help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.entrypoint import job
from cluster.errors import SourceError
from cluster.settings import PlatformConfig
from tests.commands import run_main

PROGRAM = """
from dataclasses import dataclass
from cluster.entrypoint import job
from cluster.errors import SourceError
from cluster.settings import PlatformConfig

@job("platform", PlatformConfig)
def main(config: PlatformConfig) -> None:
    if config.storage.root == "refuse":
        raise SourceError("Source 'a' is empty.\\nGive another.")
    if config.storage.root == "fail":
        raise RuntimeError("boom")
    print("root", config.storage.root)

main()
"""


@job("platform", PlatformConfig)
def nothing(config: PlatformConfig) -> None:
    """A job that ends at once."""


@job("platform", PlatformConfig, timed=True)
def timed(config: PlatformConfig) -> None:
    """A job that says how long it took."""
    print("result")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, program.name, *arguments],
        cwd=program.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_success_is_0_and_leaves_no_files(program: Path) -> None:
    """Hydra's run folder is off."""
    result = run(program, "storage.root=x")
    assert (result.returncode, result.stdout) == (0, "root x\n")
    assert [path.name for path in program.parent.iterdir()] == ["program.py"]


def test_a_refusal_is_2_with_one_line(program: Path) -> None:
    """No traceback, whatever the message's own line breaks."""
    result = run(program, "storage.root=refuse")
    assert result.returncode == 2
    assert result.stderr == "refused: Source 'a' is empty. Give another.\n"


def test_a_failure_is_1_with_its_traceback(program: Path) -> None:
    """What we did not foresee is shown whole."""
    result = run(program, "storage.root=fail")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "boom" in result.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("storage.rot=x", "rot"),
        ("nonsense=1", "nonsense"),
        ("cluster.num_cpus=many", "many"),
        ("cluster.num_cpus=0", "cluster.num_cpus must be at least 1, got 0"),
        ("tier=huge", "huge"),
    ],
)
def test_a_bad_override_is_2_and_names_it(override: str, said: str) -> None:
    """Unknown key, wrong type, out of range, unknown group: each in one line."""
    result = run_main(nothing, override)
    assert result.returncode == 2
    assert result.stderr.startswith("refused: ")
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_help_and_config_are_shown(flags: list[str]) -> None:
    """Both print and exit 0."""
    result = run_main(nothing, *flags)
    assert result.returncode == 0
    assert "storage" in result.stdout


def test_a_folder_with_a_package_of_ours_is_named(program: Path) -> None:
    """A user's own `jobs/` in front of ours is a clear refusal."""
    (program.parent / "jobs").mkdir()
    (program.parent / "jobs" / "__init__.py").touch()
    result = run(program)
    assert result.returncode == 2
    assert "Package 'jobs' is found at" in result.stderr


@job("platform", PlatformConfig)
def in_worker(config: PlatformConfig) -> None:
    """A job that is refused inside a task of Ray's, or inside a worker of Ray Train's."""
    refusal = SourceError("Source 'a' is empty.")
    wrapped = RayTaskError("f", "Traceback …\n  File …", refusal).as_instanceof_cause()
    if config.storage.root == "train":
        raise WorkerGroupError("Traceback …", {0: wrapped})
    raise wrapped


@pytest.mark.parametrize("where", ["task", "train"])
def test_a_refusal_inside_a_worker_is_one_line(where: str) -> None:
    """Without Ray's traceback, and with a refusal's exit code."""
    result = run_main(in_worker, f"storage.root={where}")
    assert (result.returncode, result.stderr) == (2, "refused: Source 'a' is empty.\n")
def test_timed_job_says_how_long_it_took() -> None:
    """On standard error, because standard output is the result."""
    done = run_main(timed)
    assert (done.returncode, done.stdout) == (0, "result\n")
    assert re.fullmatch(r"done in \d+\.\d s\n", done.stderr)
