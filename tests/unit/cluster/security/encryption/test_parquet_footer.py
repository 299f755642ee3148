"""The signed footer of a protected file: its keys and its place are compared with the expected ones."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import RefusedError, SchemaMismatch
from cluster.security.encryption.parquet import (
    ProtectedFileCorrupt,
    ProtectedFiles,
    Protection,
    public_statistics,
)
from cluster.security.encryption.parquet.footer import _decode
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo

INTERNAL, PERSONAL = "features/people/internal", "features/people/personal"
PROTECTION = Protection(
    default=INTERNAL, keys=(("id", PERSONAL), ("name", PERSONAL), ("illness", PERSONAL), ("year", None))
)
TABLE = pa.table(
    {"id": [1, 2], "name": ["a", "b"], "illness": [0.1, 0.2], "year": pa.array([2000, 2001], pa.int32())}
)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    keyring = Keyring.create(tmp_path / "keyring.json", b"k" * 32)
    for name in (INTERNAL, PERSONAL):
        keyring.ensure(KeyInfo(name=name))
    return keyring


@pytest.fixture
def path(tmp_path: Path, keyring: Keyring) -> str:
    """A protected file."""
    path = str(tmp_path / "people.parquet")
    ProtectedFiles(keyring).write(TABLE, path, PROTECTION)
    return path


def test_key_names_can_be_read_without_a_key(keyring: Keyring, path: str) -> None:
    """Key names are not secret."""
    keys = ProtectedFiles(keyring).keys(path)
    assert keys.signed_by == INTERNAL
    assert keys.columns == {"id": PERSONAL, "name": PERSONAL, "illness": PERSONAL, "year": None}
    versions = {name: text.split(":")[1] for name, text in keys.wrapped.items()}
    assert versions == {INTERNAL: "v1", PERSONAL: "v1"}


def test_a_file_that_is_opened_for_each_row_group_is_decoded_once(keyring: Keyring, path: str) -> None:
    """The footer of a large file has thousands of entries. Another footer under the same name is decoded again."""
    files = ProtectedFiles(keyring)
    _decode.cache_clear()
    first = [files.keys(path) for _ in range(3)]
    assert _decode.cache_info().misses == 1
    files.write(TABLE.drop_columns(["illness"]), path, PROTECTION)
    assert "illness" in first[0].columns
    assert "illness" not in files.keys(path).columns


def test_damaged_footer_never_passes_verification(keyring: Keyring, path: str) -> None:
    """Reading its keys raises only ProtectedFileCorrupt, and a verified read is always refused."""
    data = Path(path).read_bytes()
    files = ProtectedFiles(keyring)
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = 0
    for position in range(start, len(data), 5):
        changed = bytes([data[position] ^ 1 << position % 8])
        Path(path).write_bytes(data[:position] + changed + data[position + 1 :])
        try:
            files.keys(path)
        except ProtectedFileCorrupt:
            refused += 1
        with pytest.raises(RefusedError):
            files.read(path, protection=PROTECTION)
    assert refused > 0.02 * (len(data) - start)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + bytes(4) + b"PAR1", b"\xff" * 40 + b"\x20\0\0\0PAR1"]
)
def test_file_without_a_footer_is_refused(keyring: Keyring, path: str, content: bytes) -> None:
    """Holds for every length."""
    Path(path).write_bytes(content)
    with pytest.raises(ProtectedFileCorrupt):
        ProtectedFiles(keyring).keys(path)


def test_unencrypted_file_is_accepted_only_for_a_public_table(keyring: Keyring, path: str) -> None:
    """Every column must be named as public. Such a table needs no key."""
    table = TABLE.select(["year"])
    public = Protection(default="features/without-a-key/internal", keys=(("year", None),))
    files = ProtectedFiles(keyring)
    files.write(table, path, public, place="open")
    assert files.read(path, protection=public).equals(table)
    assert pq.read_table(path).equals(table), "an ordinary file"
    with pytest.raises(ProtectedFileCorrupt, match="no key"):
        files.read(path, protection=Protection(default=INTERNAL))


def chunk(path: str, files: ProtectedFiles, column: int) -> slice:
    """Return the byte range of a column's pages."""
    properties = files._factory.file_decryption_properties(files._connection)
    found = pq.ParquetFile(path, decryption_properties=properties).metadata.row_group(0).column(column)
    start = found.dictionary_page_offset or found.data_page_offset
    return slice(start, start + found.total_compressed_size)


def numbers(seed: int) -> pa.Array:
    """Return numbers that no codec can compress, so that all columns have one size."""
    return pa.array(np.random.default_rng(seed).integers(-(2**62), 2**62, 100))


def test_pages_cannot_be_moved_between_columns_or_files(keyring: Keyring, tmp_path: Path) -> None:
    """Although key and size are the same."""
    files = ProtectedFiles(keyring)
    protection = Protection(default=INTERNAL, keys=(("a", PERSONAL), ("b", PERSONAL)))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    sizes: set[int] = set()
    while len(sizes) != 1:  # an encoded checksum takes four or five bytes: retry until the sizes are equal
        for path, start in ((one, 0), (two, 2)):
            files.write(pa.table({"a": numbers(start), "b": numbers(start + 1)}), path, protection)
        target, other_column, other_file = chunk(one, files, 0), chunk(one, files, 1), chunk(two, files, 0)
        sizes = {pages_range.stop - pages_range.start for pages_range in (target, other_column, other_file)}
    content = {path: Path(path).read_bytes() for path in (one, two)}
    for source, pages_range in ((one, other_column), (two, other_file)):
        pages = content[source][pages_range]
        Path(one).write_bytes(content[one][: target.start] + pages + content[one][target.stop :])
        with pytest.raises(ProtectedFileCorrupt, match="truncated or altered"):
            files.read(one, ["a"])


