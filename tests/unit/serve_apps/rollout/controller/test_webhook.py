"""A real HTTP server gets each summary at least once, signed and in order, also if it fails at first."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Gauge

from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import WatchEnded
from cluster.metrics import new_registry
from cluster.settings import PlatformConfig, RolloutsConfig, WebhookConfig
from serve_apps.rollout.controller.delivering import Deliverer
from serve_apps.rollout.controller.webhook import Webhook, configured_webhook

SECRET = "s3cret"


@dataclass
class Receiver:
    """What a server has got, and what it answers next; then 200."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    got: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)

    def events(self, status: int = 200) -> list[int]:
        """Return the `seq` of the events that were answered with a status."""
        return [json.loads(body)["seq"] for answered, _, body in self.got if answered == status]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    known = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = known.answers.pop(0) if known.answers else 200
            known.got.append((status, {name.lower(): value for name, value in self.headers.items()}, body))
            if status == 0:  # the connection ends without an answer
                return
            self.send_response(status)
            self.send_header("location", known.url)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        known.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield known
        server.shutdown()


def ended(rollout: str) -> WatchEnded:
    return WatchEnded(model="m", rollout=rollout, outcome="rolled_back", reason="worse")


def deliverer(ledger: Ledger, receiver: Receiver, **arguments: Any) -> Deliverer:
    gauge = Gauge("waiting", "events", registry=new_registry())
    known = {"acts": lambda: True, "waiting": gauge} | arguments
    return Deliverer(ledger, Webhook(receiver.url, lambda: SECRET), **known)


def append(ledger: Ledger, *rollouts: str) -> list[Entry]:
    return [ledger.append(ended(rollout), actor="system:rollouts") for rollout in rollouts]


def test_event_is_sent_until_it_is_taken_and_then_never_again(url: str, receiver: Receiver) -> None:
    """Later events wait. A new process goes on from the stored position. A redirect is a failure."""
    ledger = Ledger(url)
    append(ledger, "older")
    sending = deliverer(ledger, receiver)
    assert sending.deliver_once()
    first, second = append(ledger, "a", "b")
    receiver.answers = [500, 0, 302, 404, 200, 503]
    assert [sending.deliver_once() for _ in range(5)] == [False, False, False, False, False]
    assert receiver.events() == [first.seq]
    assert deliverer(ledger, receiver).deliver_once()
    assert receiver.events() == [first.seq, second.seq]
    assert deliverer(ledger, receiver).deliver_once()
    assert len(receiver.got) == 7


def test_receiver_can_check_the_signature_and_find_doubles(tmp_path: Path, receiver: Receiver) -> None:
    """The body is the line of an export, and the key is the hash of the event."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    sending = deliverer(ledger, receiver)
    sending.deliver_once()
    (entry,) = append(ledger, "a")
    receiver.answers = [500]
    sending.deliver_once()
    sending.deliver_once()
    for _, headers, body in receiver.got:
        expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        assert headers["x-falaj-signature-256"] == f"sha256={expected}"
        assert headers["idempotency-key"] == entry.hash
        assert body == entry.line().encode()
    assert len(receiver.got) == 2


def test_only_the_controller_that_acts_sends(tmp_path: Path, receiver: Receiver) -> None:
    """The others store no position either."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    assert deliverer(ledger, receiver).deliver_once()
    append(ledger, "a")
    assert deliverer(ledger, receiver, acts=lambda: False).deliver_once()
    assert receiver.got == []
    assert deliverer(ledger, receiver).deliver_once()
    assert len(receiver.got) == 1


def test_event_that_nobody_takes_for_days_does_not_stop_later_ones(
    tmp_path: Path, receiver: Receiver
) -> None:
    """The ledger still has it."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=4)
    sending = deliverer(ledger, receiver, clock=lambda: later)
    sending.deliver_once()
    _, second = append(ledger, "a", "b")
    receiver.answers = [500]
    assert sending.deliver_once()
    assert receiver.events() == [second.seq]


def test_unknown_failure_is_tried_again(tmp_path: Path) -> None:
    """The name of this host cannot be encoded, because a label has more than 63 characters."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    unusable = Receiver(url=f"https://{'a' * 70}.example/hook")
    sending = deliverer(ledger, unusable)
    assert sending.deliver_once()
    append(ledger, "a")
    assert [sending.deliver_once() for _ in range(2)] == [False, False]


@pytest.mark.parametrize(
    ("url", "hosts", "message"),
    [
        ("http://example.com/x", ["example.com"], "must be https"),
        ("ftp://127.0.0.1/x", ["127.0.0.1"], "must be https"),
        ("https://169.254.169.254/x", ["example.com"], "not in rollouts.webhook.hosts"),
        ("https://example.com@evil.com/x", ["example.com", "evil.com"], "no user, password"),
        ("https://example.com.evil.com/x", ["example.com"], "not in rollouts.webhook.hosts"),
    ],
)
def test_other_hosts_are_refused(url: str, hosts: list[str], message: str) -> None:
    """The message says what to set."""
    with pytest.raises(ValueError, match=message):
        WebhookConfig(url=url, hosts=hosts, secret="env:X")


def test_secret_comes_from_the_environment_or_a_private_file(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read for each request, so it can be changed."""
    monkeypatch.setenv("HOOK", SECRET)
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    file.chmod(0o600)
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    (entry,) = append(ledger, "a")
    for secret in ("env:HOOK", str(file)):
        hook = WebhookConfig(url=receiver.url, hosts=["127.0.0.1"], secret=secret)
        webhook = configured_webhook(PlatformConfig(rollouts=RolloutsConfig(webhook=hook)))
        assert webhook is not None
        webhook.send(entry)
    signatures = {headers["x-falaj-signature-256"] for _, headers, _ in receiver.got}
    assert len(signatures) == 1
