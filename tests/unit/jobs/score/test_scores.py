"""Batch scoring of rows that have the model's inputs."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from cluster.errors import RefusedError
from cluster.ledger.events import ModelReinstated, ModelRetired, ScoringFinished, ScoringStarted
from cluster.registry import Registry
from cluster.runtime import InputSpec, Model, ModelSignature, load_model
from cluster.security.keys.access import key_store
from cluster.storage import file_system, layout, list_files, read_parquet
from jobs.score.config import InputsFrom
from tests.projects.batch_scoring import MODEL, ScoringProject, Write
from tests.samples.network import as_int8, write_network
from tests.samples.signatures import of_each_task
from tests.samples.trees import write_trees
from tests.servers.object_store import object_store_environment
from tests.servers.replica import running_replica

INPUTS = (
    InputSpec(name="age", dtype="double"),
    InputSpec(name="sex", dtype="string", categories=("f", "m")),
    InputSpec(name="income", dtype="double"),
)
SIGNATURES = of_each_task(*INPUTS)
ROWS = 500


def people(count: int = ROWS, *, seed: int = 0) -> pa.Table:
    """Return rows with the model's inputs. One value of ten is missing."""
    draw = np.random.default_rng(seed)

    def some(values: Any) -> list[Any]:
        return [
            None if missing else value
            for value, missing in zip(values, draw.random(count) < 0.1, strict=True)
        ]

    return pa.table(
        {
            "person_id": pa.array(range(count), pa.int64()),
            "age": pa.array(some(draw.normal(40, 20, count).tolist()), pa.float64()),
            "sex": pa.array(some(draw.choice(["f", "m", "x"], count).tolist()), pa.string()),
            "income": pa.array(some(draw.normal(40, 20, count).tolist()), pa.float64()),
            "note": [f"note {number}" for number in range(count)],
        }
    )


def model_of(project: ScoringProject) -> Model:
    version = Registry(project.ledger, layout(project.storage)).get(MODEL, "latest")
    return load_model(version, key_store(project.access))


def one_by_one(model: Model, table: pa.Table) -> list[dict[str, Any]]:
    """Return the answers that a replica gives if each row is a request of its own."""
    answers = []
    for row in table.select(["age", "sex", "income"]).to_pylist():
        answers += model.predict({name: [value] for name, value in row.items()}).rows()
    return answers


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: signature.task.value)
@pytest.mark.parametrize("precision", ["trees", "float32", "int8"])
def test_scores_equal_online_answers(
    project: ScoringProject, signature: ModelSignature, precision: str
) -> None:
    """For trees and int8 bit for bit, in parts of several sizes; float32 products of one row and of many rows round
    differently."""
    write: Write = write_trees if precision == "trees" else write_network
    project.register(as_int8(signature) if precision == "int8" else signature, write=write)
    project.write(people(), row_group_size=130)
    finished = project.score(part_rows=100)
    assert (finished.rows, finished.scored, finished.set_aside) == (ROWS, ROWS, {})
    expected = one_by_one(model_of(project), people())
    columns = [name for name in ("probability", "probabilities", "value", "label") if name in expected[0]]
    actual = project.scores().select(columns).to_dicts()
    if precision == "float32":
        for got, want in zip(actual, expected, strict=True):
            assert {name: flat(value) for name, value in got.items()} == {
                name: flat(value) for name, value in want.items()
            }
    else:
        assert actual == expected


@pytest.mark.parametrize("precision", ["trees", "int8"])
def test_scores_equal_a_replicas_answers(tmp_path: Path, precision: str) -> None:
    """The same rows, sent to a real replica over HTTP, one by one."""
    signature = SIGNATURES.multiclass if precision == "trees" else as_int8(SIGNATURES.multiclass)
    (tmp_path / ".falaj").mkdir()
    write: Write = write_trees if precision == "trees" else write_network
    with running_replica(tmp_path / ".falaj", signature, write=write) as replica:
        project = ScoringProject(tmp_path, replica.keys)
        project.write(people(40))
        project.score()
        scores = project.scores().select("probabilities", "label").to_dicts()
        for row, score in zip(people(40).select(["age", "sex", "income"]).to_pylist(), scores, strict=True):
            status, answer = replica.json(
                f"/v1/models/{MODEL}:predict", {"entities": [{"person_id": 1}], "features": row}
            )
            assert status == 200
            assert answer["predictions"] == [score]
        project.close()


