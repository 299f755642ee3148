"""A batch of online rows that is unpacked by column: the same values as row by row, and no altered value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ArtifactTampered
from cluster.security.encryption.envelope import ValueCipher
from feature_jobs.store.online.rows import BLOCK_ROWS, Layout, OnlineRow, RowCipher

LAYOUTS = [
    Layout(version, [(name, "float64", "internal") for name in names])
    for version, names in (("v1", "ab"), ("v2", "abc"))
]
PLANS = [layout.plan([("a", "float64"), ("b", "float64")]) for layout in LAYOUTS]
CIPHER = RowCipher("v", bytes(32), {"internal": ValueCipher(bytes(32))})
COUNT = BLOCK_ROWS + 1
ADDRESSES = list(CIPHER.addresses([(number,) for number in range(COUNT)]))
times = st.integers(-(2**63), 2**63 - 1)


def packed(index: int, *, event_us: int = 5, created_us: int = 5, layout: int = 0) -> bytes:
    values = [float(index), 0.5, 0.25][: 2 + layout]
    row = OnlineRow(keys=(index,), event_us=event_us, created_us=created_us, seq=7, values=values)
    return CIPHER.pack(ADDRESSES[index], row, LAYOUTS[layout], layout)


@given(st.lists(st.tuples(times, times), min_size=COUNT, max_size=COUNT), times, times)
def test_block_equals_its_rows(moments: list[tuple[int, int]], oldest: int, newest: int) -> None:
    """Values, event time and availability, up to the ends of their range."""
    rows = [
        packed(index, event_us=event, created_us=created) for index, (event, created) in enumerate(moments)
    ]
    block = CIPHER.block(ADDRESSES, rows, PLANS)
    alone = [row for row in CIPHER.unpack(ADDRESSES, rows, PLANS) if row is not None]
    assert block is not None
    assert list(block.times()) == [row[:2] for row in alone]
    assert list(zip(*block.columns, strict=True)) == [tuple(row[3]) for row in alone]
    assert block.within(oldest, newest) == all(row[0] >= oldest and row[1] <= newest for row in alone)


def flipped(row: bytes, index: int) -> bytes:
    return row[:index] + bytes([row[index] ^ 1]) + row[index + 1 :]


@pytest.mark.parametrize(
    "altered",
    [
        lambda rows: [flipped(rows[0], 7), *rows[1:]],
        lambda rows: [*rows[:3], flipped(rows[3], 30), *rows[4:]],
        lambda rows: [*rows[:-1], flipped(rows[-1], len(rows[-1]) - 1)],
        lambda rows: [rows[1], rows[0], *rows[2:]],
        lambda rows: [rows[0] + b"\0", rows[1][:-1], *rows[2:]],
        lambda rows: [rows[0], b"", *rows[2:]],
    ],
    ids=["header", "nonce", "content", "exchanged", "shifted", "emptied"],
)
def test_altered_row_prevents_reading_its_batch(
    altered: Callable[[list[bytes]], list[bytes]],
) -> None:
    """`block` returns None, and `unpack` names the altered row."""
    rows = altered([packed(index) for index in range(COUNT)])
    assert CIPHER.block(ADDRESSES, rows, PLANS) is None
    with pytest.raises(ArtifactTampered):
        CIPHER.unpack(ADDRESSES, rows, PLANS)


def test_rows_of_two_versions_are_read_by_row() -> None:
    """Each row is read by the layout of its version."""
    rows = [packed(index, layout=index % 2) for index in range(COUNT)]
    assert CIPHER.block(ADDRESSES, rows, PLANS) is None
    unpacked = CIPHER.unpack(ADDRESSES, rows, PLANS)
    assert [list(row[3]) for row in unpacked if row] == [[float(index), 0.5] for index in range(COUNT)]
