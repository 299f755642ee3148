"""Tests of the scanner for unencrypted values, in all formats that need no key."""

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
from tests.processes.commands import run_main

CANARY = "canary-7f3a9"
TEXT = f"before {CANARY} after"


def plain(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text(TEXT)


def wide(folder: Path) -> None:
    (folder / "a.txt").write_text(TEXT, encoding="utf-16")


def filler() -> str:
    """Return text that compresses well, so that the canary in it is not visible in the compressed bytes."""
    draw = random.Random(0)
    words = [f"{draw.choice(['canary', '7f3', 'a9', 'after'])}{draw.randrange(1000)}" for _ in range(9000)]
    return " ".join([*words[:4500], TEXT, *words[4500:]])


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", filler())


def packed(name: str, pack: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "a").write_bytes(pack(filler().encode()))

    write.__name__ = name
    return write


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
    """Write bytes in a list in a struct, without a dictionary."""
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
    *(zipped, zstd, nested, arrow),
    packed(
        "gzip", lambda data: gzip.compress(b"first") + gzip.compress(data)
    ),  # two members, as appending does
    *(packed("xz", lzma.compress), packed("bzip2", bz2.compress)),
    *map(parquet, ("snappy", "gzip", "zstd", "brotli")),
]


@pytest.mark.parametrize("write", [plain, wide, database, store, *PACKED], ids=lambda write: write.__name__)
def test_canary_is_found_in_every_format(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """A word that is not in the file is not found."""
    write(tmp_path)
    if write in PACKED and write.__name__ != "parquet_snappy":  # which does not pack letters
        assert CANARY.encode() not in (next(tmp_path.iterdir())).read_bytes(), "only unpacking finds it"
    assert {one.canary for one in scan([tmp_path], [CANARY, "canary-none"])} == {CANARY}


def test_canary_is_found_across_database_pages(tmp_path: Path) -> None:
    """SQLite splits a long value, with a page number in between."""
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
    assert {one.location for one in scan([file], [CANARY])} == {"table t"}


def test_canary_is_found_across_two_chunks(tmp_path: Path) -> None:
    """An unpacked file is read in chunks."""
    content = b"x" * (PIECE_BYTES - 4) + CANARY.encode() + b"y" * 100
    (tmp_path / "a").write_bytes(gzip.compress(content, 1))
    assert [one.location for one in scan([tmp_path], [CANARY])] == ["gzip"]


@pytest.mark.parametrize("canary", ["1234567890123", "-98765432109876", "0.12345678901"])
def test_number_is_found_in_binary_form(tmp_path: Path, canary: str) -> None:
    """In plain bytes, and in a compressed column of its type."""
    number = float(canary) if "." in canary else int(canary)
    (tmp_path / "raw").write_bytes(b"abc" + pa.array([number]).buffers()[1].to_pybytes())
    values = pa.array([number] + [number * 0 + n for n in range(5000)])
    pq.write_table(pa.table({"a": values}), tmp_path / "table", compression="gzip", write_statistics=False)
    assert {Path(one.path).name for one in scan([tmp_path], [canary])} == {"raw", "table"}


def test_small_number_is_searched_in_columns_only(tmp_path: Path) -> None:
    """Its bytes occur everywhere."""
    (tmp_path / "raw").write_bytes(bytes([77, 0, 0, 0, 0, 0, 0, 0]))
    pq.write_table(pa.table({"a": pa.array([77], pa.int32())}), tmp_path / "table")
    assert {Path(one.path).name for one in scan([tmp_path], ["77", "300", "--5"])} == {"table"}


def test_canary_in_a_folder_name_is_found(tmp_path: Path) -> None:
    """A partition's folder name contains a value."""
    (tmp_path / f"name={CANARY}").mkdir()
    (tmp_path / f"name={CANARY}" / "a").write_text("nothing")
    assert {one.location for one in scan([tmp_path], [CANARY])} == {"name"}


def test_unreadable_file_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code differs from those of "found" and "nothing found"."""
    (tmp_path / "a.txt").write_text(TEXT)

    def closed(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("cluster.security.scan.mmap.mmap", closed)
    done = run_main(main, "--canary", CANARY, str(tmp_path))
    assert done.returncode == 1
    assert "a.txt: not searched" in done.stderr


def test_canary_is_found_in_public_columns_only(tmp_path: Path) -> None:
    """Both columns are in one file."""
    keyring = Keyring.create(tmp_path / "keyring.json", b"k" * 32)
    keyring.ensure(KeyInfo(name="t/internal"))
    table = pa.table({"open": [TEXT] * 500, "closed": ["canary-hidden"] * 500})
    protection = Protection(default="t/internal", keys=(("open", None),))
    ProtectedFiles(keyring).write(table, str(tmp_path / "t.parquet"), protection)
    found = list(scan([tmp_path], [CANARY, "canary-hidden"]))
    assert {(one.canary, Path(one.path).name) for one in found} == {(CANARY, "t.parquet")}


@pytest.mark.parametrize(("canary", "code"), [(CANARY, 2), ("canary-none", 0)])
def test_command_exit_code_says_whether_a_canary_was_found(tmp_path: Path, canary: str, code: int) -> None:
    """The output has the path."""
    plain(tmp_path)
    done = run_main(main, "--canary", canary, str(tmp_path))
    assert done.returncode == code
    assert ("a.txt" in done.stdout) == (code == 2)