def flat(value: Any) -> Any:
    """Return a value that equals values that differ only by rounding."""
    if isinstance(value, dict):
        return {name: flat(one) for name, one in value.items()}
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value


def test_a_threshold_decides_about_the_label(project: ScoringProject) -> None:
    """The label is that of the version's own threshold, as in serving."""
    signature = ModelSignature(
        task=SIGNATURES.binary.task, inputs=INPUTS, label="y", classes=("no", "yes"), threshold=0.45
    )
    project.register(signature)
    project.write(people())
    project.score()
    scores = project.scores()
    assert ((scores["probability"] >= 0.45) == (scores["label"] == "yes")).all()
    assert scores["label"].n_unique() == 2
    assert scores.filter(pl.col("probability").is_between(0.45, 0.5)).height > 0


def test_each_row_has_its_id_position_and_version(project: ScoringProject) -> None:
    """The output is in the order of the input, and an id is never used twice, not even by another run."""
    version = project.register(SIGNATURES.binary)
    project.write(people(), row_group_size=130)
    project.score(part_rows=100, keep=["note"])
    project.score(output="again")
    scores, again = project.scores(), project.scores("again")
    assert scores["input_row"].to_list() == list(range(ROWS))
    assert scores["note"].to_list() == [f"note {number}" for number in range(ROWS)]
    assert scores["version"].unique().to_list() == [version.version]
    assert scores["model"].unique().to_list() == [MODEL]
    ids = [*scores["prediction_id"], *again["prediction_id"]]
    assert len(set(ids)) == 2 * ROWS
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids)
    assert again.columns == [*scores.columns[:-1], "person_id"]


def test_parquet_csv_and_delta_give_the_same_scores(project: ScoringProject) -> None:
    """Several files, a compressed CSV, and a Delta table with a partition column, which is not in its files."""
    project.register(SIGNATURES.binary)
    table = people()
    project.write(table)
    project.score()
    project.write(table.slice(0, 200), "folder/a.parquet")
    project.write(table.slice(200), "folder/b.parquet")
    text = pl.DataFrame(pl.from_arrow(table)).write_csv()
    (project.root / "rows.csv.gz").write_bytes(gzip.compress(text.encode()))
    sexes = pl.DataFrame(pl.from_arrow(table)).with_columns(
        pl.col("sex").replace("x", "x y/%").fill_null("x")
    )
    write_deltalake(str(project.root / "delta"), sexes.to_arrow(), partition_by=["sex"])
    expected = project.scores().select("person_id", "probability", "label")
    for name in ("folder", "folder/*.parquet", "rows.csv.gz", "delta"):
        output = f"scores of {name.replace('*', '')}"
        project.score(input=str(project.root / name), output=output, part_rows=90)
        actual = project.scores(output).select("person_id", "probability", "label")
        same = actual.with_columns(pl.col("person_id").cast(pl.Int64)).sort("person_id")
        assert same.equals(expected), name


def test_input_and_output_can_be_in_an_object_store(project: ScoringProject) -> None:
    """At any fsspec URI. A part that is done is not written again, and the scores are those of local files."""
    project.register(SIGNATURES.binary)
    path = Path(project.write(people(), row_group_size=100))
    project.score(part_rows=100)
    with object_store_environment() as bucket:
        fs, folder = file_system(f"{bucket}/data")
        fs.pipe_file(f"{folder}/rows.parquet", path.read_bytes())
        output = f"{bucket}/out/scores"
        finished = project.score(input=f"{bucket}/data", output=output, part_rows=100)
        assert project.score(input=f"{bucket}/data", output=output, part_rows=100) == finished
        names = sorted(name.rpartition("/")[2] for name in list_files(output, ".parquet"))
        tables = [read_parquet(f"{output}/{name}") for name in names]
    assert names == [f"part-{number:05}-00000.parquet" for number in range(5)]
    scores = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables)))
    assert scores["probability"].equals(project.scores()["probability"])


