"""Segments of the LMDB store: every row is found, no other row is, and old files are deleted."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ArtifactTampered, OnlineStoreUnavailable
from cluster.storage import Layout
from feature_jobs.store.online import lmdb_engine as online_lmdb
from feature_jobs.store.online.reader import open_online_store
from feature_jobs.store.online.rows import OnlineRow
from feature_jobs.store.online.segment import Segment, write
from feature_jobs.store.online.store import OnlineStore
from tests.projects.online import SMALL, online_keys, open_store
from tests.projects.views import make_spec

heads = st.sampled_from([bytes(8), b"\xff" * 8, b"\x80" + bytes(7), b"\x7f" * 8]) | st.binary(
    min_size=8, max_size=8
)
addresses = st.builds(
    lambda head, rest: head + bytes(7) + bytes([rest]), heads, st.integers(0, 3)
)  # many begin alike
VIEW = make_spec("v", ["id"], amount="float64")
KEY_TYPES = {"id": "int64"}
PEOPLE = [(number,) for number in range(12)]


@given(st.dictionaries(addresses, st.binary(max_size=70), max_size=40), st.lists(addresses), st.randoms())
def test_every_row_is_found_and_no_other(
    rows: dict[bytes, bytes], others: list[bytes], order: random.Random
) -> None:
    """One by one and in batches, also for addresses with common first bytes."""
    requests = [*rows, *others]
    order.shuffle(requests)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "rows", rows.items())
        segment = Segment(Path(folder) / "rows")
        expected = [rows.get(address) for address in requests]
        assert segment.rows(requests) == expected
        assert [segment.rows([address])[0] for address in requests] == expected


@pytest.mark.parametrize("content", [b"", b"x" * 100, None], ids=["empty", "another's", "cut off"])
def test_incomplete_segment_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """The error tells the operator to materialise again."""
    path = tmp_path / "rows"
    write(path, [(bytes(16), b"row")])
    path.write_bytes(path.read_bytes()[8:] if content is None else content)
    with pytest.raises(OnlineStoreUnavailable, match="Materialise its view again"):
        Segment(path)


def rows(value: float) -> Iterator[OnlineRow]:
    """Return rows of all entities."""
    for key in PEOPLE:
        yield OnlineRow(keys=key, event_us=int(value), created_us=int(value), seq=0, values=(value,))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[OnlineStore]:
    with contextlib.closing(open_store(tmp_path, online_keys(tmp_path, "v"))) as opened:
        yield opened


def amounts(store: OnlineStore) -> list[float | None]:
    return [None if row_found is None else row_found[3][0] for row_found in store.get(VIEW, PEOPLE)]


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "online").glob("*.rows"))


def test_materialisation_deletes_all_other_segments(store: OnlineStore, tmp_path: Path) -> None:
    """Segments of earlier, failed and killed materialisations are deleted."""
    store.replace(VIEW, KEY_TYPES, rows(1))
    (first,) = files(tmp_path)
    (tmp_path / "online" / "v.0123456789abcdef.rows").write_bytes(b"of one that was killed")
    (tmp_path / "online" / "v2.0123456789abcdef.rows").write_bytes(b"another view's")
    store.replace(VIEW, KEY_TYPES, rows(2))
    left, other = files(tmp_path)
    assert left != first
    assert other.name.startswith("v2.")
    assert amounts(store) == [2.0] * len(PEOPLE)


def test_newer_put_takes_precedence_over_the_segment(store: OnlineStore) -> None:
    """A deletion too. An older row changes nothing, and the next materialisation replaces the puts."""
    store.replace(VIEW, KEY_TYPES, rows(5))
    assert amounts(store) == [5.0] * len(PEOPLE)
    new, old = next(rows(6)), list(rows(4))[1]
    deleted_row = OnlineRow(keys=PEOPLE[2], event_us=6, created_us=6, seq=0, values=(), deleted=True)
    assert store.put(VIEW, KEY_TYPES, [new, old, deleted_row]) == 2
    assert amounts(store) == [6.0, 5.0, None, *[5.0] * (len(PEOPLE) - 3)]
    store.replace(VIEW, KEY_TYPES, rows(7))
    assert amounts(store) == [7.0] * len(PEOPLE)


def test_reader_without_its_segment_reads_the_next_one(store: OnlineStore, tmp_path: Path) -> None:
    """Between reading the meta and opening the file, another materialisation has switched."""
    store.replace(VIEW, KEY_TYPES, rows(1))
    reader = OnlineStore(store.engine, store._keys)
    opened = reader._generation(VIEW)
    store.replace(VIEW, KEY_TYPES, rows(2))
    assert opened is not None
    assert store.engine.rows("v", opened.stamp, [bytes(16)]) is None
    assert amounts(reader) == [2.0] * len(PEOPLE)


def test_deleted_segment_is_reported(tmp_path: Path, store: OnlineStore) -> None:
    """The error has the path and the command, instead of missing values."""
    store.replace(VIEW, KEY_TYPES, rows(1))
    files(tmp_path)[0].unlink()
    store.engine._bases.clear()  # type: ignore[attr-defined]  # as in another process
    with pytest.raises(OnlineStoreUnavailable, match=r"feature_jobs\.materialize view=v"):
        amounts(store)


def test_recreated_folder_is_opened_again(
    store: OnlineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica reads the rows of the deleted file until there is a new one, and writes none."""
    monkeypatch.setattr(online_lmdb, "CHECK_FILE_S", 0.0)
    store.replace(VIEW, KEY_TYPES, rows(1))
    assert amounts(store) == [1.0] * len(PEOPLE)
    shutil.rmtree(tmp_path / "online")
    assert amounts(store) == [1.0] * len(PEOPLE)
    with pytest.raises(OnlineStoreUnavailable, match=r"data\.mdb was deleted, .* view=all"):
        store.put(VIEW, KEY_TYPES, list(rows(2)))

    materialisation = open_store(tmp_path, store._keys)  # type: ignore[arg-type]
    materialisation.replace(VIEW, KEY_TYPES, rows(3))
    materialisation.close()
    assert amounts(store) == [3.0] * len(PEOPLE)
    assert store.put(VIEW, KEY_TYPES, list(rows(4))) == len(PEOPLE)
    assert amounts(store) == [4.0] * len(PEOPLE)


def test_full_disk_leaves_the_old_rows(
    store: OnlineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No partial file remains."""
    store.replace(VIEW, KEY_TYPES, rows(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OnlineStoreUnavailable, match="No space left"):
            store.replace(VIEW, KEY_TYPES, rows(2))
    assert len(files(tmp_path)) == 1
    assert amounts(store) == [1.0] * len(PEOPLE)


def test_altered_value_in_the_segment_is_refused(store: OnlineStore, tmp_path: Path) -> None:
    """In a batch and alone."""
    store.replace(VIEW, KEY_TYPES, rows(1))
    store.close()
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    opened = open_online_store(SMALL, Layout(str(tmp_path)), store._keys)
    for requests in (PEOPLE, PEOPLE[:1]):
        with pytest.raises(ArtifactTampered):
            opened.read(VIEW, requests)
    opened.close()
