"""The scanner finds what lies in the clear, in every form that needs no key."""

from __future__ import annotations

import gzip
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from cluster.security.parquet import ProtectedFiles, Protection
from cluster.security.scan import main, scan
from tests.commands import run_main

CANARY = "canary-7f3a9"
TEXT = f"before {CANARY} after"


def plain(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text(TEXT)


def wide(folder: Path) -> None:
    (folder / "a.txt").write_text(TEXT, encoding="utf-16")


def compressed(folder: Path) -> None:
    with gzip.open(folder / "a.gz", "wt") as file:
        file.write(TEXT * 50)


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", TEXT * 50)


def parquet(folder: Path) -> None:
    table = pa.table({"number": list(range(500)), "word": [TEXT] * 500})
    pq.write_table(table, folder / "a.parquet", compression="zstd", write_statistics=False)


def database(folder: Path) -> None:
    with sqlite3.connect(folder / "a.db") as connection:
        connection.execute("CREATE TABLE t (word TEXT)")
        connection.execute("INSERT INTO t VALUES (?)", (TEXT,))


def store(folder: Path) -> None:
    with lmdb.open(str(folder / "online")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"key", TEXT.encode())


@pytest.mark.parametrize("write", [plain, wide, compressed, zipped, parquet, database, store])
def test_a_canary_in_the_clear_is_found(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """And another word is not."""
    write(tmp_path)
    assert {one.canary for one in scan([tmp_path], [CANARY, "canary-none"])} == {CANARY}


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
