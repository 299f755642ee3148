"""Protected Parquet: without a key only public columns can be read, and damage is always detected."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import AccessDenied
from cluster.security.encryption.parquet import ProtectedFileCorrupt, ProtectedFiles, Protection
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
    """A keyring that counts its calls and denies selected keys."""

    def __init__(self, path: Path) -> None:
        Keyring.create(path, b"k" * 32)
        super().__init__(path, b"k" * 32)
        self.calls: Counter[str] = Counter()
        self.denied: set[str] = set()
        self.broken: Exception | None = None

    def wrap(self, name: str, secret: bytes) -> str:
        self.calls[f"wrap {name}"] += 1
        return super().wrap(name, secret)

    def unwrap(self, name: str, wrapped: str) -> bytes:
        self.calls[f"unwrap {name}"] += 1
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
    """A protected file."""
    path = str(tmp_path / "people.parquet")
    assert ProtectedFiles(keyring).write(TABLE, path, PROTECTION) == Path(path).stat().st_size
    return path


def test_read_with_the_keys_returns_all_columns(keyring: Counted, path: str) -> None:
    """All columns or selected ones. Unknown columns are left out."""
    files = ProtectedFiles(keyring)
    assert files.read(path).equals(TABLE)
    assert files.read(path, ["illness", "id", "newer"]).equals(TABLE.select(["illness", "id"]))


def test_open_file_is_read_by_row_group(keyring: Counted, tmp_path: Path) -> None:
    """A file with more than a million rows has two row groups, counted without a key. Keys are checked at each read."""
    path, rows = str(tmp_path / "many.parquet"), 2**20 + 5
    numbers = pa.array(range(rows), pa.int64())
    many = pa.table({"illness": numbers, "year": numbers.cast(pa.int32())})
    ProtectedFiles(keyring).write(many, path, PROTECTION, place="here")
    keyring.denied.add(SENSITIVE)
    with ProtectedFiles(keyring).open(path, protection=PROTECTION, place="here") as file:
        assert file.num_row_groups == 2
        assert file.read(["year"], row_group=1).equals(many.select(["year"]).slice(2**20))
        with pytest.raises(AccessDenied):
            file.read(["illness"], row_group=1)
    keyring.denied.clear()
    with ProtectedFiles(keyring).open(path, protection=PROTECTION, place="here") as file:
        assert file.read(["illness"], row_group=1).equals(many.select(["illness"]).slice(2**20))
    with (
        pytest.raises(ProtectedFileCorrupt, match="belongs at"),
        ProtectedFiles(keyring).open(path, protection=PROTECTION, place="there") as file,
    ):
        file.read(["year"], row_group=0)


def test_other_tools_read_only_the_public_columns(path: str) -> None:
    """Without keys and without our code."""
    years = TABLE["year"].to_pylist()
    assert pq.read_table(path, columns=["year"])["year"].to_pylist() == years
    assert pl.read_parquet(path, columns=["year"])["year"].to_list() == years
    assert duckdb.sql(f"SELECT count(*) FROM '{path}' WHERE year = 2000").fetchall() == [(100,)]
    for column in ("id", "name", "illness", "note"):
        with pytest.raises(OSError, match="decrypt"):
            pq.read_table(path, columns=[column])


def test_file_contains_no_value_and_no_statistic_of_a_protected_column(path: str) -> None:
    """Dictionary pages contain none, either."""
    content = Path(path).read_bytes()
    assert b"canary" not in content
    assert (499).to_bytes(8, "little") not in content
    assert (2004).to_bytes(4, "little") in content, "the control: a public column's maximum is there"


@pytest.mark.parametrize(
    ("withdraw", "error"),
    [
        (lambda keyring: keyring.denied.add(SENSITIVE), AccessDenied),
        (lambda keyring: keyring.revoke(SENSITIVE), KeyRevoked),
    ],
    ids=["denied", "revoked"],
)
def test_column_without_its_key_raises_and_others_can_be_read(
    keyring: Counted, path: str, withdraw: Callable[[Counted], None], error: type[Exception]
) -> None:
    """The error is the key store's own."""
    withdraw(keyring)
    files = ProtectedFiles(keyring)
    for columns in (None, ["illness"]):
        with pytest.raises(error, match=SENSITIVE):
            files.read(path, columns)
    assert files.read(path, ["name", "year"]).equals(TABLE.select(["name", "year"]))
    assert files.readable_columns(path) == ["id", "name", "year", "note"]


def test_public_columns_need_no_key(keyring: Counted, path: str) -> None:
    """Even the key of the footer is not needed."""
    keyring.denied.update((INTERNAL, PERSONAL, SENSITIVE))
    files = ProtectedFiles(keyring)
    assert files.read(path, ["year", "newer"]).equals(TABLE.select(["year"]))
    assert files.readable_columns(path) == ["year"]
    for columns in (None, ["year", "note"], ["illness"]):
        with pytest.raises(AccessDenied):
            files.read(path, columns)


