"""Run stages as separate processes, store which stages are finished, and show the progress of long stages.

A stage is finished when all its commands have ended with exit code 0. Finished stages are stored with their duration.
So an interrupted demo resumes at the interrupted stage. Each command must be idempotent, because a killed command runs
again.
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
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import FalajError, RefusedError
from cluster.storage import write_bytes
from jobs.pipeline.stages import Command, ParallelCommands, Results, Stage

HEARTBEAT_S = 15.0
"""While a stage runs, a progress line is printed every this many seconds."""
TAIL_LINES = 25
"""An error message shows this many last lines of a log."""


class StageFailed(FalajError):
    """A command of a stage failed: its exit code is neither 0 nor 2."""


class StageRefused(RefusedError):
    """A command of a stage was refused: its exit code is 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedStage:
    """A stage whose commands all ended with exit code 0. The fields are the keys in `state.json`."""

    seconds: float
    commands: list[list[str]]


class Runner:
    """Runs each stage once and stores the finished stages in `state.json`."""

    def __init__(self, demo: Path) -> None:
        self._demo = demo
        self._state = demo / "state.json"
        self.finished: dict[str, FinishedStage] = {}
        if self._state.exists():
            self.finished = {
                name: FinishedStage(**entry) for name, entry in json.loads(self._state.read_text()).items()
            }

    def run(self, stage: Stage, *, position: int, of: int) -> None:
        """Run a stage unless it is finished.

        Raises:
            StageRefused, StageFailed: The exit code of a command was not 0. The message has the command and the end of
                its output.
        """
        title = f"[{position:2d}/{of}] {stage.title}"
        if stage.name in self.finished:
            print(f"{title} · already done ({self.finished[stage.name].seconds:.0f} s)", flush=True)
            return
        print(title, flush=True)
        steps = list(stage.steps(self.results()))
        started = time.perf_counter()
        for step in steps:
            self.execute(step, name=stage.name)
        seconds = time.perf_counter() - started
        commands = [list(command) for step in steps for command in step]
        self.finished[stage.name] = FinishedStage(seconds=seconds, commands=commands)
        content = {name: asdict(finished) for name, finished in self.finished.items()}
        write_bytes(str(self._state), json.dumps(content, indent=1).encode())
        print(f"        {seconds:.1f} s", flush=True)

    def results(self) -> Results:
        """Return the JSON outputs of the commands so far, by file name without suffix."""
        skip = {"state.json", "summary.json"}
        files = (path for path in self._demo.glob("*.json") if path.name not in skip)
        return {
            path.stem: json.loads(path.read_text()) for path in files if not path.stem.endswith(".manifest")
        }

    def execute(self, commands: ParallelCommands, *, name: str) -> None:
        """Run command lines in parallel, each with its own log file. Every 15 seconds, print the last line of each log.

        Raises:
            StageRefused, StageFailed: The exit code of a command was not 0. If several failed, the error is for the
                first one. It is raised after all commands have ended.
        """
        names = [name, *(f"{name}-{number}" for number in range(2, len(commands) + 1))]
        logs = [self._demo / "logs" / f"{log_name}.log" for log_name in names]
        processes = [self._start(command, log) for command, log in zip(commands, logs, strict=True)]
        with _heartbeat(logs):
            codes = [process.wait() for process in processes]
        for command, log, code in zip(commands, logs, codes, strict=True):
            match code:
                case 0:
                    continue
                case 2:
                    raise StageRefused(f"{command[0]} was refused: {_tail(log, 1)} (full output: {log})")
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
    """Until the `with` block ends, print the last line of each log every `HEARTBEAT_S` seconds."""
    finished = threading.Event()

    def print_last_lines() -> None:
        while not finished.wait(HEARTBEAT_S):
            for log in logs:
                print(f"          … {_tail(log, 1)[:100]}", flush=True)

    thread = threading.Thread(target=print_last_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _tail(log: Path, count: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:])
