"""The edge's configuration in a real HAProxy, in front of a server that echoes its requests."""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.records.unit_hash import unit_hash, unit_key
from cluster.security.edge_proof import edge_proof
from cluster.security.tokens.roles import Role
from serve_apps.edge.control.haproxy_process import ConfigRefused
from serve_apps.rollout.assignment import assign, bounds
from tests.servers.edge import PREDICT, ROLLOUT, SALT, Edge, treated_unit
from tests.servers.polling import wait_until
from tests.servers.ports import free_port

NUM_UNITS = int(os.environ.get("FALAJ_UNITS", "2000"))
PIPELINED = 10
"""Requests on their way at once. Together they fit into one buffer of HAProxy."""


def logged_arms(edge: Edge, units: list[bytes]) -> list[tuple[str, str]]:
    """Return arm and hash of each unit, as the access records of one request of each have them.

    The map entry names no backend, so HAProxy answers by itself, and many requests can be on their way at once.
    """
    map_file, entry = Path(edge.settings.map_file), edge.routes(ROLLOUT).entries["m"]
    edge.haproxy.set_map(map_file, "m", entry.replace("m-v1", "none").replace("m-v2", "none"))
    with edge.send(b"", timeout_s=60) as connection:
        for start in range(0, len(units), PIPELINED):
            if start % (500 * PIPELINED) == 0:  # of another principal, which has its own limit of requests
                head = f"POST {PREDICT} HTTP/1.1\r\nHost: e\r\nContent-Length: 0\r\nAuthorization: Bearer "
                head += f"{edge.token(subject=f'many{start}')}\r\nX-Unit-ID: "
            page = units[start : start + PIPELINED]
            connection.sendall(b"".join(head.encode() + unit + b"\r\n\r\n" for unit in page))
            received = b""
            while received.count(b"HTTP/1.1 ") < len(page) or not received.endswith(b"}"):
                received += (part := connection.recv(65_536))
                assert part, received[-200:]
            assert received.count(b"HTTP/1.1 503") == len(page), set(re.findall(rb"HTTP/1.1 \d+", received))
    edge.haproxy.set_map(map_file, "m", entry)

    def written() -> list[tuple[str, str]]:
        return [
            (one["arm"], one["unit_hash"]) for one in edge.records() if one["principal"].startswith("many")
        ]

    wait_until(lambda: len(written()) == len(units), seconds=60)
    return written()