@pytest.mark.parametrize("pause_s", [0.0, 0.3], ids=["busy", "idle"])
def test_revocation_stops_readers_within_the_cache_lifetime(
    keyring: Counted, path: str, pause_s: float
) -> None:
    """For busy and idle readers. Arrow's own cache would keep the key."""
    lifetime_s = 0.2
    files = ProtectedFiles(keyring, cache_s=lifetime_s)
    files.read(path)
    keyring.revoke(SENSITIVE)
    revoked = time.monotonic()

    def read_until_refused() -> None:
        while (started := time.monotonic()) < revoked + 20:
            time.sleep(pause_s)
            files.read(path, ["illness"])
            assert started < revoked + lifetime_s, "read after the key should have been forgotten"

    with pytest.raises(KeyRevoked):
        read_until_refused()


def test_revocation_stops_writers(keyring: Counted, tmp_path: Path) -> None:
    """Nobody could read files that are written after a revocation."""
    files = ProtectedFiles(keyring, cache_s=0)
    files.write(TABLE, str(tmp_path / "a"), PROTECTION)
    keyring.revoke(SENSITIVE)
    with pytest.raises(KeyRevoked):
        files.write(TABLE, str(tmp_path / "b"), PROTECTION)


def test_threads_share_a_reader_whose_cache_is_cleared(keyring: Counted, path: str) -> None:
    files = ProtectedFiles(keyring, cache_s=0)
    with ThreadPoolExecutor(4) as threads:
        assert all(table.equals(TABLE) for table in threads.map(files.read, [path] * 80))


@pytest.mark.parametrize("error", [TimeoutError("late"), ConnectionResetError(104, "gone")])
def test_failing_key_store_is_not_reported_as_damage(keyring: Counted, path: str, error: Exception) -> None:
    """A damage report would ask for a backup."""
    keyring.broken = error
    with pytest.raises(KeyStoreUnavailable, match="features/people"):
        ProtectedFiles(keyring).read(path)


def test_missing_file_is_not_reported_as_damage(keyring: Counted, tmp_path: Path) -> None:
    """The error of the file system is raised."""
    with pytest.raises(IsADirectoryError):
        ProtectedFiles(keyring).read(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        ProtectedFiles(keyring).read(str(tmp_path / "none"))


def test_reprotect_uses_the_newest_key_version(keyring: Counted, path: str, tmp_path: Path) -> None:
    """The old version still reads the old file. The cache does not delay the new version."""
    files = ProtectedFiles(keyring)
    files.write(TABLE, path, PROTECTION)
    keyring.rotate(PERSONAL)
    newer = str(tmp_path / "newer.parquet")
    files.reprotect(path, newer, PROTECTION, was=PROTECTION)
    assert files.read(newer, protection=PROTECTION).equals(TABLE)
    for file, version in ((path, "v1"), (newer, "v2")):
        versions = {key: wrapped.split(":")[1] for key, wrapped in files.keys(file).wrapped.items()}
        assert versions == {INTERNAL: "v1", PERSONAL: version, SENSITIVE: "v1"}


def test_unknown_key_writes_nothing(keyring: Counted, tmp_path: Path) -> None:
    """The error names the key, and no file is left."""
    other = Protection(default="features/unknown/internal")
    with pytest.raises(KeyNotFound, match="features/unknown"):
        ProtectedFiles(keyring).write(TABLE, str(tmp_path / "x" / "none.parquet"), other)
    assert not (tmp_path / "x").exists()


def test_key_store_is_called_once_per_key(keyring: Counted, tmp_path: Path) -> None:
    """Holds for several files of one writer."""
    files, reader = ProtectedFiles(keyring), ProtectedFiles(keyring)
    for number in range(5):
        files.write(TABLE, str(tmp_path / f"{number}.parquet"), PROTECTION)
    for number in range(5):
        reader.read(str(tmp_path / f"{number}.parquet"))
    assert set(keyring.calls.values()) == {1}
    assert len(keyring.calls) == 6


def test_protection_can_be_pickled() -> None:
    """Workers receive it. A column that is not named has the default key."""
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


def test_damage_is_refused_and_never_misread(keyring: Counted, path: str, tmp_path: Path) -> None:
    """Bit flips and truncations at many positions, in a separate process, because Arrow could end it."""
    arguments = [str(tmp_path / "keyring.json"), path, str(tmp_path / "bad.parquet")]
    done = subprocess.run(
        [sys.executable, "-c", READER, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    refused, tried = map(int, done.stdout.split())
    assert refused > 0.9 * tried
