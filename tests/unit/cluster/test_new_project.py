"""Tests of `cluster.new_project`: what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cluster.entrypoint import Options
from cluster.new_project.__main__ import main
from jobs.pipeline.config import PipelineConfig
from jobs.schedule.config import ScheduleConfig
from tests.processes.commands import run_main
from tests.servers.small_disk import fill_disk, mounted_small_disk

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "own-project.md"
FILES = {
    "README.md", ".gitignore", "features.py", "data_check.py", "request.sh", "conf/pipeline/machines.yaml",
    "conf/schedule/nightly.yaml", "conf/schedule/monitor.yaml", "data/readings.parquet", "data/failures.parquet",
    "tests/test_project.py",
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*arguments: str) -> str:
    """Return the only line of a refusal."""
    result = run_main(main, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("refused: ")
    return line


def test_two_projects_have_the_same_content(tmp_path: Path) -> None:
    """Data and definitions are the same each time. Missing parents are created, and an empty folder is used."""
    (tmp_path / "empty").mkdir()
    for folder in ("new/deep", "empty"):
        result = run_main(main, str(tmp_path / folder))
        assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "new" / "deep") == contents(tmp_path / "empty")
    assert contents(tmp_path / "empty").keys() == FILES


def test_the_projects_own_tests_pass(tmp_path: Path) -> None:
    """They run without a cluster, in a folder whose name has a space."""
    folder = tmp_path / "my machines"
    assert run_main(main, str(folder)).returncode == 0
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:schemathesis",
        "-p",
        "no:cacheprovider",
        "tests",
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


@pytest.mark.parametrize("name", ["plain", "it's mine", 'a "b" $HOME ${x}', "50%, #1 = ü", "[a]{b}"])
def test_the_configurations_are_found_in_folders_with_odd_names(tmp_path: Path, name: str) -> None:
    """Hydra takes the folder's name literally."""
    assert run_main(main, str(tmp_path / name)).returncode == 0
    conf = str(tmp_path / name / "conf")
    pipeline = Options(config_name="pipeline", schema=PipelineConfig)
    composed = pipeline.compose(["pipeline=machines"], config_dir=conf).pipeline
    assert composed is not None
    assert composed.stages["check"].command == "data_check"
    schedules = Options(config_name="schedules", schema=ScheduleConfig)
    for schedule in ("nightly", "monitor"):
        assert schedules.compose([f"schedule={schedule}"], config_dir=conf).schedule is not None


def test_a_folder_with_a_file_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("mine")
    assert "is not empty; it has '.hidden'" in refused(str(tmp_path))
    assert contents(tmp_path) == {".hidden": b"mine"}


def test_unusable_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    """A file, a folder below a file, a dangling link, an unwritable folder, and names that cannot be printed."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link", Path("/proc/project")):
        assert f"{path} cannot be written: " in refused(str(path))
    assert "cannot be written: File name too long" in refused(str(tmp_path / ("a" * 300)))
    for name in ("", "two\nlines", "\x1b[31m", "\udcff"):
        assert "is no usable name of a folder" in refused(name)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path: Path) -> None:
    with mounted_small_disk(tmp_path / "disk") as disk:
        fill_disk(disk / "filler")
        assert "No space left on device. Nothing was changed." in refused(str(disk / "deep" / "project"))
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_the_files_in_the_guide_fit_the_project(tmp_path: Path) -> None:
    """The guide's definitions can be loaded. It sets all values of the pipeline, and its schedules are valid."""
    assert run_main(main, str(tmp_path / "hotel")).returncode == 0
    pipelines = tmp_path / "hotel" / "conf" / "pipeline"
    blocks = re.findall(
        r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL
    )
    texts = dict(blocks)
    (tmp_path / "guide_features.py").write_text(texts.pop("features.py"))
    spec = importlib.util.spec_from_file_location("guide_features", tmp_path / "guide_features.py")
    assert spec is not None
    assert spec.loader is not None
    features = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(features)
    values = OmegaConf.create(texts.pop("conf/pipeline/hotel.yaml"))["vars"]
    assert values.keys() == OmegaConf.create((pipelines / "machines.yaml").read_text())["vars"].keys()
    assert (features.guests.name, features.cancellation.name) == (values["view"], values["service"])
    assert {values["required"], "days_ahead"} <= features.guests.features.keys()
    for name, text in texts.items():
        (tmp_path / "hotel" / name).write_text(text)
    schedules = Options(config_name="schedules", schema=ScheduleConfig)
    for schedule in ("nightly", "monitor"):
        composed = schedules.compose([f"schedule={schedule}"], config_dir=str(pipelines.parent)).schedule
        assert composed is not None
        assert set(composed.parameters.values()) & {"hotel", values["model"]}
