"""Run a command as a child process with a principal's token, for processes that run other callers' commands."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.entrypoint import REFUSED
from cluster.host.signals import set_on_signal
from cluster.security.tokens.intent import FILE_VARIABLE, remove_expired, write_intent
from cluster.security.tokens.issuer import TOKEN_TTL_S, mint_token
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import INTENTS, RENEW_S
from cluster.security.tokens.verification import MODEL_SCOPE
from cluster.storage import Layout, local

STOP_S = 10.0
ERROR_CHARACTERS = 500
STOPPED = "the job was stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a child ended."""

    exit_code: int
    state: str
    """`done`, `refused` or `failed`."""
    seconds: float
    reason: str
    """Why it was ended, or the last line of its errors; "" after a success."""
    was_stopped: bool
    """Whether it was ended because this process was stopped."""


def execute(
    command: Sequence[str], *, folder: str, environment: Mapping[str, str], timeout_s: float | None = None
) -> Ended:
    """Run a command, and return how it ended. If this process gets SIGTERM or SIGINT, the child is ended."""
    begun, stopped = time.monotonic(), threading.Event()
    set_on_signal([signal.SIGTERM, signal.SIGINT], stopped)
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    errors = LastLine(child)
    code, reason = wait(child, stopped, deadline=None if timeout_s is None else begun + timeout_s)
    errors.join()
    state = {0: "done", REFUSED: "refused"}.get(code, "failed")
    return Ended(
        exit_code=code,
        state="failed" if reason else state,
        seconds=round(time.monotonic() - begun, 3),
        reason=reason or ("" if code == 0 else errors.text),
        was_stopped=reason == STOPPED,
    )


class LastLine(threading.Thread):
    """Copies a child's standard error to this process's, and keeps the last line."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self._child = child
        self.text = ""
        self.start()

    def run(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            self.text = line.strip()[:ERROR_CHARACTERS] or self.text


def wait(
    child: subprocess.Popen[str], stopped: threading.Event, *, deadline: float | None
) -> tuple[int, str]:
    """Wait for a child. End it if this process is stopped, or at the deadline.

    Returns:
        The exit code, and why the child was ended, or "".
    """
    reason = ""
    while child.poll() is None:
        if stopped.wait(0.2):
            reason = STOPPED
        elif deadline is not None and time.monotonic() > deadline:
            reason = "it ran longer than schedule.timeout_s"
        if reason:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_S)
            child.kill()
    return child.wait(), reason


@contextmanager
def renewed_token(places: Layout, *, kind: str, new_token: Callable[[], str]) -> Iterator[dict[str, str]]:
    """Keep a token in a private file, and yield the variable that names the file. A thread renews the token.

    Args:
        places: paths below the storage root.
        kind: first part of the file's name.
        new_token: returns a new token.
    """
    folder = local(places.keys) / INTENTS
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_expired(folder)
    path, ended = folder / f"{kind}-{uuid.uuid4().hex}.jwt", threading.Event()

    def renew_until_ended() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(OSError):
                write_intent(path, new_token())

    write_intent(path, new_token())
    threading.Thread(target=renew_until_ended, daemon=True, name="token").start()
    try:
        yield {FILE_VARIABLE: str(path)}
    finally:
        ended.set()
        Path(path).unlink(missing_ok=True)


def principal_as_json(principal: Principal) -> dict[str, Any]:
    """Return a principal as an event has it."""
    return {
        "subject": principal.subject,
        "role": principal.role.value,
        "purpose": principal.purpose,
        "tenant": principal.tenant,
        "models": None if principal.models is None else sorted(principal.models),
    }


def principal_from_json(content: Mapping[str, Any]) -> Principal:
    """Return the principal that an event has."""
    models = content.get("models")
    return Principal(
        subject=str(content["subject"]),
        role=Role(content["role"]),
        purpose=str(content["purpose"]),
        tenant=str(content["tenant"]),
        models=None if models is None else tuple(models),
        expires_at=int(time.time()),
    )


def access_token(places: Layout, principal: Principal) -> str:
    """Return an access token of the development issuer with exactly a principal's rights.

    Commands exchange it for their own intents, so it is for a command that starts other commands.
    """
    models = principal.models
    return mint_token(
        places,
        subject=principal.subject,
        role=principal.role,
        purpose=principal.purpose,
        tenant=principal.tenant,
        scope="" if models is None else " ".join(f"{MODEL_SCOPE}{model}" for model in models),
        ttl_s=TOKEN_TTL_S,
    )
