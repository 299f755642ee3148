"""Protected Parquet: who has no key reads the public columns and nothing else; damage is refused, never misread."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import AccessDenied
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo, KeyNotFound, KeyRevoked
from cluster.security.parquet import ProtectedFileCorrupt, ProtectedFiles, Protection

INTERNAL, PERSONAL, SENSITIVE = (f"features/people/{name}" for name in ("internal", "personal", "sensitive"))
PROTECTION = Protection(
    default=INTERNAL, keys=(("id", PERSONAL), ("name", PERSONAL), ("illness", SENSITIVE), ("year", None))
)
TABLE = pa.table(
    {
        "id": pa.array(range(500), pa.int64()),
        "name": [f"canary-{n % 7}" for n in range(500)],
        "illness": pa.array([n / 3 for n in range(500)]),
        "year": pa.array([2000 + n % 5 for n in range(500)], pa.int32()),
        "note": ["internal canary"] * 500,
    }
)


class Counted(Keyring):
    """A keyring that counts what it is asked, and gives nothing for denied keys."""

    def __init__(self, path: Path) -> None:
        Keyring.create(path, b"k" * 32)
        super().__init__(path, b"k" * 32)
        self.asked: Counter[str] = Counter()
        self.denied: set[str] = set()

    def wrap(self, name: str, secret: bytes) -> str:
        self.asked[f"wrap {name}"] += 1
        return super().wrap(name, secret)

    def unwrap(self, name: str, wrapped: str) -> bytes:
        self.asked[f"unwrap {name}"] += 1
        if name in self.denied:
            raise AccessDenied(f"not {name}")
        return super().unwrap(name, wrapped)


@pytest.fixture
def keyring(tmp_path: Path) -> Counted:
    keyring = Counted(tmp_path / "keyring.json")
    for name in (INTERNAL, PERSONAL, SENSITIVE):
        keyring.ensure(KeyInfo(name=name))
    return keyring


@pytest.fixture
def path(tmp_path: Path, keyring: Counted) -> str:
    """A written file."""
    path = str(tmp_path / "people.parquet")
    assert ProtectedFiles(keyring).write(TABLE, path, PROTECTION) == Path(path).stat().st_size
    return path


def test_with_the_keys_everything_is_read(keyring: Counted, path: str) -> None:
    """Whole, by columns, and with one that the file lacks left out."""
    files = ProtectedFiles(keyring)
    assert files.read(path).equals(TABLE)
    assert files.read(path, ["illness", "id", "newer"]).equals(TABLE.select(["illness", "id"]))


def test_any_tool_reads_the_public_columns_and_no_other(path: str) -> None:
    """Without keys, and without our code."""
    years = TABLE["year"].to_pylist()
    assert pq.read_table(path, columns=["year"])["year"].to_pylist() == years
    assert pl.read_parquet(path, columns=["year"])["year"].to_list() == years
    assert duckdb.sql(f"SELECT count(*) FROM '{path}' WHERE year = 2000").fetchall() == [(100,)]
    for column in ("id", "name", "illness", "note"):
        with pytest.raises(OSError, match="decrypt"):
            pq.read_table(path, columns=[column])


def test_no_value_and_no_statistic_of_a_protected_column_is_in_the_file(path: str) -> None:
    """Nor in a dictionary page."""
    content = Path(path).read_bytes()
    assert b"canary" not in content
    assert (499).to_bytes(8, "little") not in content
    assert (2004).to_bytes(4, "little") in content, "the control: a public column's maximum is there"


def test_a_denied_column_says_so_and_leaves_the_others(keyring: Counted, path: str) -> None:
    """With the key store's own error."""
    keyring.denied.add(SENSITIVE)
    files = ProtectedFiles(keyring)
    with pytest.raises(AccessDenied, match=SENSITIVE):
        files.read(path)
    assert files.read(path, ["name", "year"]).equals(TABLE.select(["name", "year"]))


def test_a_revoked_key_closes_its_columns_for_good(keyring: Counted, path: str) -> None:
    """At once in a new process, within the cache's lifetime in one that has read before."""
    keyring.revoke(SENSITIVE)
    with pytest.raises(KeyRevoked):
        ProtectedFiles(keyring).read(path, ["illness"])
    assert ProtectedFiles(keyring).read(path, ["year"]).num_rows == 500


