"""Runs stages as separate processes, remembers which are finished, and shows that long ones are alive.

A stage is finished when all its commands exited 0; its seconds are kept, so that a demo that was cut short resumes at
the stage it was in. What a stage's command did halfway is that command's to make idempotent.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import FalajError, RefusedError
from cluster.storage import write_bytes
from jobs.pipeline.stages import Command, Results, SideBySide, Stage

HEARTBEAT_S = 15.0
TAIL_LINES = 25


class StageFailed(FalajError):
    """A command of a stage exited 1."""


class StageRefused(RefusedError):
    """A command of a stage exited 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A stage that has run to its end."""

    seconds: float
    commands: list[list[str]]


class Runner:
    """Runs stages in order, each once."""

    def __init__(self, demo: Path) -> None:
        self._demo = demo
        self._state = demo / "state.json"
        self.finished: dict[str, Finished] = {}
        if self._state.exists():
            self.finished = {
                name: Finished(**entry) for name, entry in json.loads(self._state.read_text()).items()
            }

    def run(self, stage: Stage, *, position: int, of: int) -> None:
        """Run a stage unless it is finished.

        Raises:
            StageRefused, StageFailed: with the command and the end of its output.
        """
        head = f"[{position:2d}/{of}] {stage.title}"
        if stage.name in self.finished:
            print(f"{head} · done before ({self.finished[stage.name].seconds:.0f} s)", flush=True)
            return
        print(head, flush=True)
        steps = list(stage.steps(self.results()))
        started = time.perf_counter()
        for step in steps:
            self.execute(step, name=stage.name)
        seconds = time.perf_counter() - started
        commands = [list(command) for step in steps for command in step]
        self.finished[stage.name] = Finished(seconds=seconds, commands=commands)
        content = {
            name: {"seconds": done.seconds, "commands": done.commands} for name, done in self.finished.items()
        }
        write_bytes(str(self._state), json.dumps(content, indent=1).encode())
        print(f"        {seconds:.1f} s", flush=True)

    def results(self) -> Results:
        """The JSON outputs written so far, by file stem."""
        skip = {"state.json", "summary.json"}
        files = (path for path in self._demo.glob("*.json") if path.name not in skip)
        return {
            path.stem: json.loads(path.read_text()) for path in files if not path.stem.endswith(".manifest")
        }

    def execute(self, commands: SideBySide, *, name: str) -> None:
        """Run command lines at the same time, each with a log file, whose last line is shown now and then.

        Raises:
            StageRefused, StageFailed: for the first that did not exit 0, once all have ended.
        """
        names = [name, *(f"{name}-{number}" for number in range(2, len(commands) + 1))]
        logs = [self._demo / "logs" / f"{one}.log" for one in names]
        started = [self._start(command, log) for command, log in zip(commands, logs, strict=True)]
        with _heartbeat(logs):
            codes = [process.wait() for process in started]
        for command, log, code in zip(commands, logs, codes, strict=True):
            match code:
                case 0:
                    continue
                case 2:
                    raise StageRefused(f"{command[0]} was refused: {_tail(log, 1)} (whole output: {log})")
                case _:
                    raise StageFailed(
                        f"{command[0]} exited {code}; the end of {log}:\n{_tail(log, TAIL_LINES)}"
                    )

    def _start(self, command: Command, log: Path) -> subprocess.Popen[str]:
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"        $ python -m {shlex.join(command)}", flush=True)
        with log.open("a") as sink:
            sink.write(f"$ python -m {shlex.join(command)}\n")
            sink.flush()
            return subprocess.Popen(
                [sys.executable, "-m", *command], stdout=sink, stderr=subprocess.STDOUT, text=True
            )


@contextmanager
def _heartbeat(logs: list[Path]) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            for log in logs:
                print(f"          … {_tail(log, 1)[:100]}", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tail(log: Path, count: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:])