@pytest.mark.timeout(600 + NUM_UNITS // 20)
def test_edge_and_python_compute_the_same_arm_and_hash(edge: Edge) -> None:
    """For units of any bytes that a header can hold. `FALAJ_UNITS` sets their number."""
    limits, key = bounds(20), unit_key(edge_proof(edge.places))
    draw = random.Random(7)
    letters = [*range(33, 127), *range(128, 256)]
    units = [b"a,b", b"x y", b"0"]
    units += [bytes(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(NUM_UNITS - len(units))]
    expected = [
        (assign(SALT, unit, limits).value, unit_hash(key, rollout=ROLLOUT.id, unit=unit)) for unit in units
    ]
    wrong = [
        unit for unit, one, two in zip(units, logged_arms(edge, units), expected, strict=True) if one != two
    ]
    assert wrong == []


def test_a_replica_gets_the_arm_and_hash_of_the_access_record(edge: Edge) -> None:
    """In the edge's headers, which the prediction record has."""
    _, echo = edge.call(token=edge.token(), headers={"X-Unit-ID": treated_unit()})
    record = edge.logged(echo["x-falaj-request-id"])
    assert (echo["x-falaj-arm"], echo["x-falaj-unit-hash"]) == (record["arm"], record["unit_hash"])
    assert echo["x-falaj-arm"] == "treatment"


def test_each_rollout_has_its_own_key_for_hashes(edge: Edge) -> None:
    """So nobody can join the records of two rollouts by their units. Requests outside a rollout have a key, too."""
    key, unit = unit_key(edge_proof(edge.places)), treated_unit()
    hashes = []
    for rollout in (ROLLOUT, replace(ROLLOUT, id="r2"), None):
        edge.haproxy.set_map(Path(edge.settings.map_file), "m", edge.routes(rollout).entries["m"])
        _, echo = edge.call(token=edge.token(), headers={"X-Unit-ID": unit})
        hashes.append(echo["x-falaj-unit-hash"])
        rollout_id = "" if rollout is None else rollout.id
        assert hashes[-1] == unit_hash(key, rollout=rollout_id, unit=unit.encode())
    edge.load(ROLLOUT)
    assert len(set(hashes)) == 3


@pytest.mark.parametrize("headers", [{}, {"X-Unit-ID": ""}])
def test_request_without_a_unit_gets_the_champion(edge: Edge, headers: dict[str, str | bytes]) -> None:
    """Outside any arm; an empty header counts as missing."""
    status, echo = edge.call(token=edge.token(), headers=headers)
    assert (status, echo["x-falaj-arm"], echo["x-falaj-variant"]) == (200, "none", "champion")


def test_internal_headers_of_a_client_are_dropped(edge: Edge) -> None:
    """A client cannot choose a variant, an arm or an id."""
    sent = {"x-falaj-variant": "challenger", "X-Falaj-Evil": "1", "x-falaj-request-id": "mine"}
    _, echo = edge.call(token=edge.token(), headers=sent)
    assert "x-falaj-evil" not in echo
    assert echo["x-falaj-variant"] == "champion"
    assert echo["x-falaj-request-id"] != "mine"
    assert echo["path"] == f"/m-v1{PREDICT}"


@pytest.mark.parametrize(
    ("role", "path", "status"),
    [
        (Role.service, PREDICT, 200),
        (Role.auditor, PREDICT, 403),
        (Role.data_scientist, "/v1/outcomes", 403),
        (Role.service, "/v1/outcomes", 200),
        (Role.service, "/v1/features:read", 200),
        (Role.data_engineer, "/v1/features:read", 403),
        (Role.data_engineer, "/v1/features:push", 200),
        (Role.ml_engineer, "/v1/features:push", 403),
        (Role.service, "/v1/features:drop", 404),
        (Role.service, "/v1/models/other:predict", 404),
        (Role.service, "/elsewhere", 404),
        (Role.service, "/v1/models/../m:predict", 404),
    ],
)
def test_role_and_path_decide_access(edge: Edge, role: Role, path: str, status: int) -> None:
    """Each refusal is JSON with its code."""
    answered, content = edge.call(path, token=edge.token(role))
    assert answered == status
    assert status == 200 or content["code"] == status


@pytest.mark.parametrize("path", ["", "/ready", "/versions/1", "/versions/1/ready"])
def test_model_metadata_with_and_without_a_version(edge: Edge, path: str) -> None:
    """For every role; the replica checks the version."""
    status, echo = edge.call(f"/v2/models/m{path}", method="GET", token=edge.token(Role.auditor))
    assert (status, echo["path"]) == (200, f"/m-v1/v2/models/m{path}")
    infer = f"/v2/models/m/versions/1/infer{path}"
    assert edge.call(infer, token=edge.token())[0] == (404 if path else 200)


def test_server_metadata_needs_a_token(edge: Edge) -> None:
    """Name, version and extensions, also without a deployed model."""
    status, content = edge.call("/v2", method="GET", token=edge.token(Role.auditor))
    assert (status, sorted(content)) == (200, ["extensions", "name", "version"])
    assert content["extensions"] == ["binary_tensor_data"]
    assert edge.call("/v2", method="GET")[0] == 401
    assert edge.call("/v2", token=edge.token())[0] == 405


@pytest.mark.parametrize("path", ["/v1/features:read", "/v1/features:push", "/v1/outcomes"])
def test_outcomes_and_features_go_to_their_application(edge: Edge, path: str) -> None:
    """The headers with variant and arm are empty."""
    _, echo = edge.call(path, token=edge.token())
    assert echo["path"] == f"/{'outcomes' if 'outcomes' in path else 'features'}{path}"
    assert (echo["x-falaj-variant"], echo["x-falaj-arm"]) == ("", "")


def test_wrong_method_is_405(edge: Edge) -> None:
    """The answer is JSON and names the allowed method."""
    connection = edge.connect()
    assert edge.call(method="GET", token=edge.token(), over=connection)[1]["code"] == 405
    connection.request("POST", "/v2/models/m", headers={"authorization": f"Bearer {edge.token()}"})
    response = connection.getresponse()
    assert (response.status, response.getheader("allow")) == (405, "GET")
    connection.close()


def test_changed_map_entry_takes_effect_without_a_reload(edge: Edge) -> None:
    """A rollback is one `set map`; a later reload reads it from the file."""
    headers: dict[str, str | bytes] = {"X-Unit-ID": treated_unit()}
    assert edge.call(token=edge.token(), headers=headers)[1]["x-falaj-variant"] == "challenger"
    back = edge.routes(None).entries["m"]
    edge.haproxy.set_map(Path(edge.settings.map_file), "m", back)
    assert edge.call(token=edge.token(), headers=headers)[1]["x-falaj-variant"] == "champion"
    edge.load(ROLLOUT)


def test_every_request_has_one_access_record_without_the_unit(edge: Edge) -> None:
    """JSON lines, with the unit's hash only."""
    token = edge.token()
    marks = [f"unit-{n}-é" for n in range(5)]
    ids = [
        edge.call(token=token, headers={"X-Unit-ID": mark.encode()})[1]["x-falaj-request-id"]
        for mark in marks
    ]
    wait_until(lambda: {record["request_id"] for record in edge.records()} >= set(ids))
    mine = [record for record in edge.records() if record["request_id"] in ids]
    assert len(mine) == 5
    assert all(record["status"] == 200 and record["prediction_id"] == "p1" for record in mine)
    assert "unit-" not in json.dumps(edge.records())


def test_access_records_are_never_cut(edge: Edge) -> None:
    """Whatever the length of a client's names, and of their JSON form."""

    def ask(path: str, subject: str) -> int:
        return edge.call(path, token=edge.token_with(sub=subject))[0]

    odd = "\u0001" * 200
    assert ask(f"/ray/{'%22' * 3000}", odd) == 200
    assert ask(f"/v1/models/{'m' * 200}:predict", odd) == 404
    assert ask(f"/v1/models/{'m' * 5000}:predict", odd) == 404
    assert ask(f"/v2/models/m/versions/{'1' * 5000}", odd) == 404
    assert ask(PREDICT, "a" * 900) == 401
    assert ask(PREDICT, "last") == 200
    wait_until(lambda: bool(edge.records()) and edge.records()[-1]["principal"] == "last")
    folder = Path(edge.settings.map_file).with_name("access")
    lines = [line for file in folder.iterdir() for line in file.read_text().split("\n")[:-1]]
    assert {type(json.loads(line)) for line in lines} == {dict}


def test_refused_configuration_is_never_loaded(edge: Edge) -> None:
    """The running one stays."""
    with pytest.raises(ConfigRefused):
        edge.haproxy.load("frontend broken\n    bind nowhere\n    nonsense\n")
    assert edge.call(token=edge.token())[0] == 200


def test_champion_without_a_replica_is_503_and_not_ready(whole: Edge) -> None:
    """Treated units are still answered, and the edge is live."""
    whole.load_targets(whole.targets | {"m-v1": (f"127.0.0.1:{free_port()}",)})
    wait_until(lambda: whole.call("/v2/health/ready", method="GET")[0] == 503)
    assert whole.call(token=whole.token())[1]["code"] == 503
    assert whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})[0] == 200
    assert whole.call("/v2/health/live", method="GET")[0] == 200


