"""Tests of the Merkle tree over the ledger's events."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import ClusterStopped
from cluster.ledger.merkle import Tree, TreeHead, is_included, tree_of


def leaf(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def entry(seq: int) -> Entry:
    return Entry(seq=seq, time="", type="t", actor="a", payload={}, prev_hash="", hash=leaf(seq))


def root_by_definition(hashes: list[str]) -> bytes:
    """Return the root as RFC 9162, section 2.1.1 defines it, by recursion."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashlib.sha256(b"\x00" + bytes.fromhex(hashes[0])).digest()
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    left, right = root_by_definition(hashes[:split]), root_by_definition(hashes[split:])
    return hashlib.sha256(b"\x01" + left + right).digest()


@given(size=st.integers(0, 70))
def test_the_root_is_the_one_of_the_rfc(size: int) -> None:
    """The levels give the same root as the recursive definition."""
    hashes = [leaf(seq) for seq in range(1, size + 1)]
    assert Tree(hashes).head == TreeHead(size=size, root=root_by_definition(hashes).hex())


@given(size=st.integers(1, 70), data=st.data())
def test_only_the_own_path_proves_an_event(size: int, data: st.DataObject) -> None:
    """A path proves only its own event, at its own position and in its own tree."""
    tree = Tree(leaf(seq) for seq in range(1, size + 1))
    seq = data.draw(st.integers(1, size))
    path = tree.path(seq)
    assert is_included(entry(seq), path, tree.head)
    assert not is_included(replace(entry(seq), hash=leaf(0)), path, tree.head)
    assert not is_included(entry(seq), [*path, leaf(1)], tree.head)
    assert not is_included(entry(seq), path, replace(tree.head, root=leaf(0)))
    assert not is_included(replace(entry(seq), seq=size + 1), path, tree.head)
    if path:
        assert not is_included(entry(seq), path[:-1], tree.head)
        other = data.draw(st.integers(1, size).filter(lambda number: number != seq))
        assert not is_included(replace(entry(seq), seq=other), path, tree.head)


@pytest.mark.parametrize("count", [0, 3])
def test_the_tree_of_a_ledger_has_all_its_events(tmp_path: Path, count: int) -> None:
    """Each event of a ledger has a path in the ledger's tree."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    entries = [ledger.append(ClusterStopped(cluster_id=str(number)), actor="a") for number in range(count)]
    tree = tree_of(ledger)
    assert tree.head.size == count
    assert all(is_included(each, tree.path(each.seq), tree.head) for each in entries)
    ledger.close()
