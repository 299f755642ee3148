"""Requirements, hashes, outputs, and the drawings of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cluster.ledger.events import PipelineStarted
from jobs.pipeline.graph import substitute
from jobs.pipeline.report.runs import render_run
from jobs.pipeline.report.terminal import draw_run
from jobs.pipeline.stage import outputs
from jobs.pipeline.stage.arguments import arguments
from jobs.pipeline.stage.content import CodeHashes, digest_path, flatten
from jobs.pipeline.stage.ray_jobs import entrypoint
from jobs.pipeline.stage.requirements import unmet
from tests.unit.jobs.pipeline.conftest import World, branches


@pytest.mark.parametrize(
    ("require", "result", "sentence"),
    [
        ({"auc": 0.88}, {"auc": 0.88}, ""),
        ({"auc": 0.88}, {"metrics.auc": 0.9}, ""),
        ({"auc": 0.88}, {"metrics.auc": 0.8799}, "auc is 0.8799, but must be >= 0.88."),
        ({"auc": 0.88}, {"auc": float("nan")}, "auc is nan, but must be >= 0.88."),
        ({"rows": ">0"}, {"rows": 0}, "rows is 0, but must be > 0."),
        ({"rows": "<= 1e3"}, {"rows": 1000}, ""),
        ({"verdict": "passed"}, {"verdict": "breached"}, "verdict is breached, but must be passed."),
        ({"ok": True}, {"ok": True}, ""),
        ({"rows": ">0"}, {"rows": "many"}, "rows is 'many', which is no number, but must be > 0."),
        ({"acu": 0.8}, {"auc": 0.9}, "acu is required, but the result has no value of this name. Did you mean 'auc'?"),
        ({"auc": 0.8}, {"a.auc": 0.9, "b.auc": 0.9},
         "auc is required, but the result has several values of this name: a.auc, b.auc. Write the whole name."),
    ],
)  # fmt: skip
def test_requirement(require: dict[str, Any], result: dict[str, Any], sentence: str) -> None:
    """A number is the smallest allowed value. A missing value or NaN never satisfies a requirement."""
    assert " ".join(unmet(require, result)) == sentence


def test_arguments_are_the_commands_options() -> None:
    """Nested parameters become dotted options. Texts in lists are quoted, so that Hydra takes them literally."""
    parameters = {
        "view": "income",
        "source": {"path": "a b.parquet"},
        "slices": ["a", "b,c"],
        "output": None,
        "n": 1.5,
        "x": True,
    }
    assert arguments(parameters) == [
        "view=income", "source.path=a b.parquet", "slices=['a','b,c']", "output=null", "n=1.5", "x=true",
    ]  # fmt: skip


def test_references_keep_the_type_of_a_whole_value() -> None:
    """Inside a longer text, the value becomes text."""
    known = {("train", "version"): 3}
    assert substitute({"a": "{train.version}", "b": ["v{train.version}", 1]}, known) == {
        "a": 3,
        "b": ["v3", 1],
    }


def test_a_job_runs_in_the_callers_folder_with_no_secret_in_its_command(tmp_path: Path) -> None:
    """The dashboard shows the command. Arguments with spaces stay one argument."""
    command = entrypoint(["own_check", "path=a b"], folder=tmp_path / "it's", result=tmp_path / "r.json")
    assert command.startswith(f"cd '{tmp_path}/it'\"'\"'s' && FALAJ_RESULT={tmp_path}/r.json ")
    assert command.endswith("-m own_check 'path=a b'")


def test_outputs_come_back_after_a_failure_and_every_step_can_be_repeated(tmp_path: Path) -> None:
    """Also after kill -9 between two steps, and for folders."""
    file, folder = tmp_path / "f", tmp_path / "d"
    file.write_text("old")
    folder.mkdir()
    (folder / "part").write_text("old")
    paths = [str(file), str(folder), str(tmp_path / "new"), "view:income"]
    for _ in range(2):  # the first attempt is killed
        outputs.set_aside(paths)
        assert not file.exists()
        assert not (tmp_path / "new").exists()
        file.write_text("half")
        (tmp_path / "new").write_text("half")
    for _ in range(2):
        outputs.discard(paths)
        assert file.read_text() == (folder / "part").read_text() == "old"
        assert not (tmp_path / "new").exists()
    outputs.set_aside(paths)
    file.write_text("new")
    for _ in range(2):
        outputs.accept(paths)
        assert file.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f"]


def test_the_hash_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    """Names and contents count. Times do not."""
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "a.csv").write_text("1")
    first = digest_path(str(tmp_path / "d"))
    (tmp_path / "d" / "e" / "a.csv").write_text("1")
    assert digest_path(str(tmp_path / "d")) == first
    assert digest_path(str(tmp_path / "d" / "*" / "*.csv")) != "absent"
    (tmp_path / "d" / "e" / "a.csv").rename(tmp_path / "d" / "b.csv")
    assert digest_path(str(tmp_path / "d")) != first
    assert digest_path(str(tmp_path / "nothing")) == "absent"


def test_the_hash_of_a_module_follows_its_imports(world: World) -> None:
    """Also those inside functions and relative ones. Installed packages do not count, Falaj's own do."""
    package = world.root / "own"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "stage": "def f():\n    from . import rules\nimport polars",
        "rules": "import cluster.errors",
        "other": "",
    }.items():
        (package / f"{name}.py").write_text(text)

    def now() -> str:
        return CodeHashes().digest(["own.stage"])

    first = now()
    (package / "other.py").write_text("x = 1")
    assert now() == first
    (package / "rules.py").write_text("import cluster.errors\nx = 1")
    assert now() != first


