"""Hostile input: the right status, JSON, no internal details, and a service that continues.

Each case goes to a real replica, and to the other applications or the edge where they handle it.
"""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.tokens.roles import Role
from serve_apps.replica.http import LOG
from serve_apps.replica.http_contract import MAX_BODY_BYTES
from tests.servers.edge import Edge, answer_of
from tests.servers.replica import Replica, running_features, running_replica

SIGNATURE = ModelSignature(
    task=Task.regression, inputs=(InputSpec(name="p__age", dtype="double"),), label="y"
)
INFER, PREDICT = "/v2/models/m/infer", "/v1/models/m:predict"


def infer(data: str, *, shape: str = "[1]", datatype: str = '"FP64"') -> bytes:
    """Build an `infer` request with data that no correct serialiser would write."""
    return (
        f'{{"inputs": [{{"name": "p__age", "shape": {shape}, "datatype": {datatype}, "data": {data}}}]}}'
    ).encode()


def predict(value: str, *, entities: str = '[{"id": 1}]') -> bytes:
    return f'{{"entities": {entities}, "features": {{"p__age": {value}}}}}'.encode()


GOOD, GOOD_BY_KEY = infer("[1.5]"), predict("1.5")


@pytest.fixture(scope="module")
def replica(edge: Edge) -> Iterator[Replica]:
    """A replica behind the edge."""
    with running_replica(Path(edge.places.root), SIGNATURE) as running:
        edge.load_targets(edge.targets | {"m-v1": (running.address,)})
        yield running