def test_change_right_after_a_reload_is_not_lost(whole: Edge) -> None:
    """`load` returns when the new worker serves, so `set map` cannot reach only the old one."""
    for _ in range(5):
        before = admin(whole, "show info")["Pid"]
        whole.load(ROLLOUT)
        whole.load_targets()
        whole.haproxy.set_map(Path(whole.settings.map_file), "m", whole.routes(None).entries["m"])
        wait_until(lambda old=before: admin(whole, "show info")["Pid"] != old)  # type: ignore[misc]
        _, echo = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
        assert echo["x-falaj-variant"] == "champion"


def admin(edge: Edge, command: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in edge.ask(command).splitlines() if ": " in line)


def test_open_connection_survives_a_reload_and_follows_a_rollback(whole: Edge) -> None:
    """The connection is not reset, and the old worker, which still serves it, has the new split."""
    headers = {"authorization": f"Bearer {whole.token()}", "X-Unit-ID": treated_unit()}
    connection = whole.connect()
    connection.request("POST", PREDICT, b"{}", headers)
    assert json.loads(connection.getresponse().read())["x-falaj-variant"] == "challenger"
    socket_before = connection.sock
    whole.load_targets()
    whole.haproxy.set_map(Path(whole.settings.map_file), "m", whole.routes(None).entries["m"])
    assert connection.sock is socket_before
    connection.request("POST", PREDICT, b"{}", headers)
    assert json.loads(connection.getresponse().read())["x-falaj-variant"] == "champion"
    connection.close()