def test_a_rotated_key_reads_old_files_and_writes_new_ones(
    keyring: Counted, path: str, tmp_path: Path
) -> None:
    """The key store keeps the old version."""
    keyring.rotate(PERSONAL)
    files = ProtectedFiles(keyring)
    newer = str(tmp_path / "newer.parquet")
    files.write(files.read(path), newer, PROTECTION)
    assert files.read(newer).equals(TABLE)


def test_without_its_key_nothing_is_written(keyring: Counted, tmp_path: Path) -> None:
    """The error names the key, and no file is left."""
    other = Protection(default="features/unknown/internal")
    with pytest.raises(KeyNotFound, match="features/unknown"):
        ProtectedFiles(keyring).write(TABLE, str(tmp_path / "x" / "none.parquet"), other)
    assert not (tmp_path / "x").exists()


def test_a_process_asks_the_key_store_once_for_each_key(keyring: Counted, tmp_path: Path) -> None:
    """However many files it writes and reads."""
    files, reader = ProtectedFiles(keyring), ProtectedFiles(keyring)
    for number in range(5):
        files.write(TABLE, str(tmp_path / f"{number}.parquet"), PROTECTION)
    for number in range(5):
        reader.read(str(tmp_path / f"{number}.parquet"))
    assert set(keyring.asked.values()) == {1}
    assert len(keyring.asked) == 6


def test_a_table_of_public_columns_needs_no_key(tmp_path: Path, keyring: Counted) -> None:
    """And is an ordinary file."""
    protection = Protection(default="features/open/internal", keys=(("year", None),))
    path = str(tmp_path / "open.parquet")
    ProtectedFiles(keyring).write(TABLE.select(["year"]), path, protection)
    assert pq.read_table(path).equals(TABLE.select(["year"]))


def test_protection_is_plain_data() -> None:
    """It goes to workers; a column that is not named has the default key."""
    assert pickle.loads(pickle.dumps(PROTECTION)) == PROTECTION  # noqa: S301
    assert PROTECTION.key_of("whatever") == INTERNAL


READER = """
import sys
from pathlib import Path
from cluster.errors import RefusedError
from cluster.security.keys.keyring import Keyring
from cluster.security.parquet import ProtectedFiles
import pyarrow.parquet as pq
files, bad = ProtectedFiles(Keyring(Path(sys.argv[1]), b"k" * 32)), sys.argv[3]
data = Path(sys.argv[2]).read_bytes()
truth = files.read(sys.argv[2])
refused = 0
def look(content):
    global refused
    Path(bad).write_bytes(content)
    try:
        assert files.read(bad).equals(truth), "read something else"
    except RefusedError:
        refused += 1
for place in range(0, len(data), 11):
    look(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
for length in range(0, len(data), 97):
    look(data[:length])
print(refused, len(range(0, len(data), 11)) + len(range(0, len(data), 97)))
"""


def test_damage_is_refused_and_never_read_as_something_else(
    keyring: Counted, path: str, tmp_path: Path
) -> None:
    """Flipped bits and cuts anywhere, in a process of their own: Arrow must not end it either."""
    arguments = [str(tmp_path / "keyring.json"), path, str(tmp_path / "bad.parquet")]
    done = subprocess.run(
        [sys.executable, "-c", READER, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    refused, tried = map(int, done.stdout.split())
    assert refused > 0.9 * tried


def test_columns_and_files_cannot_change_places(keyring: Counted, path: str, tmp_path: Path) -> None:
    """Pages of another file of the same keys and shape do not fit."""
    files = ProtectedFiles(keyring)
    other = str(tmp_path / "other.parquet")
    files.write(TABLE.set_column(0, "id", pa.array(range(500, 1000), pa.int64())), other, PROTECTION)
    mine, theirs = Path(path).read_bytes(), Path(other).read_bytes()
    if len(mine) != len(theirs):
        theirs = theirs.ljust(len(mine), b"\0")[: len(mine)]
    Path(other).write_bytes(theirs[: len(mine) // 4] + mine[len(mine) // 4 :])
    with pytest.raises(ProtectedFileCorrupt, match="truncated or altered"):
        files.read(other)
