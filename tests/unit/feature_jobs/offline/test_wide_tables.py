"""Tables with many columns: changes in one step, and messages of limited length."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from cluster.errors import SchemaMismatch, did_you_mean
from cluster.security.encryption.parquet import Protection
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.types.columns import append_columns, replace_columns, select_or_null

TABLE = pa.table({"a": pa.array([1, 2]), "b": pa.array(["x", None])}).replace_schema_metadata({"k": "v"})


def test_append_and_replace_equal_the_methods_of_arrow() -> None:
    """Order, types and metadata are equal."""
    c, a = pa.chunked_array([[1.5, 2.5]]), pa.chunked_array([["p", "q"]])
    expected = TABLE.append_column("c", c).append_column("d", a)
    assert append_columns(TABLE, {"c": c, "d": a}).equals(expected, check_metadata=True)
    expected = TABLE.set_column(0, "a", a)
    assert replace_columns(TABLE, {"a": a}).equals(expected, check_metadata=True)
    assert replace_columns(TABLE, {}).equals(TABLE, check_metadata=True)


def test_columns_that_a_file_lacks_are_null() -> None:
    """The result has the requested order of columns."""
    completed = select_or_null(TABLE, ["z", "b", "y"])
    assert completed.to_pydict() == {"z": [None, None], "b": ["x", None], "y": [None, None]}
    assert select_or_null(TABLE, ["b", "a"]).column_names == ["b", "a"]


def test_new_columns_are_one_version_of_the_table(tmp_path: Path) -> None:
    """Any number of columns is one version, and a refused batch adds none."""
    table = offline.create_table(str(tmp_path / "t"), pa.schema({"a": pa.int64()}), num_buckets=1)
    new = {f"f{number}": pa.float64() for number in range(20)}
    with pytest.raises(SchemaMismatch, match="Column 'a'"):
        offline.evolve_schema(table, pa.schema({**new, "a": pa.string()}), view="v")
    assert DeltaTable(str(tmp_path / "t")).version() == 0
    offline.evolve_schema(table, pa.schema({"a": pa.int64(), **new}), view="v")
    changed = DeltaTable(str(tmp_path / "t"))
    assert changed.version() == 1
    assert {field.name for field in changed.schema().fields} == {"a", "bucket", *new}


def test_each_column_has_its_key() -> None:
    """A column has its own key, no key, or the default key."""
    protection = Protection(default="d", keys=(("a", "k"), ("b", None)))
    assert protection.keys_of(["a", "b", "c"]) == {"a": "k", "b": None, "c": "d"}
    assert [protection.key_of(name) for name in "abc"] == ["k", None, "d"]


def test_message_lists_the_first_of_many_names() -> None:
    """A view with 2,000 columns does not give a message with 2,000 names."""
    message = did_you_mean("f7x", [f"f{number}" for number in range(2_000)])
    assert "Did you mean 'f7" in message
    assert message.endswith(" and 1,950 more.")
    assert len(message) < 600