FORGED = pa.table({"id": [1], "name": ["forged"], "illness": [0.1], "year": pa.array([1], pa.int32())})


@pytest.mark.parametrize(
    ("protection", "columns"),
    [
        (None, FORGED.column_names),
        (None, ["year"]),
        (Protection(default="other/internal", keys=PROTECTION.keys), FORGED.column_names),
        (Protection(default=INTERNAL, keys=(("year", None), ("name", None))), FORGED.column_names),
        (Protection(default=INTERNAL, keys=(("id", PERSONAL), ("year", INTERNAL))), ["id", "year"]),
    ],
    ids=["in the clear", "public only", "under another key", "a column in the clear", "a column closed"],
)
def test_exchanged_file_is_refused_if_the_keys_are_expected(
    keyring: Keyring, path: str, protection: Protection | None, columns: list[str]
) -> None:
    """A principal without the table's keys cannot replace a file by its own."""
    files = ProtectedFiles(keyring)
    keyring.ensure(KeyInfo(name="other/internal"))
    assert files.read(path, protection=PROTECTION).equals(TABLE), "the control"
    if protection is None:
        pq.write_table(FORGED.select(columns), path)
    else:
        files.write(FORGED.select(columns), path, protection)
    with pytest.raises(ProtectedFileCorrupt, match="not the expected file"):
        files.read(path, protection=PROTECTION)


def test_file_of_another_place_is_refused(keyring: Keyring, path: str) -> None:
    """Although its keys are right. The place is not part of the table's metadata after reading."""
    files = ProtectedFiles(keyring)
    table = TABLE.replace_schema_metadata({"mine": "kept"})
    files.write(table, path, PROTECTION, place="features/people/a")
    stored = files.read(path, protection=PROTECTION, place="features/people/a")
    assert stored.equals(table, check_metadata=True)
    with pytest.raises(ProtectedFileCorrupt, match="belongs at 'features/people/a'"):
        files.read(path, protection=PROTECTION, place="features/people/b")
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b"features/people/a", b"features/people/b"))
    with pytest.raises(ProtectedFileCorrupt):
        files.read(path, protection=PROTECTION, place="features/people/b")


@pytest.mark.parametrize("name", ["a,b", "a;b", "a:b", " a", "a ", ""])
def test_column_name_that_arrow_would_misread_is_refused(keyring: Keyring, tmp_path: Path, name: str) -> None:
    """Column 'a,b' would be in the clear if 'a' and 'b' are public columns."""
    table = pa.table({"a": ["x"], "b": ["x"], name: ["canary"]})
    protection = Protection(default=INTERNAL, keys=(("a", None), ("b", None)))
    with pytest.raises(SchemaMismatch, match="Rename"):
        ProtectedFiles(keyring).write(table, str(tmp_path / "x"), protection)
    assert not (tmp_path / "x").exists()


def test_clashing_column_names_are_refused(keyring: Keyring, tmp_path: Path) -> None:
    """A dot also separates the levels of a nested column."""
    table = pa.table({"a.b": ["open"], "a": [{"b": "canary"}]})
    protection = Protection(default=INTERNAL, keys=(("a.b", None), ("a", PERSONAL)))
    with pytest.raises(SchemaMismatch, match=r"a\.b"):
        ProtectedFiles(keyring).write(table, str(tmp_path / "x"), protection)


def test_every_leaf_of_a_nested_column_is_encrypted(keyring: Keyring, path: str) -> None:
    """Lists, structs, maps and dictionaries."""
    table = pa.table(
        {
            "list": [["canary-1"], [None, "canary-2"]],
            "struct": [{"a": "canary-3", "b": {"c": ["canary-4"]}}] * 2,
            "map": pa.array([[("canary-5", 1)]] * 2, pa.map_(pa.string(), pa.int64())),
            "dictionary": pa.array(["canary-6"] * 2).dictionary_encode(),
            "year": [1, 2],
        }
    )
    files = ProtectedFiles(keyring)
    files.write(table, path, Protection(default=INTERNAL, keys=(("list", PERSONAL), ("year", None))))
    assert b"canary" not in Path(path).read_bytes()
    assert files.read(path).equals(table)
    assert pq.read_table(path, columns=["year"])["year"].to_pylist() == [1, 2]


def test_statistics_contain_only_public_columns() -> None:
    """The statistics contain only values that the Delta log can represent exactly."""
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    table = pa.table(
        {
            "closed": ["canary"] * 3,
            "whole": [3, None, -1],
            "real": [0.5, 1.5, None],
            "nan": [0.5, float("nan"), 1.0],
            "endless": [0.5, float("inf"), 1.0],
            "word": ["b", "a", "ä"],
            "long": ["x" * 40, "a", "b"],
            "moment": pa.array([moment] * 3, pa.timestamp("us", "UTC")),
            "day": [date(2026, 1, 2)] * 3,
            "none": pa.nulls(3, pa.int64()),
            "list": [[1], [2], [3]],
        }
    )
    public = tuple((name, None) for name in table.column_names if name != "closed")
    statistics = json.loads(public_statistics(table, Protection(default=INTERNAL, keys=public)))
    instant, day = "2026-01-02T03:04:05.678901Z", "2026-01-02"
    assert statistics["numRecords"] == 3
    assert statistics["minValues"] == {"whole": -1, "real": 0.5, "word": "a", "moment": instant, "day": day}
    assert statistics["maxValues"] == {"whole": 3, "real": 1.5, "word": "ä", "moment": instant, "day": day}
    nulls = {name: count for name, count in statistics["nullCount"].items() if count}
    assert nulls == {"whole": 1, "real": 1, "none": 3}
    assert "closed" not in statistics["nullCount"]
