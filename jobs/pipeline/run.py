"""Run a planned pipeline: start each stage when the stages that it waits for are done, and record what happens.

The ledger has the state. The event of a start precedes the job, so a run whose leading process was killed finds its
jobs again: one that still runs is waited for, one that is over is recorded, and one that was never submitted is
submitted.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.entrypoint import REFUSED
from cluster.errors import FalajError, RefusedError
from cluster.ledger.chain import Entry
from cluster.ledger.events import LedgerEvent, PipelineFinished, PipelineStarted, StageFinished, StageStarted
from cluster.ledger.store import utc_now
from jobs.pipeline.context import Attempt, EarlierStage, RunCancelled, RunContext, StageFailed
from jobs.pipeline.graph import is_path
from jobs.pipeline.keys import Prepared, StageKeys, StageRefused, stage_command
from jobs.pipeline.plan import Plan
from jobs.pipeline.stage import outputs
from jobs.pipeline.stage.content import ABSENT, digest_path, flatten
from jobs.pipeline.stage.ray_jobs import end_job
from jobs.pipeline.stage.requirements import unmet
from jobs.pipeline.stage.summary import summarize
from jobs.pipeline.state import (
    StageState,
    State,
    cancelled_at,
    is_cancelled,
    last_finished,
    read_run,
    record_graph,
    seconds_since,
)
from jobs.ray_jobs import JobStatus

POLL_S = 0.3
HEARTBEAT_S = 15.0
"""While a stage runs, the last line of its log is printed every this many seconds."""
TAIL_LINES = 25
_REFUSAL = "refused: "
"""Start of the line that gives the reason of exit code 2."""
MAX_RESULTS = 200
"""The event of a finished stage has at most this many values of its result."""


class Run:
    """One run of a pipeline."""

    def __init__(self, pipeline: str, run: str, plan: Plan, context: RunContext) -> None:
        self._pipeline = pipeline
        self._run = run
        self._plan = plan
        self._context = context
        self._keys = StageKeys(
            pipeline,
            plan,
            ledger=context.ledger,
            platform=context.platform,
            options=context.options,
            config_dir=context.config_dir,
        )
        self._done: dict[str, StageFinished] = {}
        self._running: dict[str, Attempt] = {}
        self._fault: RefusedError | FalajError | None = None
        self._earlier: dict[str, StageState] = {}
        """What the ledger knows of this run's stages from before `execute`."""
        self._cancelled_at = 0
        self._number = {name: number for number, name in enumerate(plan.stages, start=1)}

    def is_done(self) -> bool:
        """Return whether all stages are done with the present inputs, code and parameters."""
        done: dict[str, StageFinished] = {}
        for name in self._plan.stages:
            try:
                event = self._keys.reusable(self._keys.prepare(name, done), self._run)
            except StageRefused:  # `execute` raises it again
                return False
            if event is None:
                return False
            done[name] = event
        return True

    def adopt(self, earlier: Mapping[str, EarlierStage]) -> None:
        """Record stages as done that were done before. The run can then go on.

        Args:
            earlier: Maps a stage's name or group to its duration and result. Each stage of a group gets the group's
                duration.
        """
        self._append_start(resumed=False, reason="earlier release")
        for name, planned in self._plan.stages.items():
            known = earlier.get(planned.stage.group or name)
            if known is None or not self._plan.graph.ancestors(name) <= self._done.keys():
                continue
            attempt = Attempt(
                prepared=self._keys.prepare(name, self._done),
                job="",
                started_at=utc_now().isoformat(),
                log_shown_at=0.0,
            )
            result = flatten(known.result, limit=MAX_RESULTS)
            event = self._event(name, attempt, State.done, exit_code=0, result=result, seconds=known.seconds)
            self._append(event)
            self._done[name] = event

    def execute(self, *, max_parallel: int) -> None:
        """Run the stages that are not done.

        Args:
            max_parallel: How many stages run at the same time at most.

        Raises:
            StageFailed, StageRefused: A stage is not done; the message says why. The stages that ran beside it have
                ended too.
            RunCancelled: The run was cancelled.
        """
        is_known = read_run(self._context.ledger, self._pipeline, self._run) is not None
        self._cancelled_at = cancelled_at(self._context.ledger, self._run)
        self._settle_outputs()
        self._append_start(resumed=is_known)
        self._earlier = self._read_stages()
        started = time.monotonic()
        self._done.clear()
        sorter = self._plan.graph.sorter()
        sorter.prepare()
        waiting: list[str] = []
        while sorter.is_active():
            waiting = sorted([*waiting, *sorter.get_ready()], key=self._number.__getitem__)
            while waiting and self._fault is None and len(self._running) < max_parallel:
                name = waiting.pop(0)
                if self._begin(name):
                    sorter.done(name)
                    waiting = sorted([*waiting, *sorter.get_ready()], key=self._number.__getitem__)
            if not self._running:
                break
            for name in self._watch():
                sorter.done(name)
        self._finish(seconds=time.monotonic() - started)

    def _settle_outputs(self) -> None:
        """Accept or restore the files of stages that ended while their leading process was killed."""
        for name, planned in self._plan.stages.items():
            last = last_finished(self._context.ledger, self._pipeline, name)
            if last is not None:
                settle = outputs.accept if last.state == State.done else outputs.restore
                settle(planned.writes)

    def _read_stages(self) -> dict[str, StageState]:
        """Return this run's stages as the ledger has them. The newest `PipelineStarted` says which stages there are."""
        run = read_run(self._context.ledger, self._pipeline, self._run)
        return {} if run is None else run.stages

    def _begin(self, name: str) -> bool:
        """Start a stage, unless it is done already. Return whether it is done."""
        try:
            prepared = self._keys.prepare(name, self._done)
        except StageRefused as error:
            self._fault = error
            return False
        reused = self._keys.reusable(prepared, self._run)
        if reused is not None:
            outputs.accept(prepared.planned.writes)
            self._done[name] = reused
            if reused.run != self._run:
                self._append(replace(reused, run=self._run, reused_from=reused.reused_from or reused.run))
            self._print(name, f"already done ({reused.seconds:.0f} s)")
            return True
        folder = self._keys.foreign_folder(prepared)
        if folder is not None:
            self._fault = StageRefused(
                f"Stage '{name}' would replace the folder {folder}, whose files it never wrote. Move them, or give the "
                "stage another folder."
            )
            return False
        attempts = self._find_job(name, prepared)
        if attempts is not None:
            self._submit(name, prepared, attempt=attempts + 1)
        return False

    def _find_job(self, name: str, prepared: Prepared) -> int | None:
        """Continue with the job of an earlier attempt if its key is the same, else return the number of attempts."""
        earlier = self._earlier[name]
        if earlier.state is not State.running:
            return earlier.attempts
        status = self._context.jobs.status(earlier.job)
        if status is None:
            return earlier.attempts
        if earlier.key == prepared.key and earlier.seq > self._cancelled_at:
            self._print(name, f"goes on as job {earlier.job}")
            self._running[name] = Attempt(
                prepared=prepared,
                job=earlier.job,
                started_at=earlier.started_at,
                log_shown_at=time.monotonic(),
            )
            return None
        # The job was cancelled, or its inputs, code or parameters have changed since its start.
        end_job(self._context.jobs, earlier.job, sleep=self._context.sleep)
        return earlier.attempts

    def _submit(self, name: str, prepared: Prepared, *, attempt: int) -> None:
        job = f"{self._pipeline}-{self._run}-{name}-{attempt}"
        event = StageStarted(
            pipeline=self._pipeline,
            run=self._run,
            stage=name,
            job=job,
            key=prepared.key,
            arguments=list(prepared.command),
        )
        entry = self._append(event)
        self._print(name, f"$ python -m {shlex.join(prepared.command)}")
        outputs.set_aside(prepared.planned.writes)
        result = self._result_file(job)
        result.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        metadata = {"pipeline": self._pipeline, "run": self._run, "stage": name}
        command = stage_command(prepared, run=self._run)
        self._context.jobs.submit(job, command, result=result, metadata=metadata)
        self._running[name] = Attempt(
            prepared=prepared, job=job, started_at=entry.time, log_shown_at=time.monotonic()
        )

    def _watch(self) -> list[str]:
        """Wait for a moment, and return the stages that are done now."""
        self._context.sleep(POLL_S)
        if self._fault is None and is_cancelled(self._context.ledger, self._run):
            self._fault = RunCancelled(f"Run '{self._run}' was cancelled.")
            for attempt in self._running.values():
                self._context.jobs.stop(attempt.job)
        done = []
        for name, attempt in list(self._running.items()):
            status = self._context.jobs.status(attempt.job) or JobStatus(is_over=True)
            if not status.is_over:
                self._show_last_line(name, attempt)
                continue
            del self._running[name]
            if self._conclude(name, attempt, status):
                done.append(name)
        return done

    def _conclude(self, name: str, attempt: Attempt, status: JobStatus) -> bool:
        """Record how a stage ended, and return whether it is done. If not, its outputs are restored."""
        result = self._read_result(attempt) if status.exit_code == 0 else {}
        state, reason = self._judge(attempt, status, result)
        writes = attempt.prepared.planned.writes
        event = self._event(name, attempt, state, exit_code=status.exit_code, result=result, reason=reason)
        # The event comes first. So after a kill, either the new files are still there, or the event has the state.
        self._append(event)
        if state is not State.done:
            outputs.discard(writes)
            self._print(name, f"{state.value}: {reason}")
            self._fault = self._fault or self._error(name, attempt, state, reason)
            return False
        outputs.accept(writes)
        self._done[name] = event
        self._print(name, " · ".join(filter(None, [f"{event.seconds:.1f} s", summarize(result)])))
        return True

    def _judge(self, attempt: Attempt, status: JobStatus, result: dict[str, Any]) -> tuple[State, str]:
        """Return the state of a stage whose job is over, and the reason if the stage is not done."""
        command = attempt.prepared.planned.stage.command
        if isinstance(self._fault, RunCancelled) and status.exit_code != 0:
            return State.cancelled, str(self._fault)
        if status.exit_code == REFUSED:
            refusals = [line for line in self._log(attempt) if line.startswith(_REFUSAL)]
            reason = refusals[-1].removeprefix(_REFUSAL) if refusals else f"{command} exited {REFUSED}."
            return State.refused, reason
        if status.exit_code != 0:
            ended = "was killed" if status.exit_code is None else f"exited {status.exit_code}"
            return State.failed, f"{command} {ended}."
        paths = filter(is_path, attempt.prepared.planned.writes)
        if missing := [path for path in paths if digest_path(path) == ABSENT]:
            return State.unmet, f"{command} did not write {missing[0]}."
        sentences = unmet(attempt.prepared.planned.stage.require, result)
        return (State.unmet if sentences else State.done), " ".join(sentences)

    def _error(self, name: str, attempt: Attempt, state: State, reason: str) -> FalajError | RefusedError:
        go_on = f"`action=run run={self._run}` goes on at this stage"
        if state is State.failed:
            failure = f"Stage '{name}' failed: {reason} The log of job {attempt.job} ends:"
            return StageFailed("\n".join([failure, *self._log(attempt)[-TAIL_LINES:], f"{go_on}."]))
        what = "does not meet a requirement" if state is State.unmet else "was refused"
        return StageRefused(f"Stage '{name}' {what}: {reason} {go_on}.")

    def _finish(self, *, seconds: float) -> None:
        state = State.done if self._fault is None else State.failed
        if isinstance(self._fault, RunCancelled):
            state = State.cancelled
        event = PipelineFinished(
            pipeline=self._pipeline,
            run=self._run,
            state=state.value,
            seconds=round(seconds, 3),
            reason="" if self._fault is None else str(self._fault).splitlines()[0],
        )
        self._append(event)
        if self._fault is not None:
            raise self._fault

    def _event(
        self,
        name: str,
        attempt: Attempt,
        state: State,
        *,
        exit_code: int | None,
        result: dict[str, Any],
        reason: str = "",
        seconds: float | None = None,
    ) -> StageFinished:
        writes = attempt.prepared.planned.writes if state is State.done else ()
        now = utc_now().isoformat()
        return StageFinished(
            pipeline=self._pipeline,
            run=self._run,
            stage=name,
            job=attempt.job,
            key=attempt.prepared.key,
            state=state.value,
            exit_code=exit_code,
            started_at=attempt.started_at,
            seconds=round(seconds_since(attempt.started_at, now), 3) if seconds is None else seconds,
            inputs=attempt.prepared.inputs,
            outputs={part: self._context.platform.digest_written(part) for part in writes},
            result=result,
            reason=reason,
        )

    def _read_result(self, attempt: Attempt) -> dict[str, Any]:
        """Return the texts and numbers of a stage's result; none if the file is missing or is no JSON object."""
        declared = attempt.prepared.planned.stage.outputs.get("result")
        path = Path(declared) if declared is not None else self._result_file(attempt.job)
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return flatten(content, limit=MAX_RESULTS) if isinstance(content, dict) else {}

    def _result_file(self, job: str) -> Path:
        return self._context.folder / "results" / f"{job}.json"

    def _append_start(self, *, resumed: bool, reason: str = "") -> None:
        event = PipelineStarted(
            pipeline=self._pipeline,
            run=self._run,
            stages=record_graph(self._plan.graph),
            resumed=resumed,
            reason=reason,
        )
        self._append(event)

    def _append(self, event: LedgerEvent) -> Entry:
        return self._context.ledger.append(event, actor=self._context.actor)

    def _print(self, name: str, text: str) -> None:
        label = self._plan.stages[name].stage.label()
        self._context.print_line(f"[{self._number[name]:2d}/{len(self._number)}] {label} · {text}")

    def _show_last_line(self, name: str, attempt: Attempt) -> None:
        if time.monotonic() - attempt.log_shown_at < HEARTBEAT_S:
            return
        attempt.log_shown_at = time.monotonic()
        if lines := self._log(attempt):
            self._print(name, f"… {lines[-1][:100]}")

    def _log(self, attempt: Attempt) -> list[str]:
        """Return the lines of a job's log that are not empty."""
        return [line for line in self._context.jobs.log(attempt.job).splitlines() if line.strip()]