def test_a_result_is_flat_in_the_event() -> None:
    """Lists are left out. Outer values come first if there are too many."""
    values = {"a": {"b": {"c": 1}, "d": 2}, "e": 3, "f": [1], "g": None}
    assert flatten(values, limit=9) == {"e": 3, "a.d": 2, "a.b.c": 1}
    assert flatten(values, limit=2) == {"e": 3, "a.d": 2}


def test_a_run_is_drawn_with_states_branches_and_the_reason(world: World) -> None:
    """Stages side by side are one row. A stage says what it waits for if that is not the row above."""
    spec = branches(require={"auc": 0.95})
    with pytest.raises(ValueError, match="auc"):
        world.run(spec).execute(max_parallel=1)
    lines = [re.sub(r"\d+\.\d s", "1.0 s", line) for line in draw_run(world.state(), is_led=False)]
    assert lines == [
        "pipeline p, run r1: failed",
        "  1   ✔ first  1.0 s",
        "  2 ┌ ✔ left  1.0 s",
        "    └ ✔ right  1.0 s",
        "  3   ✘ join  1.0 s",
        "join: unmet: auc is 0.9, but must be >= 0.95.",
    ]
    world.ledger.append(
        PipelineStarted(pipeline="p", run="r1", stages=world.events(PipelineStarted)[0]["stages"]), actor="a"
    )
    assert next(draw_run(world.state(), is_led=False)).endswith("stopped; `action=run run=r1` goes on")


def test_the_page_draws_any_pipeline(world: World) -> None:
    """It has the graph, the states, the reason and the command lines, and nothing of the demo."""
    spec = branches(require={"auc": 0.95})
    with pytest.raises(ValueError, match="auc"):
        world.run(spec).execute(max_parallel=1)
    page = render_run(world.state())
    [graph] = re.findall(r'<svg class="loop".*?</svg>', page, flags=re.DOTALL)
    texts = [text.text for text in ElementTree.fromstring(graph).iter("text")]  # noqa: S314 - our own output
    assert texts[0] == "first"
    assert any("unmet" in str(text) for text in texts)
    assert "auc is 0.9, but must be" in page
    assert "python -m copy_number name=join" in page
    assert "census" not in page