def test_an_unwritten_kind_of_input_is_refused_in_one_line(project: ScoringProject) -> None:
    """The message names the column, the file or the option."""
    project.register(SIGNATURES.binary)
    project.write(people().drop_columns(["income"]))
    with pytest.raises(RefusedError, match="no column 'income', an input of the model"):
        project.score()
    project.write(people().set_column(1, "age", pa.array(["x"] * ROWS)))
    with pytest.raises(RefusedError, match="Input 'age' must be double, got a column of string"):
        project.score(output="text")
    for options, message in (
        ({"input": "nowhere.parquet"}, "No parquet file at"),
        ({"keep": ["nothing"]}, "keep: the input has no column 'nothing'"),
        ({"version": "9"}, "no version 9"),
        ({"inputs_from": InputsFrom.join}, "no feature service, so inputs_from=join cannot read"),
    ):
        with pytest.raises(RefusedError, match=message):
            project.score(**({"output": "refused"} | options))
    assert not (project.root / "refused").exists()


def test_a_retired_version_is_not_scored_until_it_is_reinstated(project: ScoringProject) -> None:
    """The message has the reason and another version. Nothing is written."""
    project.register(SIGNATURES.binary)
    project.register(SIGNATURES.binary)
    project.write(people())
    project.ledger.append(ModelRetired(name=MODEL, version=2, reason="old data"), actor="bob")
    with pytest.raises(RefusedError, match=r"Version 2 of 'm' is retired \(old data\)\..*version=1"):
        project.score()
    assert not (project.root / "scores").exists()
    assert project.score(version="1").scored == ROWS
    project.ledger.append(ModelReinstated(name=MODEL, version=2, reason="mistake"), actor="bob")
    assert project.score(output="again").scored == ROWS


def test_the_ledger_has_the_run(project: ScoringProject) -> None:
    """Its start has all that decides the rows, its end the counts and the hash of the manifest."""
    version = project.register(SIGNATURES.binary)
    path = project.write(people())
    finished = project.score()
    [started] = project.ledger.entries(ScoringStarted)
    [ended] = project.ledger.entries(ScoringFinished)
    assert started.payload["run"] == ended.payload["run"] == finished.run
    assert started.payload["input"] == path
    assert started.payload["input_hash"] == ended.payload["input_hash"]
    assert ended.payload["version"] == version.version
    assert (ended.payload["rows"], ended.payload["scored"]) == (ROWS, ROWS)
    assert len(ended.payload["manifest_hash"]) == 64


def test_scores_below_the_storage_root_are_encrypted(project: ScoringProject) -> None:
    """No value of a row is in any file. The inputs are there too, for monitoring, and a file belongs to its place."""
    project.register(SIGNATURES.multiclass)
    table = people().append_column("account_id", pa.array(["planted-word"] * ROWS))
    project.write(table)
    project.score(output=".falaj/jobs/scores", part_rows=100)
    scores = project.scores(".falaj/jobs/scores")
    assert set(scores["account_id"]) == {"planted-word"}
    assert scores.select("age", "sex", "income").equals(
        pl.DataFrame(pl.from_arrow(table)).select("age", "sex", "income")
    )
    folder = project.root / ".falaj/jobs/scores"
    for file in folder.rglob("*"):
        assert file.is_dir() or b"planted-word" not in file.read_bytes(), file
    first, second = sorted(folder.glob("*.parquet"))[:2]
    swapped = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swapped)
    with pytest.raises(RefusedError, match="not the expected file"):
        project.scores(".falaj/jobs/scores")


def test_other_files_in_the_output_are_not_touched(project: ScoringProject, tmp_path: Path) -> None:
    """A folder with other files, or with those of another run, is refused."""
    project.register(SIGNATURES.binary)
    project.write(people())
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "mine.txt").write_text("mine")
    with pytest.raises(RefusedError, match="is not an empty folder"):
        project.score()
    project.score(output="other")
    with pytest.raises(RefusedError, match="has the files of run"):
        project.score(output="other", keep=["note"])
    assert (tmp_path / "scores" / "mine.txt").read_text() == "mine"
