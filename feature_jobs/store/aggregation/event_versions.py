"""Versions of one event: their order, and which of them a read may still need.

A pushed version first has a provisional sequence number, which is greater than all final numbers. Until it gets its
final number, its order among the versions with the same created time is not known. So those versions are kept too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from feature_jobs.store.types.schema import PROVISIONAL


class Version(NamedTuple):
    """One version of an event. The field order is the packed format, and sorts versions by (created, seq)."""

    created_us: int
    seq: int
    event_us: int
    values: list[Any] | None
    """None for a tombstone."""

    @property
    def known_us(self) -> int:
        """When the version became known."""
        return max(self.created_us, self.event_us)

    @property
    def order(self) -> tuple[int, int]:
        """The order of an event's versions. It also identifies a version."""
        return self.created_us, self.seq


class Event(NamedTuple):
    """An event with the versions that a read at some instant may need. The field order is the packed format."""

    event_id: int | str
    last_us: int
    """When the event's last version became known, including versions that were dropped."""
    versions: list[Version]
    """Sorted by (created, seq)."""

    @property
    def newest(self) -> Version:
        """The version that a read uses when all versions are known."""
        return self.versions[-1]

    @classmethod
    def from_lists(cls, event_id: int | str, last_us: int, versions: list[list[Any]]) -> Event:
        """Rebuild an event from its unpacked lists."""
        return cls(event_id, last_us, [Version(*fields) for fields in versions])


def with_version(event: Event, version: Version, previous_seq: int | None) -> Event:
    """Add a version to an event, drop the versions that no read can use at any instant, and return the result.

    Args:
        event: The event.
        version: The version to add.
        previous_seq: The version's provisional number, if it was stored with one.
    """
    others = [other for other in event.versions if other.order != (version.created_us, previous_seq)]
    if not any(other.order == version.order for other in others):
        others.append(version)
    counting: list[Version] = []
    for other in sorted(others, reverse=True):
        if all(other.known_us < later.known_us or not _order_is_final(later, other) for later in counting):
            counting.append(other)
    return Event(event.event_id, max(event.last_us, version.known_us), counting[::-1])


def _order_is_final(later: Version, earlier: Version) -> bool:
    """Return whether the order of two versions stays the same when both have their final numbers."""
    return later.created_us > earlier.created_us or not later.seq >= PROVISIONAL > earlier.seq


def newest_versions(versions: list[Version]) -> list[Version]:
    """Return the last version, and each version that may come after it when its provisional number becomes final."""
    last = versions[-1]
    return [version for version in versions if version is last or not _order_is_final(last, version)]
