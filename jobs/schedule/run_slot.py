"""`python -m jobs.schedule.run_slot name=<schedule> slot=<slot>`: run a slot's command.

The scheduler submits it as a job. The process records the start, runs the command as a child with a token of the
schedule's principal, and records the end. If another process has recorded this slot's start, it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.entrypoint import REFUSED, job
from cluster.host.signals import set_on_signal
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ScheduledRunFinished, ScheduledRunStarted
from cluster.security.tokens.intent import FILE_VARIABLE, remove_expired, write_intent
from cluster.security.tokens.issuer import TOKEN_TTL_S, mint_token
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import INTENTS, RENEW_S
from cluster.session import ClusterRecord, require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.storage import local
from jobs.schedule import schedules
from jobs.schedule.command import command_line
from jobs.schedule.scheduler import ACTOR
from jobs.schedule.schedules import Schedule

JOB_VARIABLE = "RAY_JOB_SUBMISSION_ID"
STOP_S = 10.0
ERROR_CHARACTERS = 500


@dataclass(kw_only=True, slots=True)
class SlotConfig(PlatformConfig):
    """Configuration of `jobs.schedule.run_slot`."""

    name: str = ""
    slot: str = ""


@job("run_slot", SlotConfig)
def main(config: SlotConfig) -> None:
    """Run the slot, and exit with the exit code of its command."""
    record, ledger = require_recorded_cluster(config), open_ledger(config)
    schedule, job_name = schedules.require(ledger, config.name), os.environ.get(JOB_VARIABLE, "")
    command = command_line(schedule)
    started = ScheduledRunStarted(schedule=schedule.name, slot=config.slot, job=job_name, command=command[2:])
    if ledger.append_once(started, actor=ACTOR, schedule=schedule.name, slot=config.slot) is None:
        print(f"slot {config.slot} of schedule {schedule.name} has run already")
        return
    run = SlotRun(ledger, schedule, config.slot, job_name)
    with callers_token(config, record, schedule) as environment:
        code = run.execute(command, os.environ | environment)
    sys.exit(code)


@dataclass(frozen=True, slots=True)
class SlotRun:
    """One run of a slot."""

    ledger: Ledger
    schedule: Schedule
    slot: str
    job: str

    def execute(self, command: list[str], environment: dict[str, str]) -> int:
        """Run the command, record how it ended, and return its exit code."""
        begun, stopped = time.monotonic(), threading.Event()
        set_on_signal([signal.SIGTERM, signal.SIGINT], stopped)
        child = subprocess.Popen(
            command,
            cwd=self.schedule.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        errors = LastLine(child)
        timeout_s = self.schedule.spec.timeout_s
        code, reason = wait(child, stopped, deadline=None if timeout_s is None else begun + timeout_s)
        errors.join()
        state = {0: "done", REFUSED: "refused"}.get(code, "failed")
        finished = ScheduledRunFinished(
            schedule=self.schedule.name,
            slot=self.slot,
            job=self.job,
            state="failed" if reason else state,
            exit_code=code,
            seconds=round(time.monotonic() - begun, 3),
            reason=reason or ("" if code == 0 else errors.text),
        )
        self.ledger.append_once(finished, actor=ACTOR, schedule=self.schedule.name, slot=self.slot)
        return code


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
            reason = "the job was stopped"
        elif deadline is not None and time.monotonic() > deadline:
            reason = "it ran longer than schedule.timeout_s"
        if reason:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_S)
            child.kill()
    return child.wait(), reason


@contextmanager
def callers_token(
    config: PlatformConfig, record: ClusterRecord, schedule: Schedule
) -> Iterator[dict[str, str]]:
    """Keep a token of the schedule's principal in a private file, and yield the variable that names the file.

    With an OIDC issuer, the schedule's own option `identity.token_file` names the token, and nothing is yielded.
    """
    if config.identity.issuer.url is not None:
        yield {}
        return
    folder = local(record.layout.keys) / INTENTS
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_expired(folder)
    path, ended = folder / f"schedule-{uuid.uuid4().hex}.jwt", threading.Event()

    def renew() -> None:
        principal = schedule.principal
        models = principal.get("models")
        token = mint_token(
            record.layout,
            subject=str(principal["subject"]),
            role=Role(principal["role"]),
            purpose=str(principal["purpose"]),
            tenant=str(principal["tenant"]),
            scope="" if models is None else " ".join(f"model:{model}" for model in models),
            ttl_s=TOKEN_TTL_S,
        )
        write_intent(path, token)

    def renew_until_ended() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(OSError):
                renew()

    renew()
    threading.Thread(target=renew_until_ended, daemon=True, name="token").start()
    try:
        yield {FILE_VARIABLE: str(path)}
    finally:
        ended.set()
        Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
