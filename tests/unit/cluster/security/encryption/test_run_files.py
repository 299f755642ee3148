"""Tests of a run's files in the object store: a double of S3, and Arrow's copies as Ray Train makes them."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as arrow
import pytest

from cluster.errors import ArtifactTampered
from cluster.security.encryption.envelope import is_sealed
from cluster.security.encryption.run_files import KEEP_S, RunKey, SealedFiles, run_folder
from cluster.storage import Layout, exists, file_system
from tests.servers.object_store import object_store_environment

SECRET = b"weights of the network " * 100_000
"""More than one chunk of an envelope."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store_environment() as uri:
        yield uri


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a folder with two files, one in a folder of its own."""
    folder = tmp_path / "checkpoint"
    (folder / "rank0").mkdir(parents=True)
    (folder / "weights").write_bytes(SECRET)
    (folder / "rank0" / "state").write_bytes(b"")
    return folder


def test_files_are_encrypted_in_the_store_and_readable_on_other_nodes(
    bucket: str, checkpoint: Path, tmp_path: Path
) -> None:
    """The file system arrives pickled. At the end of the run nothing is left."""
    base = file_system(bucket)[0]
    with run_folder(Layout(bucket, str(tmp_path)), for_all_nodes=True) as runs:
        store = runs.file_system
        assert store is not None
        path = f"{runs.path}/epoch0"
        arrow.copy_files(str(checkpoint), path, destination_filesystem=store)
        stored = base.cat_file(f"{path}/weights")
        assert is_sealed(stored)
        assert b"weights of" not in stored
        elsewhere = pickle.loads(pickle.dumps(store))  # noqa: S301 (own data)
        arrow.copy_files(path, str(tmp_path / "copy"), source_filesystem=elsewhere)
        assert (tmp_path / "copy" / "weights").read_bytes() == SECRET
        assert (tmp_path / "copy" / "rank0" / "state").read_bytes() == b""
        store.delete_dir(path)
        assert store.get_file_info(path).type is arrow.FileType.NotFound
    assert not exists(f"{bucket}/runs")


def test_an_altered_or_moved_file_is_refused(bucket: str, checkpoint: Path, tmp_path: Path) -> None:
    """A user who can write to the bucket cannot give a training another checkpoint."""
    base = file_system(bucket)[0]
    with run_folder(Layout(bucket, str(tmp_path)), for_all_nodes=True) as runs:
        store = runs.file_system
        assert store is not None
        arrow.copy_files(str(checkpoint), runs.path, destination_filesystem=store)
        stored = base.cat_file(f"{runs.path}/weights")
        base.pipe_file(f"{runs.path}/moved", stored)
        base.pipe_file(f"{runs.path}/weights", stored[:-1])
        for name in ("moved", "weights"):
            with pytest.raises(ArtifactTampered):
                store.open_input_stream(f"{runs.path}/{name}")


def test_what_killed_runs_left_is_removed_later(bucket: str, tmp_path: Path) -> None:
    """A run that could still be alive keeps its files."""
    base, parent = file_system(f"{bucket}/runs")
    now = 2_000_000_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.security.encryption.run_files.time.time", lambda: now)
        for started in (now - KEEP_S - 1, now - KEEP_S + 60):
            base.pipe_file(f"{parent}/{started}-x/file", b"")
        with run_folder(Layout(bucket, str(tmp_path)), for_all_nodes=True):
            names = [path.rpartition("/")[2] for path in base.ls(parent, detail=False)]
    assert names == [f"{now - KEEP_S + 60}-x"]


def test_on_one_machine_the_files_are_on_its_disk(bucket: str, tmp_path: Path) -> None:
    """No other node needs them."""
    for places in (Layout(bucket, str(tmp_path)), Layout(str(tmp_path))):
        with run_folder(places, for_all_nodes=places.shared is None) as runs:
            assert runs.file_system is None
            assert Path(runs.path).is_relative_to(tmp_path / "runs")


def test_an_incomplete_file_is_not_written(bucket: str) -> None:
    """An error in the middle, or a file that is never closed, leaves nothing that looks like a complete file."""
    files = SealedFiles(bucket, RunKey(bytes(32)))
    path = f"{file_system(bucket)[1]}/half"
    file = files.open(path, "wb")
    file.write(b"half")
    with pytest.raises(RuntimeError, match="disk"), file:
        raise RuntimeError("disk")
    file = files.open(path, "wb")
    file.write(b"half")
    del file
    gc.collect()
    assert not files.exists(path)


def test_a_failed_write_is_not_repeated(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets the error once; the garbage collector does not write the file later."""
    files = SealedFiles(bucket, RunKey(bytes(32)))
    tried: list[int] = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise OSError("no connection")

    monkeypatch.setattr(SealedFiles, "_write", fail)
    file = files.open(f"{file_system(bucket)[1]}/lost", "wb")
    with pytest.raises(OSError, match="no connection"):
        file.close()
    del file
    gc.collect()
    assert tried == [1]


def test_the_key_is_not_shown(bucket: str) -> None:
    """A log, an error or fsspec's JSON of the file system does not contain the key."""
    files = SealedFiles(bucket, RunKey(b"k" * 32))
    for text in (repr(files), str(files.storage_options), str(files.storage_args)):
        assert "kkkk" not in text
    with pytest.raises(TypeError, match="RunKey"):
        files.to_json()
