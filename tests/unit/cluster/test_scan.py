"""The scanner finds what lies in the clear, in every form that needs no key."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from cluster.security.encryption.parquet import ProtectedFiles, Protection
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from cluster.security.scan import PIECE_BYTES, main, scan
from tests.commands import run_main

CANARY = "canary-7f3a9"
TEXT = f"before {CANARY} after"


def plain(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text(TEXT)


def wide(folder: Path) -> None:
    (folder / "a.txt").write_text(TEXT, encoding="utf-16")


def filler() -> str:
    """Text whose letters are packed in fewer bits, so that a canary among them does not show as it is."""
    draw = random.Random(0)
    words = [f"{draw.choice(['canary', '7f3', 'a9', 'after'])}{draw.randrange(1000)}" for _ in range(9000)]
    return " ".join([*words[:4500], TEXT, *words[4500:]])


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", filler())


def gzipped(folder: Path) -> None:
    """Of two members, as appending makes it."""
    (folder / "a").write_bytes(gzip.compress(b"first") + gzip.compress(filler().encode()))


def xz(folder: Path) -> None:
    (folder / "a").write_bytes(lzma.compress(filler().encode()))


def bzip2(folder: Path) -> None:
    (folder / "a").write_bytes(bz2.compress(filler().encode()))


def zstd(folder: Path) -> None:
    with pa.CompressedOutputStream(str(folder / "a"), "zstd") as file:
        file.write(filler().encode())


def words() -> pa.Table:
    return pa.table({"number": range(9001), "word": filler().split(" ", 9000)})


def parquet(codec: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        pq.write_table(words(), folder / "a", compression=codec, write_statistics=False)

    write.__name__ = f"parquet_{codec}"
    return write


def nested(folder: Path) -> None:
    """Bytes in a list in a struct, and a dictionary."""
    column = words()["word"].combine_chunks()
    inner = pa.ListArray.from_arrays(range(len(column) + 1), column.cast(pa.binary()))
    table = pa.table({"a": pa.StructArray.from_arrays([inner], ["b"])})
    pq.write_table(table, folder / "a", compression="zstd", write_statistics=False, use_dictionary=False)


def arrow(folder: Path) -> None:
    feather.write_feather(words(), str(folder / "a"), compression="zstd")


def database(folder: Path) -> None:
    with sqlite3.connect(folder / "a.db") as connection:
        connection.execute("CREATE TABLE t (word TEXT)")
        connection.execute("INSERT INTO t VALUES (?)", (TEXT,))


def store(folder: Path) -> None:
    with lmdb.open(str(folder / "online")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"key", TEXT.encode())


PACKED = [
    zipped,
    gzipped,
    xz,
    bzip2,
    zstd,
    *map(parquet, ("snappy", "gzip", "zstd", "brotli")),
    nested,
    arrow,
]


@pytest.mark.parametrize("write", [plain, wide, database, store, *PACKED], ids=lambda write: write.__name__)
def test_a_canary_in_the_clear_is_found(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """And another word is not."""
    write(tmp_path)
    if write in PACKED and write.__name__ != "parquet_snappy":  # which does not pack letters
        assert CANARY.encode() not in (next(tmp_path.iterdir())).read_bytes(), "only unpacking finds it"
    assert {one.canary for one in scan([tmp_path], [CANARY, "canary-none"])} == {CANARY}


def test_a_long_value_of_a_database_is_found_across_its_pages(tmp_path: Path) -> None:
    """SQLite cuts it, with a page's number in between."""
    file = tmp_path / "a.db"
    for before in range(600, 5200, len(CANARY) // 2):
        file.unlink(missing_ok=True)
        with sqlite3.connect(file) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("CREATE TABLE t (word TEXT)")
            connection.execute("INSERT INTO t VALUES (?)", ("x" * before + CANARY + "y" * (14000 - before),))
        connection.close()
        if CANARY.encode() not in file.read_bytes():
            break
    else:
        pytest.fail("the control: none was cut")
    assert {one.place for one in scan([file], [CANARY])} == {"table t"}


def test_a_canary_between_two_pieces_is_found(tmp_path: Path) -> None:
    """An unpacked file is read in pieces."""
    content = b"x" * (PIECE_BYTES - 4) + CANARY.encode() + b"y" * 100
    (tmp_path / "a").write_bytes(gzip.compress(content, 1))
    assert [one.place for one in scan([tmp_path], [CANARY])] == ["gzip"]


@pytest.mark.parametrize("canary", ["1234567890123", "-98765432109876", "0.12345678901"])
def test_a_number_is_found_as_it_lies_in_memory(tmp_path: Path, canary: str) -> None:
    """In the bytes, and in a packed column of its type."""
    number = float(canary) if "." in canary else int(canary)
    (tmp_path / "raw").write_bytes(b"abc" + pa.array([number]).buffers()[1].to_pybytes())
    values = pa.array([number] + [number * 0 + n for n in range(5000)])
    pq.write_table(pa.table({"a": values}), tmp_path / "table", compression="gzip", write_statistics=False)
    assert {Path(one.path).name for one in scan([tmp_path], [canary])} == {"raw", "table"}


def test_a_small_number_is_looked_for_in_columns_and_not_in_bytes(tmp_path: Path) -> None:
    """Its bytes are found anywhere."""
    (tmp_path / "raw").write_bytes(bytes([77, 0, 0, 0, 0, 0, 0, 0]))
    pq.write_table(pa.table({"a": pa.array([77], pa.int32())}), tmp_path / "table")
    assert {Path(one.path).name for one in scan([tmp_path], ["77", "300", "--5"])} == {"table"}


def test_a_name_is_found(tmp_path: Path) -> None:
    """A partition's folder says its value."""
    (tmp_path / f"name={CANARY}").mkdir()
    (tmp_path / f"name={CANARY}" / "a").write_text("nothing")
    assert {one.place for one in scan([tmp_path], [CANARY])} == {"name"}


def test_a_file_that_may_not_be_read_is_not_taken_for_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is neither that of found nor that of nothing found."""
    (tmp_path / "a.txt").write_text(TEXT)

    def closed(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("cluster.security.scan.mmap.mmap", closed)
    done = run_main(main, "--canary", CANARY, str(tmp_path))
    assert done.returncode == 1
    assert "a.txt: not searched" in done.stderr


def test_a_protected_column_is_not_found_and_a_public_one_is(tmp_path: Path) -> None:
    """In one and the same file."""
    keyring = Keyring.create(tmp_path / "keyring.json", b"k" * 32)
    keyring.ensure(KeyInfo(name="t/internal"))
    table = pa.table({"open": [TEXT] * 500, "closed": ["canary-hidden"] * 500})
    protection = Protection(default="t/internal", keys=(("open", None),))
    ProtectedFiles(keyring).write(table, str(tmp_path / "t.parquet"), protection)
    found = list(scan([tmp_path], [CANARY, "canary-hidden"]))
    assert {(one.canary, Path(one.path).name) for one in found} == {(CANARY, "t.parquet")}


@pytest.mark.parametrize(("canary", "code"), [(CANARY, 2), ("canary-none", 0)])
def test_the_command_exits_by_what_it_found(tmp_path: Path, canary: str, code: int) -> None:
    """And says where."""
    plain(tmp_path)
    done = run_main(main, "--canary", canary, str(tmp_path))
    assert done.returncode == code
    assert ("a.txt" in done.stdout) == (code == 2)
