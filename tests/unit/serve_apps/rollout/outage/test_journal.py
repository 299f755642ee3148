"""The journal keeps complete and authentic rollbacks, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from serve_apps.rollout.outage.journal import RESERVED_BYTES, Journal
from tests.samples.journaled import KEY, ROLLBACK, journaled, new_journal
from tests.servers.small_disk import fill_disk, mounted_small_disk

OTHER = replace(ROLLBACK, id="2", rollout="r2", reasons=["breaker: ü"])


def test_rollbacks_are_read_in_their_order(tmp_path: Path) -> None:
    """Only the owner can use the file. An empty journal has no rollback, and neither has a missing one."""
    journal = new_journal(tmp_path)
    assert journal.read() == ()
    journal.reserve()
    assert journal.read() == ()
    for rollback in (ROLLBACK, OTHER):
        journal.append(rollback)
    assert journal.read() == (ROLLBACK, OTHER)
    status = (tmp_path / "rollbacks.journal").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o600, RESERVED_BYTES)


def test_line_that_was_cut_at_any_byte_is_no_rollback(tmp_path: Path) -> None:
    """The rollback before it stays, and the next one replaces it."""
    file = tmp_path / "rollbacks.journal"
    first = len(journaled(tmp_path).content())
    journal = new_journal(tmp_path)
    journal.append(OTHER)
    content = file.read_bytes()
    for end in range(first, len(content), 7):
        file.write_bytes(content[:end] + bytes(20))
        assert journal.read() == (ROLLBACK,)
        journal.append(replace(OTHER, id=str(end)))
        assert [one.id for one in journal.read()] == ["1", str(end)]


def test_line_of_another_key_is_no_rollback(tmp_path: Path) -> None:
    """Neither is one that was altered."""
    journaled(tmp_path)
    file = tmp_path / "rollbacks.journal"
    assert Journal(file, b"other").read() == ()
    file.write_bytes(file.read_bytes().replace(b'"fallback":1', b'"fallback":3'))
    assert Journal(file, KEY).read() == ()


def test_clear_leaves_a_rollback_that_was_not_settled(tmp_path: Path) -> None:
    """A rollback can be written while the others are appended to the ledger."""
    journal = journaled(tmp_path)
    settled = journal.read()
    journal.append(OTHER)
    journal.clear(settled)
    assert journal.read() == (ROLLBACK, OTHER)
    journal.clear((ROLLBACK, OTHER))
    assert journal.read() == ()


def test_file_that_other_users_can_use_is_refused(tmp_path: Path) -> None:
    """So is a link."""
    journal, file = journaled(tmp_path), tmp_path / "rollbacks.journal"
    file.chmod(0o660)
    for use in (journal.read, lambda: journal.append(OTHER)):
        with pytest.raises(ConfigError, match="Other users of this machine"):
            use()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        journal.read()


def test_rollback_is_written_to_a_full_disk(tmp_path: Path) -> None:
    """Its room was reserved."""
    with mounted_small_disk(tmp_path / "disk") as disk:
        journal = new_journal(disk)
        journal.reserve()
        fill_disk(disk / "full")
        journal.append(ROLLBACK)
        assert journal.read() == (ROLLBACK,)
