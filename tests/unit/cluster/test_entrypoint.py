"""Tests of starting and ending a command: exit codes, one-line refusals, help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.command_line import quote_texts
from cluster.entrypoint import RESULT_VARIABLE, Options, introduction, job
from cluster.errors import ConfigError, SourceError, TrainingFailed
from cluster.settings import PlatformConfig
from feature_jobs.training_set import TrainingSetConfig
from tests.processes.commands import run_main

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
    """End at once."""


@job("platform", PlatformConfig, timed=True)
def timed(config: PlatformConfig) -> None:
    """Print a result, with timing."""
    print("result")


@dataclass(kw_only=True, slots=True)
class TextConfig(PlatformConfig):
    """A configuration with text options."""

    text: str = ""
    texts: list[str] = field(default_factory=list)
    table: dict[str, str] = field(default_factory=dict)
    maybe: str | None = None


@job("platform", TextConfig)
def print_texts(config: TextConfig) -> None:
    """Print the text options as JSON."""
    print(json.dumps([config.text, config.texts, config.table, config.maybe]))


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


def test_success_exits_with_0_and_leaves_no_files(program: Path) -> None:
    """Hydra's run folder is off."""
    result = run(program, "storage.root=x")
    assert (result.returncode, result.stdout) == (0, "root x\n")
    assert [path.name for path in program.parent.iterdir()] == ["program.py"]


def test_refusal_exits_with_2_and_prints_one_line(program: Path) -> None:
    """Line breaks in the message are removed, and there is no traceback."""
    result = run(program, "storage.root=refuse")
    assert result.returncode == 2
    assert result.stderr == "refused: Source 'a' is empty. Give another.\n"


def test_failure_exits_with_1_and_its_traceback(program: Path) -> None:
    result = run(program, "storage.root=fail")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "boom" in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("storage.rot=x", "rot"),
        ("nonsense=1", "nonsense"),
        ("cluster.num_cpus=it's", "`cluster.num_cpus=it's` is not a valid `key=value`"),
        ("nonsense", "`nonsense` is not a valid `key=value`"),
        ("cluster.num_cpus=many", "many"),
        ("cluster.num_cpus=0", "cluster.num_cpus must be at least 1, got 0"),
        ("tier=huge", "huge"),
        (
            "storag.root=x",
            "refused: No option 'storag.root'. Did you mean 'storage.root'? `--help` lists the options.\n",
        ),
        ("model.learnig_rate=1", "refused: No option 'model.learnig_rate'. `--help` lists the options.\n"),
        ("zzz=1", "refused: No option 'zzz'. `--help` lists the options.\n"),
        (
            "tier=smb",
            "refused: Option 'tier' has no choice 'smb'. Did you mean 'smb_cpu'? Known: enterprise_gpu, smb_cpu.\n",
        ),
    ],
)
def test_bad_override_exits_with_2_and_is_named(override: str, message: str) -> None:
    """Unknown key, wrong type, out of range, unknown group: one line each, without Hydra's advice to use `+`."""
    result = run_main(nothing, override)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith("refused: ")
    assert message in result.stderr


@dataclass(kw_only=True, slots=True)
class ModelConfig(PlatformConfig):
    """A configuration with a section whose options are in `configs/model/`."""

    model: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize("override", ["versions={income: 1}", "versions.income=1"])
def test_entry_of_a_table_is_added_with_a_plus(override: str) -> None:
    """Before, the message was: No option 'versions'. Did you mean 'versions'?"""
    options = Options(config_name="training_set", schema=TrainingSetConfig)
    needed = ["service=s", "entities=e", "output=o"]
    with pytest.raises(ConfigError, match=r"Option 'versions' has no such entries.*`\+versions\.NAME=VALUE`"):
        options.compose([*needed, override])
    assert options.compose([*needed, f"+{override}"]).versions == {"income": 1}


@job("train", ModelConfig)
def train(config: ModelConfig) -> None:
    """End at once."""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.learnig_rate=1", "No option 'model.learnig_rate'. Did you mean 'model.learning_rate'?"),
        (
            "model=lightgmb",
            "Option 'model' has no choice 'lightgmb'. Did you mean 'lightgbm'? Known: decoder, ft_transformer, "
            "lightgbm, tabular_network.",
        ),
    ],
)
def test_bad_option_of_a_model_is_answered_with_the_nearest(override: str, message: str) -> None:
    """The options of a model are those of the files in its group."""
    result = run_main(train, override)
    assert result.returncode == 2
    assert message in result.stderr


def test_help_of_a_cluster_command_explains_the_platforms_options() -> None:
    """Its own file has no options."""
    assert "replicas: 30000      # first of 1,000" in introduction("Start.", "cluster")