class UnexpectedErrors(logging.Handler):
    """Collects the log messages of a replica about unexpected errors."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@pytest.fixture(autouse=True)
def still_serving(edge: Edge, replica: Replica) -> Iterator[None]:
    """Check after each test that both endpoints answer, and that no unexpected error was logged."""
    unexpected_errors = UnexpectedErrors()
    LOG.addHandler(unexpected_errors)
    yield
    assert edge.call(INFER, body=GOOD, token=edge.token())[0] == 200
    assert replica.json(PREDICT, GOOD_BY_KEY)[0] == 200
    LOG.removeHandler(unexpected_errors)
    assert unexpected_errors.messages == []


def refusal_message(status: int, body: bytes) -> str:
    """Return the message of a refusal, after checking that it is a JSON error without internal details."""
    content = json.loads(body)
    assert content.keys() == {"error", "code"}
    assert content["code"] == status
    message = str(content["error"])
    assert not re.search(r"Traceback|\.py\b|File \"|site-packages|Error\(", message)
    return message


DEEP = 50_000
HUGE = "1" + "0" * 5000
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", HUGE, "0x10", "1_000", "+1", "01", "."]
BODIES = [
    *(b"[" * DEEP, b'{"inputs":' * DEEP, infer("[" * DEEP + "]" * DEEP), infer("[" * 900 + "1" + "]" * 900)),
    *(predict("[" * 900 + "1" + "]" * 900), predict('{"a":' * 900 + "1" + "}" * 900)),
    *(infer(f"[{number}]") for number in NUMBERS),
    *(predict(number) for number in NUMBERS),
    *(infer("[1]", shape=shape) for shape in ("[0]", "[2]", "[-1]", "[1, 2]", "[1, 1, 1]", "[1e3]", "{}", "[[1]]")),
    *(infer("[1]", shape=f"[{number}]") for number in ("18446744073709551616", "9" * 400, "null")),
    *(infer("[1]", datatype=kind) for kind in ('"BOOL"', '"BYTES"', '"fp64"', '"object"', "null", "{}", "[]")),
    *(infer(data) for data in ("[]", "{}", "null", '"1"', '["1"]', "[true]", "[{}]", "[[1]]", "[1, 2]")),
    *(predict(value) for value in ('"1"', "true", "{}", "[]", "[1, 2]", "[[1]]", str(2**63), str(-(2**63)))),
    *(predict("1", entities=entities) for entities in ("[]", "{}", "null", "[1]", "[{}]", '[{"id": null}]', "7")),
    *(predict("1", entities=f'[{{"id": {value}}}]') for value in ("1.5", "true", "[1]", "{}", str(2**64), "NaN")),
    *(predict("1", entities="[" + '{"id": 1},' * 1000 + '{"id": 1}]'), infer("[" + "1," * 1000 + "1]", shape="[1001]")),
    *(b"", b" ", b"null", b"[]", b"{}", b'"inputs"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", "{}".encode("utf-16")),
    *(b"{" + b"\x00" * 100 + b"}", b'{"id": "\xff"}', b'{"id": "\\ud800"}', b'{"inputs": [1]}', b"%PDF-1.7"),
    *(b'{"inputs": "' + b"x" * 900_000 + b'"}', b'{"' + b"x" * 900_000 + b'": 1}'),
]  # fmt: skip


def test_malformed_bodies_are_400(replica: Replica) -> None:
    """Too deep, not a number, too large, wrong shapes and types, not JSON; for both endpoints."""
    connection = replica.connect()
    headers = {"authorization": f"Bearer {replica.token()}"}
    for body in BODIES:
        for path in (INFER, PREDICT):
            connection.request("POST", replica.prefix + path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            assert response.status == 400, (path, body[:100], answer)
            assert len(refusal_message(400, answer)) < 2100
    connection.close()


ELSEWHERE = {
    "outcomes": ("/v1/outcomes", '{"model": "m", "outcomes": %s}', '[{"prediction_id": "a", "outcome": %s}]'),
    "features": (
        "/v1/features:push",
        '{"view": "income", "idempotency_key": "k", "rows": %s}',
        '[{"keys": {"person_id": 1}, "event_timestamp": "2024-01-01", "features": %s}]',
    ),
}


@pytest.fixture(scope="module")
def addresses(replica: Replica) -> Iterator[dict[str, str]]:
    with running_features(replica) as features:
        yield {"outcomes": replica.outcomes, "features": features}


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_other_applications_refuse_malformed_bodies(
    replica: Replica, addresses: dict[str, str], name: str
) -> None:
    """Outcomes and pushed features: too deep, not a number, another shape, not JSON."""
    path, whole, part = ELSEWHERE[name]
    deep = ["[" * depth + "1" + "]" * depth for depth in (300, 900, DEEP)]
    deep += ['{"a":' * depth + "1" + "}" * depth for depth in (300, 900)]
    parts = [*deep, *NUMBERS, "null", "[]", "[[1]]"]
    bodies = [(whole % one).encode() for one in (*parts, *(part % one for one in parts))]
    bodies += [body for body in BODIES if not body.startswith(b'{"inputs": [{"name"')]
    connection = http.client.HTTPConnection(addresses[name], timeout=10)
    for body in bodies:
        connection.request(
            "POST", f"/{name}{path}", body, {"authorization": f"Bearer {replica.token(Role.admin)}"}
        )
        response = connection.getresponse()
        answer = response.read()
        assert response.status == 400, (body[:100], answer)
        refusal_message(400, answer)
    connection.close()


def test_replicas_refuse_a_model_outside_the_tokens_scope(replica: Replica) -> None:
    """Predictions, metadata and outcomes get 403."""
    outcome = {"model": "m", "outcomes": [{"prediction_id": "a", "outcome": 1.0}]}
    for scope, status in (("model:m", 200), ("model:x", 403)):
        token = replica.token(scope=scope)
        assert replica.call(INFER, GOOD, token=token)[0] == status
        assert replica.call("/v2/models/m", token=token)[0] == status
        assert replica.at_outcomes.call("/v1/outcomes", outcome, token=token)[0] == status


def test_compressed_body_is_415(edge: Edge, replica: Replica) -> None:
    """It is not decompressed; `identity` means that the body is not compressed."""
    bomb = gzip.compress(b"0" * 20_000_000)
    for encoding in ("gzip", "GZIP", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x"):
        status, headers, answer = replica.call(INFER, bomb, headers={"content-encoding": encoding})
        assert (status, headers["accept-encoding"]) == (415, "identity")
        assert "compressed" in refusal_message(status, answer)
        sent: dict[str, str | bytes] = {"content-encoding": encoding}
        assert edge.call(INFER, body=gzip.compress(GOOD), headers=sent, token=edge.token())[0] == 415
    assert replica.call(INFER, GOOD, headers={"content-encoding": "identity"})[0] == 200


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 3 * MAX_BODY_BYTES])
def test_body_over_the_limit_is_413(edge: Edge, replica: Replica, size: int) -> None:
    """The body has a length or is chunked; then its size is known only at the end. The client receives the answer."""
    block = b" " * 50_000
    chunks = [block] * (size // len(block)) + [b" " * (size % len(block))]
    status, _, answer = replica.call(INFER, b" " * size)
    assert "limit" in refusal_message(413, answer)
    assert status == 413
    for connection, token, prefix in (
        (replica.connect(), replica.token(), replica.prefix),
        (edge.connect(), edge.token(), ""),
    ):
        headers = {"authorization": f"Bearer {token}"}
        connection.request("POST", prefix + INFER, iter(chunks), headers, encode_chunked=True)
        response = connection.getresponse()
        refusal_message(413, response.read())
        assert response.status == 413
        connection.request("POST", prefix + INFER, GOOD, headers)
        assert connection.getresponse().status == 200
        connection.close()


LENGTHS = ["-1", "+1", "1e3", "0x1", "", "99999999999999999999999", "1000001", "1, 1", "١", "NaN", "0", "5"]
PATHS = [
    "/v2/models/../m/infer",
    "/v2/models/m/../m/infer",
    "/v2/models/%2e%2e/infer",
    "/v2/models/..%2fm/infer",
    "/v2/models/m/infer/",
    "/v2/models/m//infer",
    "//v2/models/m/infer",
    "/v2//models/m/infer",
    "/v2/models//infer",
    "/v2/models/m%00/infer",
    "/v2/models/m/infer%00",
    "/v2/models/m%0d%0ax-falaj-variant:%20y/infer",
    "/v2/models/m%3F/infer",
    "/v2/models/m/infer%3Fx",
    "/v2/models/m/infer%23x",
    "/v2/models/m;x/infer",
    "/v2/models/M/infer",
    "/v2/models/%ff%fe/infer",
    "/v2/models/m/versions//infer",
    "/v2/models/m/versions/../infer",
    "/v2/models/m/versions/2/infer",
    "/v2/models/m/versions/-1/infer",
    "/v2/models/m/versions/1/versions/1/infer",
    f"/v2/models/{'m' * 8000}/infer",
    f"/v2/models/m/versions/{'1' * 8000}/infer",
    "/v1/models/unknown:predict",
    "/v1/models/m:predict:predict",
    "/v1/models/m:infer",
    "/v1/models/m%3Apredict%00",
    "/v2/models/m-v2/infer",
    "/m-v1/v2/models/m/infer",
    "/-/healthz/..",
    "/",
]


@pytest.mark.parametrize("length", LENGTHS)
def test_wrong_length_of_the_json_is_400(replica: Replica, length: str) -> None:
    """The header is not a number, too large, or not the end of the JSON."""
    sent = {"Inference-Header-Content-Length": length.encode().decode("latin-1")}
    status, _, answer = replica.call(INFER, GOOD, headers=sent)
    assert status == 400
    refusal_message(status, answer)


def test_unknown_paths_are_404(edge: Edge, replica: Replica) -> None:
    """At edge and replica: dots, slashes, encoded or doubled, NULs, line ends, other cases, endless names."""
    token = edge.token()
    for path in PATHS:
        status, content = edge.call(path, body=GOOD, token=token)
        assert (status, content["code"]) == (404, 404), path
        status, _, answer = replica.call(path, GOOD)
        assert status == 404, path
        assert len(refusal_message(status, answer)) < 1000


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "[::1"},
        {"host": "a b/../?#"},
        {"authorization": "Bearer \xff\xfe"},
        {"authorization": "Bearer " + "a" * 30_000},
        {"authorization": "Bearer a.b.c, Bearer d.e.f"},
        {"x-falaj-variant": "\xff" * 1000, "x-falaj-request-id": "{" * 1000},
        {"x-unit-id": "\xff" * 1000, "content-type": "text/html; charset=nonsense"},
        {"accept": "\xff", "cookie": "=;" * 1000, "x-forwarded-for": "' or 1=1 --"},
    ],
)
def test_headers_of_any_bytes_are_harmless(replica: Replica, headers: dict[str, str]) -> None:
    """Such a header is refused as a token, or has no effect."""
    status, _, answer = replica.call(INFER, GOOD, headers=headers)
    assert status == (401 if "authorization" in headers else 200)
    assert status == 200 or refusal_message(status, answer)


def test_client_that_disconnects_within_its_body_logs_no_error(replica: Replica) -> None:
    """The replica logs no unexpected error."""
    host, port = replica.address.split(":")
    head = f"POST {replica.prefix}{INFER} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {replica.token()}\r\n"
    for _ in range(5):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(5)
            connection.recv(65_536)


def head(edge: Edge, *lines: str, path: str = INFER) -> bytes:
    given = (f"POST {path} HTTP/1.1", "Host: x", "Connection: close", f"Authorization: Bearer {edge.token()}")
    return "\r\n".join((*given, *lines, "", "")).encode("latin-1")


def test_oversized_headers_are_refused(edge: Edge) -> None:
    """A mebibyte in one or in many headers, and a thousand small ones; HAProxy refuses what it cannot parse."""
    many = [f"X-{n}: {'a' * 1000}" for n in range(1048)]
    for lines in ([f"X-Long: {'a' * 2**20}"], many, [f"X-{n}: a" for n in range(1000)]):
        assert edge.exchange(head(edge, *lines))[0] in (0, 400)
    assert edge.exchange(head(edge, path="/v2/models/" + "m" * 2**20))[0] in (0, 400, 414)


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -1",),
        ("Content-Length: 99999999999999999999",),
        ("Transfer-Encoding: gzip, chunked, identity",),
        ("Transfer-Encoding: \x0bchunked",),
        ("X-Falaj\x00-Variant: y",),
    ],
)
def test_ambiguous_requests_are_400(edge: Edge, lines: tuple[str, ...]) -> None:
    """Contradicting lengths, strange encodings, control characters: no request is smuggled."""
    assert edge.exchange(head(edge, *lines) + b"0\r\n\r\n")[0] in (400, 422)


def test_slow_clients_get_408_and_delay_no_others(edge: Edge, replica: Replica) -> None:
    """A head or body that never ends gets 408, the body's in JSON; other clients are answered meanwhile."""
    targets = edge.targets | {"m-v1": (replica.address,)}
    edge.load_targets(targets, timeout=(" 10s", " 700ms"))
    heads = [edge.send(b"POST / HTTP/1.1\r\nX-a: b\r\n") for _ in range(20)]
    bodies = [edge.send(head(edge, "Content-Length: 100") + b"{") for _ in range(20)]
    began = time.monotonic()
    assert edge.call(INFER, body=GOOD, token=edge.token())[0] == 200
    assert time.monotonic() - began < 5
    assert {answer_of(connection)[0] for connection in heads} == {408}
    answers = [answer_of(connection) for connection in bodies]
    assert {status for status, _ in answers} == {408}
    assert {refusal_message(status, body) for status, body in answers} == {"Request Timeout"}
    edge.load_targets(targets)
