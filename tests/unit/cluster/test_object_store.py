"""Files in an object store: written in one request, seen at once by others, and created by one writer only."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pyarrow as pa
import pytest

from cluster import storage
from cluster.errors import ConfigError
from cluster.node.exclusive_writes import require_exclusive_writes
from cluster.settings import StorageConfig
from tests.servers.object_store import object_store_environment


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store_environment() as uri:
        yield uri


def test_files_round_trip(bucket: str) -> None:
    table = pa.table({"a": [1, 2]})
    storage.write_parquet(table, f"{bucket}/t/part.parquet")
    [uri] = storage.list_files(f"{bucket}/t", ".parquet")
    assert uri == f"{bucket}/t/part.parquet"
    assert storage.read_parquet(uri).equals(table)
    assert storage.exists(uri)
    assert storage.list_files(f"{bucket}/none") == []


def test_file_of_another_writer_is_seen_at_once(bucket: str) -> None:
    """Listings are not cached."""
    storage.write_bytes(f"{bucket}/seen/1", b"")
    assert len(storage.list_files(f"{bucket}/seen")) == 1
    assert not storage.exists(f"{bucket}/seen/2")
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(f"{bucket}/seen/2", b"")
    assert len(storage.list_files(f"{bucket}/seen")) == 2
    assert storage.exists(f"{bucket}/seen/2")


def test_write_leaves_no_temporary_file(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/once/file", b"1")
    storage.write_bytes(f"{bucket}/once/file", b"2")
    assert storage.list_files(f"{bucket}/once") == [f"{bucket}/once/file"]
    assert storage.read_bytes(f"{bucket}/once/file") == b"2"


def test_store_with_exclusive_writes_is_accepted(bucket: str) -> None:
    require_exclusive_writes(f"{bucket}/project")
    assert storage.list_files(f"{bucket}/project/.falaj-write-check") == []


def test_store_without_exclusive_writes_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example is a store that ignores If-None-Match."""
    fs, _ = storage.file_system(bucket)
    plain = fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda path, data, mode="": plain(path, data))
    with pytest.raises(ConfigError, match="let two writers create the same file"):
        require_exclusive_writes(f"{bucket}/project")


def test_unreachable_store_is_refused(bucket: str) -> None:
    with pytest.raises(ConfigError, match="Check bucket and credentials"):
        require_exclusive_writes("s3://no-such-bucket/project")


def test_state_of_this_machine_stays_on_its_disk() -> None:
    """Keys, certificates and the edge's files never go into the object store."""
    places = storage.layout(StorageConfig(root="s3://falaj/project"))
    disk = f"{storage.project_root()}/.falaj"
    assert (places.keys, places.tls, places.runs) == (f"{disk}/keys", f"{disk}/tls", f"{disk}/runs")
    assert places.features("income") == "s3://falaj/project/features/income"
    elsewhere = storage.layout(StorageConfig(root="s3://falaj/project", local="/var/lib/falaj"))
    assert elsewhere.keys == "/var/lib/falaj/keys"
    with pytest.raises(ConfigError, match=r"storage\.local"):
        storage.layout(StorageConfig(root="s3://falaj/a", local="s3://falaj/b"))
