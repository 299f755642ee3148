"""The edge's configuration in a real HAProxy, in front of a server that says what reached it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cluster.security.tokens.issuer import AUDIENCE, sign
from cluster.security.tokens.roles import Role
from serve_apps.edge.control.haproxy_process import ConfigRefused
from serve_apps.rollout.assignment import assign, bounds
from tests.edge import PREDICT, ROLLOUT, SALT, Edge, treated_unit, wait_until
from tests.ports import free_port


def test_the_edge_and_python_assign_the_same_arm(edge: Edge) -> None:
    """For units of any bytes a header can hold."""
    token, limits = edge.token(), bounds(20)
    draw = random.Random(7)
    letters = [*range(33, 127), *range(128, 256)]
    units = [bytes(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(150)] + [b"a,b", b"x y", b"0"]
    connection = edge.connect()
    heard = [
        edge.call(token=token, headers={"X-Unit-ID": unit}, over=connection)[1]["x-falaj-arm"]
        for unit in units
    ]
    connection.close()
    assert heard == [assign(SALT, unit, limits).value for unit in units]


@pytest.mark.parametrize("headers", [{}, {"X-Unit-ID": ""}])
def test_no_unit_meets_the_champion_outside_any_arm(edge: Edge, headers: dict[str, str | bytes]) -> None:
    """An empty header counts as none."""
    status, heard = edge.call(token=edge.token(), headers=headers)
    assert (status, heard["x-falaj-arm"], heard["x-falaj-variant"]) == (200, "none", "champion")


def test_a_clients_internal_headers_are_dropped(edge: Edge) -> None:
    """Nobody can choose a variant, an arm or an id from outside."""
    sent = {"x-falaj-variant": "challenger", "X-Falaj-Evil": "1", "x-falaj-request-id": "mine"}
    _, heard = edge.call(token=edge.token(), headers=sent)
    assert "x-falaj-evil" not in heard
    assert heard["x-falaj-variant"] == "champion"
    assert heard["x-falaj-request-id"] != "mine"
    assert heard["path"] == f"/m-v1{PREDICT}"


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
def test_role_and_path_decide(edge: Edge, role: Role, path: str, status: int) -> None:
    """Each refusal is JSON with its code."""
    answered, content = edge.call(path, token=edge.token(role))
    assert answered == status
    assert status == 200 or content["code"] == status


@pytest.mark.parametrize("path", ["", "/ready", "/versions/1", "/versions/1/ready"])
def test_a_models_metadata_is_read_with_or_without_a_version(edge: Edge, path: str) -> None:
    """By every role; the replica says whether it is that version."""
    status, heard = edge.call(f"/v2/models/m{path}", method="GET", token=edge.token(Role.auditor))
    assert (status, heard["path"]) == (200, f"/m-v1/v2/models/m{path}")
    infer = f"/v2/models/m/versions/1/infer{path}"
    assert edge.call(infer, token=edge.token())[0] == (404 if path else 200)


def test_the_servers_metadata_is_told_to_who_has_a_token(edge: Edge) -> None:
    """Its name, version and extensions, whatever is deployed."""
    status, content = edge.call("/v2", method="GET", token=edge.token(Role.auditor))
    assert (status, sorted(content)) == (200, ["extensions", "name", "version"])
    assert content["extensions"] == ["binary_tensor_data"]
    assert edge.call("/v2", method="GET")[0] == 401
    assert edge.call("/v2", token=edge.token())[0] == 405


@pytest.mark.parametrize("path", ["/v1/features:read", "/v1/features:push", "/v1/outcomes"])
def test_paths_of_no_model_go_to_their_application(edge: Edge, path: str) -> None:
    """Without a variant or an arm: these headers are empty."""
    _, heard = edge.call(path, token=edge.token())
    assert heard["path"] == f"/{'outcomes' if 'outcomes' in path else 'features'}{path}"
    assert (heard["x-falaj-variant"], heard["x-falaj-arm"]) == ("", "")


def test_a_wrong_method_is_405(edge: Edge) -> None:
    """In JSON, and with the right one."""
    connection = edge.connect()
    assert edge.call(method="GET", token=edge.token(), over=connection)[1]["code"] == 405
    connection.request("POST", "/v2/models/m", headers={"authorization": f"Bearer {edge.token()}"})
    response = connection.getresponse()
    assert (response.status, response.getheader("allow")) == (405, "GET")
    connection.close()


def test_a_changed_map_entry_takes_effect_without_a_reload(edge: Edge) -> None:
    """A rollback is one `set map`; a later reload finds it in the file."""
    headers: dict[str, str | bytes] = {"X-Unit-ID": treated_unit()}
    assert edge.call(token=edge.token(), headers=headers)[1]["x-falaj-variant"] == "challenger"
    back = edge.routes(None).entries["m"]
    edge.haproxy.set_map(Path(edge.settings.map_file), "m", back)
    assert edge.call(token=edge.token(), headers=headers)[1]["x-falaj-variant"] == "champion"
    edge.load(ROLLOUT)


def test_every_request_leaves_one_record_without_the_unit(edge: Edge) -> None:
    """JSON lines; the unit only as a hash."""
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


def test_no_record_is_too_long_to_be_read(edge: Edge) -> None:
    """However long the names are that somebody gives, and whatever they become as JSON."""

    def ask(path: str, subject: str) -> int:
        claims = {"sub": subject, "role": "admin", "purpose": ""}
        token = sign(edge.places, claims, audience=AUDIENCE, token_type="JWT", ttl_s=60)  # type: ignore[arg-type]
        return edge.call(path, token=token)[0]

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


def test_a_configuration_that_haproxy_refuses_is_never_loaded(edge: Edge) -> None:
    """The running one goes on."""
    with pytest.raises(ConfigRefused):
        edge.haproxy.load("frontend broken\n    bind nowhere\n    nonsense\n")
    assert edge.call(token=edge.token())[0] == 200


def test_a_champion_without_a_replica_is_503_and_not_ready(whole: Edge) -> None:
    """Treated units are still answered; the edge itself lives."""
    whole.load_targets(whole.targets | {"m-v1": (f"127.0.0.1:{free_port()}",)})
    wait_until(lambda: whole.call("/v2/health/ready", method="GET")[0] == 503)
    assert whole.call(token=whole.token())[1]["code"] == 503
    assert whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})[0] == 200
    assert whole.call("/v2/health/live", method="GET")[0] == 200


def test_a_change_right_after_a_reload_is_not_lost(whole: Edge) -> None:
    """`load` returns when the new worker serves, so `set map` cannot go to the old one only."""
    for _ in range(5):
        before = admin(whole, "show info")["Pid"]
        whole.load(ROLLOUT)
        whole.load_targets(whole.targets)
        whole.haproxy.set_map(Path(whole.settings.map_file), "m", whole.routes(None).entries["m"])
        wait_until(lambda old=before: admin(whole, "show info")["Pid"] != old)  # type: ignore[misc]
        _, heard = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
        assert heard["x-falaj-variant"] == "champion"


def admin(edge: Edge, command: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in edge.ask(command).splitlines() if ": " in line)


def test_an_open_connection_outlives_a_reload_and_hears_of_a_rollback(whole: Edge) -> None:
    """A client that keeps its connection gets no reset, and the draining worker has the new split too."""
    headers = {"authorization": f"Bearer {whole.token()}", "X-Unit-ID": treated_unit()}
    connection = whole.connect()
    connection.request("POST", PREDICT, b"{}", headers)
    assert json.loads(connection.getresponse().read())["x-falaj-variant"] == "challenger"
    kept = connection.sock
    whole.load_targets(whole.targets)
    whole.haproxy.set_map(Path(whole.settings.map_file), "m", whole.routes(None).entries["m"])
    assert connection.sock is kept
    connection.request("POST", PREDICT, b"{}", headers)
    assert json.loads(connection.getresponse().read())["x-falaj-variant"] == "champion"
    connection.close()
