"""What a file says of its keys and its place is signed, and held against what it should be."""

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
    """A written file."""
    path = str(tmp_path / "people.parquet")
    ProtectedFiles(keyring).write(TABLE, path, PROTECTION)
    return path


def test_a_file_says_its_keys_to_anybody(keyring: Keyring, path: str) -> None:
    """Which are no secret."""
    keys = ProtectedFiles(keyring).keys(path)
    assert keys.signed_by == INTERNAL
    assert keys.columns == {"id": PERSONAL, "name": PERSONAL, "illness": PERSONAL, "year": None}
    assert {name: text.split(":")[1] for name, text in keys.wrapped.items()} == {
        INTERNAL: "v1",
        PERSONAL: "v1",
    }


def test_a_damaged_footer_is_refused_or_says_the_same_of_keys(keyring: Keyring, path: str) -> None:
    """Anywhere: nothing but the one error comes out, and who has keys is refused in any case."""
    data = Path(path).read_bytes()
    files = ProtectedFiles(keyring)
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = 0
    for place in range(start, len(data), 5):
        Path(path).write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
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
def test_what_has_no_footer_is_refused(keyring: Keyring, path: str, content: bytes) -> None:
    """However short."""
    Path(path).write_bytes(content)
    with pytest.raises(ProtectedFileCorrupt):
        ProtectedFiles(keyring).keys(path)


def test_a_plain_table_is_read_as_one_and_not_in_the_place_of_another(keyring: Keyring, path: str) -> None:
    """Only where every column is named as public."""
    table = TABLE.select(["year"])
    public = Protection(default=INTERNAL, keys=(("year", None),))
    files = ProtectedFiles(keyring)
    files.write(table, path, public, place="open")
    assert files.read(path, protection=public).equals(table)
    with pytest.raises(ProtectedFileCorrupt, match="no key"):
        files.read(path, protection=Protection(default=INTERNAL))


def chunk(path: str, files: ProtectedFiles, column: int) -> slice:
    """Where a column's pages lie."""
    properties = files._factory.file_decryption_properties(files._connection)
    found = pq.ParquetFile(path, decryption_properties=properties).metadata.row_group(0).column(column)
    start = found.dictionary_page_offset or found.data_page_offset
    return slice(start, start + found.total_compressed_size)


def numbers(seed: int) -> pa.Array:
    """Such as no codec makes shorter, so that all columns have one size."""
    return pa.array(np.random.default_rng(seed).integers(-(2**62), 2**62, 100))


def test_columns_and_files_cannot_change_places(keyring: Keyring, tmp_path: Path) -> None:
    """Pages of another column, or of another file of the same writer, do not fit though key and size are the same."""
    files = ProtectedFiles(keyring)
    protection = Protection(default=INTERNAL, keys=(("a", PERSONAL), ("b", PERSONAL)))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    sizes: set[int] = set()
    while len(sizes) != 1:  # a page's checksum, of what was encrypted anew, takes four or five bytes
        for path, start in ((one, 0), (two, 2)):
            files.write(pa.table({"a": numbers(start), "b": numbers(start + 1)}), path, protection)
        mine, beside, theirs = chunk(one, files, 0), chunk(one, files, 1), chunk(two, files, 0)
        sizes = {place.stop - place.start for place in (mine, beside, theirs)}
    content = {path: Path(path).read_bytes() for path in (one, two)}
    for source, place in ((one, beside), (two, theirs)):
        pages = content[source][place]
        Path(one).write_bytes(content[one][: mine.start] + pages + content[one][mine.stop :])
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
    ids=[
        "in the clear",
        "public columns only",
        "under another key",
        "a column in the clear",
        "a column closed",
    ],
)
def test_an_exchanged_file_is_refused_by_who_says_what_he_expects(
    keyring: Keyring, path: str, protection: Protection | None, columns: list[str]
) -> None:
    """Who has no key of the table, or not all, cannot pass off a file of his own."""
    files = ProtectedFiles(keyring)
    keyring.ensure(KeyInfo(name="other/internal"))
    assert files.read(path, protection=PROTECTION).equals(TABLE), "the control"
    if protection is None:
        pq.write_table(FORGED.select(columns), path)
    else:
        files.write(FORGED.select(columns), path, protection)
    with pytest.raises(ProtectedFileCorrupt, match="not the expected file"):
        files.read(path, protection=PROTECTION)


def test_a_file_of_another_place_is_refused(keyring: Keyring, path: str) -> None:
    """Though all its keys are right; what the file says of its place is not shown as the table's own."""
    files = ProtectedFiles(keyring)
    table = TABLE.replace_schema_metadata({"mine": "kept"})
    files.write(table, path, PROTECTION, place="features/people/a")
    back = files.read(path, protection=PROTECTION, place="features/people/a")
    assert back.equals(table, check_metadata=True)
    with pytest.raises(ProtectedFileCorrupt, match="belongs at 'features/people/a'"):
        files.read(path, protection=PROTECTION, place="features/people/b")
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b"features/people/a", b"features/people/b"))
    with pytest.raises(ProtectedFileCorrupt):
        files.read(path, protection=PROTECTION, place="features/people/b")


@pytest.mark.parametrize("name", ["a,b", "a;b", "a:b", " a", "a ", ""])
def test_a_name_that_arrow_would_misread_is_refused(keyring: Keyring, tmp_path: Path, name: str) -> None:
    """'a,b' would lie in the clear where 'a' and 'b' are public columns."""
    table = pa.table({"a": ["x"], "b": ["x"], name: ["canary"]})
    protection = Protection(default=INTERNAL, keys=(("a", None), ("b", None)))
    with pytest.raises(SchemaMismatch, match="Rename"):
        ProtectedFiles(keyring).write(table, str(tmp_path / "x"), protection)
    assert not (tmp_path / "x").exists()


def test_names_that_clash_are_refused(keyring: Keyring, tmp_path: Path) -> None:
    """A dot is also the way to a nested column."""
    table = pa.table({"a.b": ["open"], "a": [{"b": "canary"}]})
    protection = Protection(default=INTERNAL, keys=(("a.b", None), ("a", PERSONAL)))
    with pytest.raises(SchemaMismatch, match=r"a\.b"):
        ProtectedFiles(keyring).write(table, str(tmp_path / "x"), protection)


def test_every_leaf_of_a_nested_column_is_protected(keyring: Keyring, path: str) -> None:
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


def test_the_log_learns_nothing_of_protected_columns() -> None:
    """And of public ones only what it can state exactly."""
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
    found = json.loads(public_statistics(table, Protection(default=INTERNAL, keys=public)))
    instant, day = "2026-01-02T03:04:05.678901Z", "2026-01-02"
    assert found["numRecords"] == 3
    assert found["minValues"] == {"whole": -1, "real": 0.5, "word": "a", "moment": instant, "day": day}
    assert found["maxValues"] == {"whole": 3, "real": 1.5, "word": "ä", "moment": instant, "day": day}
    assert {name: count for name, count in found["nullCount"].items() if count} == {
        "whole": 1,
        "real": 1,
        "none": 3,
    }
    assert "closed" not in found["nullCount"]
