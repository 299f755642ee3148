"""The actions of `jobs.pipeline`: plan, run, show and cancel."""

from __future__ import annotations

import datetime as dt
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cluster.command_line import refuse_unused
from cluster.errors import AccessDenied, ConfigError, RefusedError, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import PipelineCancelled, PipelineFinished, PipelineStarted, StageFinished
from cluster.ledger.store import utc_now
from cluster.node.locks import hold_lock
from cluster.security.acting import create_actor
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord, require_running_cluster
from cluster.storage import file_name, layout, resolve, write_bytes
from jobs.pipeline.config import PipelineAction, PipelineConfig, PipelineSpec
from jobs.pipeline.context import EarlierStage, RunContext
from jobs.pipeline.plan import Caller, Plan, make_plan
from jobs.pipeline.report.runs import render_run
from jobs.pipeline.report.terminal import draw_run
from jobs.pipeline.run import Run
from jobs.pipeline.stage import outputs
from jobs.pipeline.stage.arguments import callers_arguments, callers_config_dir, pipeline_name
from jobs.pipeline.stage.content import Platform
from jobs.pipeline.stage.ray_jobs import Jobs, PatientJobs, StageJobs, end_job
from jobs.pipeline.state import RunState, State, newest_run, read_newest_run, read_run, seconds_since

