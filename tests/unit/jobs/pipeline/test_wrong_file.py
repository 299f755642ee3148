"""What a pipeline's command says about a wrong file or option, before any stage is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.entrypoint import Options
from cluster.errors import ConfigError
from jobs.pipeline.__main__ import main
from jobs.pipeline.config import PipelineConfig
from tests.processes.commands import run_main

RIGHT = """
vars: {modle: loan, build: build}
stages:
  train:
    command: jobs.train
    parameters: {name: "${pipeline.vars.model}", training_set: "${pipeline.vars.biuld}/t", label: y}
"""
WRONG = "stages:\n  train:\n    command: x\n   title: y\n"


def message(tmp_path: Path, text: str, *arguments: str) -> str:
    folder = tmp_path / "conf" / "pipeline"
    folder.mkdir(parents=True)
    (folder / "wrong.yaml").write_text(text)
    options = Options(config_name="pipeline", schema=PipelineConfig)
    with pytest.raises(ConfigError) as refusal:
        options.compose(["pipeline=wrong", *arguments], config_dir=str(tmp_path / "conf"))
    return str(refusal.value)


def test_each_name_without_a_value_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    """Both are found at once, and the misspelled name in `vars` is suggested."""
    assert message(tmp_path, RIGHT) == (
        "`${pipeline.vars.model}` has no value. Did you mean 'pipeline.vars.modle'? "
        "`${pipeline.vars.biuld}` has no value. Did you mean 'pipeline.vars.build'?"
    )


def test_an_unknown_value_of_the_command_line_suggests_one_of_the_file(tmp_path: Path) -> None:
    """The names of `vars` are in the user's own file."""
    assert "Did you mean 'pipeline.vars.build'?" in message(tmp_path, RIGHT, "pipeline.vars.buidl=x")


def test_a_file_that_is_no_yaml_is_one_line_with_its_place(tmp_path: Path) -> None:
    """Both for a stage's check and for the command, which exits with 2."""
    place = f"{tmp_path}/conf/pipeline/wrong.yaml, line 4, column 4: not valid YAML: "
    assert message(tmp_path, WRONG).startswith(place)
    result = run_main(main, "--config-dir", str(tmp_path / "conf"), "pipeline=wrong")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith(f"refused: {place}")