def test_text_values_are_taken_literally() -> None:
    """Hydra and YAML do not convert them. `null` is None only for an option that may be None."""
    texts = ["nan", "null", "true", "1e5", "on", "0x10", "1_000", "it's", 'a "b"', "a, b"]
    texts += ["[", "{a:1}", "a\\", "${x", "#", " a", "a=b"]
    words = [f"+table.k{place}={text}" for place, text in enumerate(texts)]
    result = run_main(print_texts, *words, "+texts=[nan, null,1e5,a b]", "+text=null", "+maybe=null")
    assert result.returncode == 0, result.stderr
    text, listed, table, maybe = json.loads(result.stdout)
    assert list(table.values()) == texts
    assert (text, listed, maybe) == ("null", ["nan", "null", "1e5", "a b"], None)


@pytest.mark.parametrize(
    "word",
    [
        *("storage.root='nan'", 'storage.root="a b"', "storage.root=${oc.env:HOME}", "storage.root="),
        *("ledger.url=null", "cluster.num_cpus=2", "tier=smb_cpu", "online=redis", "cluster.unknown=it's"),
        *("~storage.root", "--cfg", "hydra.verbose=true"),
    ],
)
def test_hydra_syntax_is_not_quoted(word: str) -> None:
    """Quoted strings, interpolations, null for an optional option, and options that are not text."""
    assert quote_texts([word], PlatformConfig) == [word]
    assert quote_texts(["storage.root=a,b", "-m"], PlatformConfig) == ["storage.root=a,b", "-m"]


def test_config_is_shown_and_exits_with_0() -> None:
    result = run_main(nothing, "--cfg", "job")
    assert (result.returncode, "storage" in result.stdout) == (0, True)


def test_help_starts_with_the_command_and_its_own_options() -> None:
    """The module's docstring and the commented options come before Hydra's help."""
    result = run_main(nothing, "--help")
    assert result.returncode == 0
    assert __doc__ is not None
    assert result.stdout.startswith(__doc__)
    option = result.stdout.index("checkpoint_every: 50   # events between two signed checkpoints")
    assert option < result.stdout.index("== Config ==")


def test_shadowed_package_is_refused(program: Path) -> None:
    """The user's own `jobs/` comes before Falaj's on the path."""
    (program.parent / "jobs").mkdir()
    (program.parent / "jobs" / "__init__.py").touch()
    result = run(program)
    assert result.returncode == 2
    assert "Package 'jobs' is found at" in result.stderr


@job("platform", PlatformConfig)
def refused_in_worker(config: PlatformConfig) -> None:
    """Raise a refusal as Ray or Ray Train would wrap it."""
    refusal = SourceError("Source 'a' is empty.")
    wrapped = RayTaskError("f", "Traceback …\n  File …", refusal).as_instanceof_cause()
    if config.storage.root == "train":
        raise WorkerGroupError("Traceback …", {0: wrapped})
    raise wrapped


@pytest.mark.parametrize("where", ["task", "train"])
def test_refusal_in_a_worker_prints_one_line(where: str) -> None:
    """It has a refusal's exit code and no Ray traceback."""
    result = run_main(refused_in_worker, f"storage.root={where}")
    assert (result.returncode, result.stderr) == (2, "refused: Source 'a' is empty.\n")


@dataclass(kw_only=True, slots=True)
class OwnConfig(PlatformConfig):
    """Options of a user's own command, which has no YAML file."""

    path: str = "???"
    rows: int = 3


@job(None, OwnConfig)
def own(config: OwnConfig) -> dict[str, int]:
    """Return a result."""
    return {"rows": config.rows}


def test_command_without_a_file_has_the_options_of_its_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result goes to the file that a pipeline names. Outside of a pipeline, it goes nowhere."""
    assert run_main(own, "path=x").returncode == 0
    monkeypatch.setenv(RESULT_VARIABLE, str(tmp_path / "result.json"))
    assert run_main(own, "path=x", "rows=5").returncode == 0
    assert json.loads((tmp_path / "result.json").read_text()) == {"rows": 5}
    assert "No option 'row'. Did you mean 'rows'?" in run_main(own, "row=5").stderr
    assert own.options.compose(["path=a b"]) == OwnConfig(path="a b")


@job("platform", PlatformConfig)
def failed_in_worker(config: PlatformConfig) -> None:
    """Raise a failed training as Ray would wrap it."""
    failure = TrainingFailed("The loss is nan in epoch 1. Lower model.learning_rate.")
    raise RayTaskError("f", "Traceback …\n  File …", failure).as_instanceof_cause()


def test_failed_training_exits_with_1_and_one_line() -> None:
    """The line names the setting to change. There is no traceback."""
    result = run_main(failed_in_worker)
    expected = (1, "failed: The loss is nan in epoch 1. Lower model.learning_rate.\n")
    assert (result.returncode, result.stderr) == expected


def test_timed_command_prints_its_duration() -> None:
    """It goes to standard error, because standard output is the result."""
    done = run_main(timed)
    assert (done.returncode, done.stdout) == (0, "result\n")
    assert re.fullmatch(r"done in \d+\.\d s\n", done.stderr)