_UNUSED = {
    PipelineAction.plan: ("reason", "output"),
    PipelineAction.run: ("output",),
    PipelineAction.show: ("reason",),
    PipelineAction.cancel: ("output",),
}
_CANCEL_WAIT_S = 30.0
_INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """A pipeline of one caller."""

    name: str
    config: PipelineConfig
    spec: PipelineSpec
    caller: Caller
    record: ClusterRecord
    jobs: Jobs

    @classmethod
    def open(cls, config: PipelineConfig, *, name: str | None = None) -> Pipeline:
        """Return the pipeline that a command line selects.

        Args:
            config: The configuration.
            name: Name of the pipeline; None is the choice of the command line.

        Raises:
            ConfigError: No pipeline is selected, or an option means nothing for the action.
            ClusterNotRunning: No cluster runs.
        """
        name = name or pipeline_name()
        if config.pipeline is None or name is None:
            raise ConfigError(
                "Give the name of a pipeline: `pipeline=<name>` for configs/pipeline/<name>.yaml, with `--config-dir "
                "FOLDER` for FOLDER/pipeline/<name>.yaml."
            )
        refuse_unused(_UNUSED[config.action], by=f"action={config.action.value}")
        record, ledger = require_running_cluster(config), open_ledger(config)
        if record.node_id is not None and config.action is not PipelineAction.show:
            raise ConfigError(
                f"action={config.action.value} is done on the head's machine. Run the command there."
            )
        actor = create_actor(config, record, ledger, entrypoint="jobs.pipeline")
        caller = Caller(
            ledger=ledger,
            places=layout(config.storage),
            actor=actor,
            region=config.cluster.region,
            options=tuple(callers_arguments()),
            config_dir=callers_config_dir(),
        )
        return cls(
            name=name,
            config=config,
            spec=config.pipeline,
            caller=caller,
            record=record,
            jobs=PatientJobs(StageJobs(record)),
        )

    @property
    def ledger(self) -> Ledger:
        return self.caller.ledger

    @property
    def folder(self) -> Path:
        """Folder of the pipeline's results."""
        return Path(self.caller.places.pipelines) / file_name(self.name)

    @property
    def lock_file(self) -> Path:
        """Lock of the process that leads a run. It is in the cluster's own folder, which no option can move."""
        return Path(self.record.layout.pipelines) / file_name(self.name) / "lock"

    def print_plan(self) -> None:
        """Print what would run.

        Raises:
            RefusedError: The pipeline has faults; one line for each.
        """
        plan = self._checked_plan()
        for number, (name, planned) in enumerate(plan.stages.items(), start=1):
            after = f"  after {', '.join(planned.stage.after)}" if planned.stage.after else ""
            print(f"[{number:2d}/{len(plan.stages)}] {name}  {planned.stage.command}{after}")
        print(f"pipeline {self.name}: {len(plan.stages)} stages, no faults")

    def run(self) -> None:
        """Run the stages that are not done.

        Raises:
            RefusedError: The pipeline has faults, another process leads a run of it, or a stage was refused.
            StageFailed: A stage failed.
        """
        with self._lock():
            plan = self._checked_plan()
            newest = read_newest_run(self.ledger, self.name)
            run_id = self._id_to_run(newest)
            run = Run(self.name, run_id, plan, self._context())
            if newest is not None and newest.state is State.done and run.is_done():
                print(
                    f"pipeline {self.name}: nothing to do, all {len(plan.stages)} stages are done", flush=True
                )
                return
            print(f"pipeline {self.name}, run {run_id}", flush=True)
            started = time.monotonic()
            try:
                run.execute(max_parallel=self.spec.max_parallel or len(os.sched_getaffinity(0)))
            except KeyboardInterrupt:
                print(
                    f"The jobs of run {run_id} go on. `action=run` waits for them, `action=cancel` ends them.",
                    file=sys.stderr,
                )
                raise SystemExit(_INTERRUPTED) from None
            print(
                f"pipeline {self.name}, run {run_id}: done in {time.monotonic() - started:.0f} s", flush=True
            )

    def adopt(self, run_id: str, earlier: Mapping[str, EarlierStage]) -> None:
        """Record stages as done that were done before the ledger recorded pipelines."""
        with self._lock():
            Run(self.name, run_id, self._checked_plan(), self._context()).adopt(earlier)

    def show(self) -> None:
        """Print the stages of a run, and write the page if `output` names one."""
        run = self._existing_run()
        print("\n".join(draw_run(run, is_led=self._is_led())))
        if self.config.output is not None:
            write_bytes(resolve(self.config.output), render_run(run).encode())

    def cancel(self) -> None:
        """Cancel a run. If no process leads it, end its jobs here.

        Raises:
            RefusedError: The run is over.
        """
        run = self._existing_run()
        if run.state is not State.running:
            raise RefusedError(
                f"Run '{run.run}' is over: {run.state.value}. Only a running one can be cancelled."
            )
        starters = {entry.actor for entry in self.ledger.find(PipelineStarted, run=run.run)}
        actor = self.caller.actor
        if actor.name not in starters and actor.principal.role is not Role.admin:
            raise AccessDenied(
                f"'{actor.name}' neither started run '{run.run}' nor has the role admin. Let an admin cancel it, or "
                f"one of {', '.join(sorted(starters))}."
            )
        event = PipelineCancelled(pipeline=self.name, run=run.run, reason=self.config.reason)
        self.ledger.append(event, actor=self.caller.actor.name)
        deadline = time.monotonic() + _CANCEL_WAIT_S
        while self._is_led() and time.monotonic() < deadline:
            time.sleep(0.5)
        if self._is_led():
            print(f"run {run.run}: cancelled; the process that leads it ends its jobs")
            return
        with self._lock():
            self._end_jobs(run)
        print(f"run {run.run}: cancelled")

    def _end_jobs(self, run: RunState) -> None:
        """End the jobs of a run without a leading process, and restore the files of their stages."""
        current = read_run(self.ledger, self.name, run.run)
        if current is None or current.state is not State.running:
            return
        plan = make_plan(self.spec, self.caller)
        for name, stage in run.stages.items():
            if stage.state is State.running:
                end_job(self.jobs, stage.job)
                self.ledger.append(self._cancelled(run, name), actor=self.caller.actor.name)
                if name in plan.stages:
                    outputs.discard(plan.stages[name].writes)
        event = PipelineFinished(
            pipeline=self.name, run=run.run, state=State.cancelled.value, reason=self.config.reason
        )
        self.ledger.append(event, actor=self.caller.actor.name)

    def _cancelled(self, run: RunState, name: str) -> StageFinished:
        stage = run.stages[name]
        return StageFinished(
            pipeline=self.name,
            run=run.run,
            stage=name,
            job=stage.job,
            key=stage.key,
            state=State.cancelled.value,
            started_at=stage.started_at,
            seconds=round(seconds_since(stage.started_at, utc_now().isoformat()), 3),
            reason=self.config.reason,
        )

    def _context(self) -> RunContext:
        return RunContext(
            ledger=self.ledger,
            actor=self.caller.actor.name,
            platform=Platform(self.ledger, self.caller.places),
            jobs=self.jobs,
            folder=self.folder,
            options=self.caller.options,
            config_dir=self.caller.config_dir,
        )

    def _checked_plan(self) -> Plan:
        plan = make_plan(self.spec, self.caller)
        if plan.faults:
            for fault in plan.faults[:-1]:
                print(f"refused: {fault}", file=sys.stderr)
            raise RefusedError(plan.faults[-1])
        return plan

    def _id_to_run(self, newest: RunState | None) -> str:
        """Return the given id, or the id of the newest run if it can go on, or a new id."""
        if self.config.run is not None:
            if not _RUN_ID.fullmatch(self.config.run):
                raise ConfigError(
                    f"run must be letters, digits, '_', '.' and '-', at most 64 characters, got '{self.config.run}'."
                )
            return self.config.run
        if newest is not None and newest.state in (State.running, State.failed):
            return newest.run
        return f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"

    def _existing_run(self) -> RunState:
        """Return the given run, or the newest.

        Raises:
            ConfigError: There is no such run.
        """
        run_id = self.config.run or newest_run(self.ledger, self.name)
        run = None if run_id is None else read_run(self.ledger, self.name, run_id)
        if run is None:
            known = {entry.payload["run"] for entry in self.ledger.find(PipelineStarted, pipeline=self.name)}
            raise ConfigError(
                f"Pipeline '{self.name}' has no run '{run_id}'.{did_you_mean(str(run_id), known)}"
                if run_id is not None
                else f"Pipeline '{self.name}' was never run."
            )
        return run

    def _lock(self) -> AbstractContextManager[None]:
        return hold_lock(
            self.lock_file,
            f"Another process (pid {{pid}}) runs pipeline '{self.name}'. Wait until it has ended, or cancel its run.",
        )

    def _is_led(self) -> bool:
        if self.record.node_id is not None:  # the lock is on the head's machine
            return self._existing_run().state is State.running
        try:
            with self._lock():
                return False
        except ConfigError:
            return True
