"""Rollouts whose unit is the token's subject, and units that clients choose badly, in a real HAProxy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.records.unit_hash import unit_hash, unit_key
from cluster.security.edge_proof import edge_proof
from cluster.security.tokens.issuer import AUDIENCE, sign
from serve_apps.rollout.assignment import assign, bounds
from tests.servers.edge import ROLLOUT, SALT, Edge

BY_SUBJECT = replace(ROLLOUT, unit="subject")
LIMITS = bounds(ROLLOUT.weight)


@pytest.fixture
def by_subject(edge: Edge) -> Iterator[Edge]:
    """An edge with such a rollout. It is set like a change of the weight, without a reload."""
    map_file = Path(edge.settings.map_file)
    edge.haproxy.set_map(map_file, "m", edge.routes(BY_SUBJECT).entries["m"])
    yield edge
    edge.haproxy.set_map(map_file, "m", edge.routes(ROLLOUT).entries["m"])


def test_other_unit_headers_do_not_move_a_caller(by_subject: Edge) -> None:
    """Arm and hash are those of the subject, so records and evidence have this unit. The access record agrees."""
    key = unit_key(edge_proof(by_subject.places))
    arms = set()
    for subject in ("t", "user:é", "-x a,b", *map(str, range(20))):
        token = by_subject.token(subject=subject)
        expected = assign(SALT, subject.encode(), LIMITS).value
        headers: tuple[dict[str, str | bytes], ...] = ({}, {"X-Unit-ID": ""}, {"X-Unit-ID": subject + "2"})
        for sent in headers:
            _, echo = by_subject.call(token=token, headers=sent)
            assert echo["x-falaj-arm"] == expected, subject
            assert echo["x-falaj-unit-hash"] == unit_hash(key, rollout=ROLLOUT.id, unit=subject.encode())
        arms.add(expected)
    assert arms == {"treatment", "control", "outside"}
    record = by_subject.logged(echo["x-falaj-request-id"])
    assert (record["arm"], record["unit_hash"]) == (expected, echo["x-falaj-unit-hash"])


@pytest.mark.parametrize("subject", [{}, {"sub": None}, {"sub": ""}, {"sub": 7}])
def test_token_without_a_subject_has_no_unit(by_subject: Edge, subject: dict[str, object]) -> None:
    """The champion answers it outside any arm, also if it has the header."""
    claims = {"role": "service", "purpose": "", **subject}
    token = sign(by_subject.places, claims, audience=AUDIENCE, token_type="JWT", ttl_s=60)
    _, echo = by_subject.call(token=token, headers={"X-Unit-ID": "7"})
    assert (echo["x-falaj-arm"], echo["x-falaj-variant"]) == ("none", "champion")


def test_rollouts_by_header_have_the_same_map_entry_as_before(edge: Edge) -> None:
    """An edge of an older release wrote such entries. The subject's field is last, and changes nothing else."""
    entry = edge.routes(ROLLOUT).entries["m"]
    assert entry == f"m-v1|m-v2|challenger|r1|{SALT}|2000|8000"
    assert edge.routes(BY_SUBJECT).entries["m"] == f"{entry}|unit=subject"


@pytest.mark.parametrize("unit", [b"\xff\xfe\x80", b"a\xc3", b"x" * 8192, bytes(range(128, 256)) * 64])
def test_unit_of_any_bytes_and_length_has_the_same_arm_in_python(edge: Edge, unit: bytes) -> None:
    """What is stored of it has a fixed length."""
    key = unit_key(edge_proof(edge.places))
    _, echo = edge.call(token=edge.token(), headers={"X-Unit-ID": unit})
    assert echo["x-falaj-arm"] == assign(SALT, unit, LIMITS).value
    assert echo["x-falaj-unit-hash"] == unit_hash(key, rollout=ROLLOUT.id, unit=unit)
    assert len(edge.logged(echo["x-falaj-request-id"])["unit_hash"]) == 16
