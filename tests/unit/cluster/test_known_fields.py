"""What a later release has stored can be read: its new fields are left out."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from cluster.known_fields import known_fields
from cluster.records.table import Compaction
from cluster.registry import Lineage


class Pair(NamedTuple):
    """A named tuple, as tables have them."""

    one: int
    other: int


@pytest.mark.parametrize(
    ("cls", "stored"),
    [
        (Lineage, {"training_set_hash": "t", "seed": 7}),
        (Compaction, dict.fromkeys(Compaction.__dataclass_fields__, 1)),
        (Pair, {"one": 1, "other": 2}),
    ],
)
def test_fields_of_a_later_release_are_left_out(cls: type[Any], stored: dict[str, Any]) -> None:
    """Fields that this release knows keep their values, and the class accepts them."""
    known = known_fields(cls, stored | {"of_a_later_release": 2})
    assert known == stored
    assert all(getattr(cls(**known), name) == value for name, value in stored.items())
