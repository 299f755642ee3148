"""Protected Parquet: who has no key reads the public columns and nothing else; damage is refused, never misread."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import AccessDenied
from cluster.security.encryption.parquet import ProtectedFiles, Protection
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo, KeyNotFound, KeyRevoked, KeyStoreUnavailable

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
        self.broken: Exception | None = None

    def wrap(self, name: str, secret: bytes) -> str:
        self.asked[f"wrap {name}"] += 1
        return super().wrap(name, secret)

    def unwrap(self, name: str, wrapped: str) -> bytes:
        self.asked[f"unwrap {name}"] += 1
        if self.broken is not None:
            raise self.broken
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


def test_public_columns_need_no_key(keyring: Counted, path: str) -> None:
    """Not even that of the footer; no other column comes with them."""
    keyring.denied.update((INTERNAL, PERSONAL, SENSITIVE))
    files = ProtectedFiles(keyring)
    assert files.read(path, ["year", "newer"]).equals(TABLE.select(["year"]))
    assert files.readable_columns(path) == ["year"]
    for columns in (None, ["year", "note"], ["illness"]):
        with pytest.raises(AccessDenied):
            files.read(path, columns)


def test_a_revoked_key_closes_its_columns_for_good(keyring: Counted, path: str) -> None:
    """At once in a new process; the other columns stay."""
    keyring.revoke(SENSITIVE)
    files = ProtectedFiles(keyring)
    with pytest.raises(KeyRevoked):
        files.read(path, ["illness"])
    assert files.read(path, ["year"]).num_rows == 500
    assert files.readable_columns(path) == ["id", "name", "year", "note"]


@pytest.mark.parametrize("pause_s", [0.0, 0.3], ids=["busy", "idle"])
def test_who_goes_on_reading_is_refused_within_the_caches_lifetime(
    keyring: Counted, path: str, pause_s: float
) -> None:
    """However often he reads, and however long he waits in between: Arrow's own cache would let him go on."""
    lifetime_s = 0.2
    files = ProtectedFiles(keyring, cache_s=lifetime_s)
    files.read(path)
    keyring.revoke(SENSITIVE)
    revoked = time.monotonic()

    def go_on() -> None:
        while (begun := time.monotonic()) < revoked + 20:
            time.sleep(pause_s)
            files.read(path, ["illness"])
            assert begun < revoked + lifetime_s, "read after the key should have been forgotten"

    with pytest.raises(KeyRevoked):
        go_on()


def test_who_goes_on_writing_is_refused_too(keyring: Counted, tmp_path: Path) -> None:
    """What he wrote could not be read again."""
    files = ProtectedFiles(keyring, cache_s=0)
    files.write(TABLE, str(tmp_path / "a"), PROTECTION)
    keyring.revoke(SENSITIVE)
    with pytest.raises(KeyRevoked):
        files.write(TABLE, str(tmp_path / "b"), PROTECTION)


def test_threads_share_a_reader_whose_keys_are_forgotten_meanwhile(keyring: Counted, path: str) -> None:
    """None of them fails."""
    files = ProtectedFiles(keyring, cache_s=0)
    wrong: list[BaseException] = []

    def read() -> None:
        try:
            assert all(files.read(path).equals(TABLE) for _ in range(20))
        except BaseException as error:  # noqa: BLE001
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("error", [TimeoutError("late"), ConnectionResetError(104, "gone")])
def test_a_key_store_that_fails_is_not_taken_for_a_damaged_file(
    keyring: Counted, path: str, error: Exception
) -> None:
    """Nobody should restore a backup because of it."""
    keyring.broken = error
    with pytest.raises(KeyStoreUnavailable, match="features/people"):
        ProtectedFiles(keyring).read(path)


def test_a_path_that_is_no_file_is_not_taken_for_a_damaged_one(keyring: Counted, tmp_path: Path) -> None:
    """The file system's own error comes through."""
    with pytest.raises(IsADirectoryError):
        ProtectedFiles(keyring).read(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        ProtectedFiles(keyring).read(str(tmp_path / "none"))


def test_a_rotated_key_reads_old_files_and_rewrites_them(keyring: Counted, path: str, tmp_path: Path) -> None:
    """The key store keeps the old version; the new file is under the new one at once, cache or not."""
    files = ProtectedFiles(keyring)
    files.write(TABLE, path, PROTECTION)
    keyring.rotate(PERSONAL)
    newer = str(tmp_path / "newer.parquet")
    files.reprotect(path, newer, PROTECTION, was=PROTECTION)
    assert files.read(newer, protection=PROTECTION).equals(TABLE)
    versions = [
        {key: wrapped.split(":")[1] for key, wrapped in files.keys(name).wrapped.items()}
        for name in (path, newer)
    ]
    assert versions == [
        {INTERNAL: "v1", PERSONAL: "v1", SENSITIVE: "v1"},
        {INTERNAL: "v1", PERSONAL: "v2", SENSITIVE: "v1"},
    ]


def test_without_its_key_nothing_is_written(keyring: Counted, tmp_path: Path) -> None:
    """The error names the key, and no file is left."""
    other = Protection(default="features/unknown/internal")
    with pytest.raises(KeyNotFound, match="features/unknown"):
        ProtectedFiles(keyring).write(TABLE, str(tmp_path / "x" / "none.parquet"), other)
    assert not (tmp_path / "x").exists()


def test_a_process_asks_the_key_store_once_for_each_key(keyring: Counted, tmp_path: Path) -> None:
    """However many files of one writer it reads."""
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
from cluster.security.encryption.parquet import ProtectedFiles
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
