"""The state of a pipeline's runs, read from the ledger."""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import (
    PipelineCancelled,
    PipelineFinished,
    PipelineStarted,
    StageFinished,
    StageStarted,
)
from jobs.pipeline.graph import Graph, Stage


class State(enum.StrEnum):
    """State of a run or of one of its stages. Except for `waiting` and `running`, events have these values."""

    waiting = "waiting"
    running = "running"
    """Started, and not finished. The process that leads the run may have been killed."""
    done = "done"
    failed = "failed"
    refused = "refused"
    """The stage's command refused its input (exit code 2)."""
    unmet = "unmet"
    """The stage's result does not satisfy a requirement."""
    cancelled = "cancelled"


@dataclass(kw_only=True, slots=True)
class StageState:
    """A stage of one run."""

    state: State = State.waiting
    job: str = ""
    key: str = ""
    seconds: float = 0.0
    started_at: str = ""
    finished_at: str = ""
    reason: str = ""
    reused_from: str = ""
    exit_code: int | None = None
    attempts: int = 0
    seq: int = 0
    """`seq` of the event that started the last attempt."""
    arguments: list[str] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class RunState:
    """One run with its stages, in the order in which they can run."""

    pipeline: str
    run: str
    state: State
    graph: Graph
    stages: dict[str, StageState]
    started_at: str
    seconds: float = 0.0
    reason: str = ""


def newest_run(ledger: Ledger, pipeline: str) -> str | None:
    """Return the id of the run that was started or continued last."""
    entry = ledger.newest(PipelineStarted, pipeline=pipeline)
    return None if entry is None else str(entry.payload["run"])


def read_newest_run(ledger: Ledger, pipeline: str) -> RunState | None:
    """Return the state of the run that was started or continued last, or None if the pipeline was never run."""
    run = newest_run(ledger, pipeline)
    return None if run is None else read_run(ledger, pipeline, run)


def read_run(ledger: Ledger, pipeline: str, run: str) -> RunState | None:
    """Return the state of a run, or None if there is no run with this id.

    Raises:
        ConfigError: The run is one of another pipeline.
    """
    started = list(ledger.find(PipelineStarted, run=run))
    if not started:
        return None
    if started[-1].payload["pipeline"] != pipeline:
        raise ConfigError(
            f"Run '{run}' is one of pipeline '{started[-1].payload['pipeline']}'. Give another id as `run`, or the "
            "name of that pipeline."
        )
    graph = recorded_graph(started[-1].payload["stages"])
    state = RunState(
        pipeline=pipeline,
        run=run,
        state=State.running,
        graph=graph,
        stages={name: StageState() for name in graph.stages},
        started_at=started[0].time,
    )
    finished = ledger.newest(PipelineFinished, run=run)
    if finished is not None and finished.seq > started[-1].seq:
        state.state = State(finished.payload["state"])
        state.seconds, state.reason = finished.payload["seconds"], finished.payload["reason"]
    events = [*ledger.find(StageStarted, run=run), *ledger.find(StageFinished, run=run)]
    for entry in sorted(events, key=lambda entry: entry.seq):
        if entry.payload["stage"] in state.stages:
            _apply(state.stages[entry.payload["stage"]], entry)
    return state


def last_done(ledger: Ledger, pipeline: str, stage: str) -> StageFinished | None:
    """Return how a stage was done, or None if it was started again since then.

    A later attempt may have deployed or stored something before it failed, so an earlier success does not count.
    """
    event = last_finished(ledger, pipeline, stage)
    return event if event is not None and event.state == State.done else None


def last_finished(ledger: Ledger, pipeline: str, stage: str) -> StageFinished | None:
    """Return how the newest attempt of a stage ended in any run of its pipeline; None if it has not ended."""
    finished = ledger.newest(StageFinished, pipeline=pipeline, stage=stage)
    started = ledger.newest(StageStarted, pipeline=pipeline, stage=stage)
    if finished is None or (started is not None and started.seq > finished.seq):
        return None
    event = finished.event()
    return event if isinstance(event, StageFinished) else None


def cancelled_at(ledger: Ledger, run: str) -> int:
    """Return the `seq` of a run's last cancellation; 0 if it was never cancelled."""
    cancelled = ledger.newest(PipelineCancelled, run=run)
    return 0 if cancelled is None else cancelled.seq


def is_cancelled(ledger: Ledger, run: str) -> bool:
    """Return whether a run was cancelled after it was last started or continued."""
    cancelled = ledger.newest(PipelineCancelled, run=run)
    started = ledger.newest(PipelineStarted, run=run)
    return cancelled is not None and (started is None or cancelled.seq > started.seq)


def record_graph(graph: Graph) -> list[dict[str, Any]]:
    """Return a graph as it is in `PipelineStarted`."""
    return [
        {
            "name": stage.name,
            "command": stage.command,
            "after": list(stage.after),
            "require": stage.require,
            "title": stage.title,
            "group": stage.group,
        }
        for stage in graph.stages.values()
    ]


def recorded_graph(stages: list[dict[str, Any]]) -> Graph:
    """Return the graph of a `PipelineStarted`."""
    known = Stage.__dataclass_fields__
    found = [
        Stage(
            **{key: value for key, value in content.items() if key in known}
            | {"after": tuple(content["after"])}
        )
        for content in stages
    ]
    return Graph({stage.name: stage for stage in found})


def seconds_since(start: str, end: str) -> float:
    """Return the seconds between two times in ISO 8601."""
    return (dt.datetime.fromisoformat(end) - dt.datetime.fromisoformat(start)).total_seconds()


def _apply(stage: StageState, entry: Entry) -> None:
    match entry.event():
        case StageStarted() as event:
            stage.state, stage.job, stage.key, stage.seq = State.running, event.job, event.key, entry.seq
            stage.started_at, stage.arguments = entry.time, event.arguments
            stage.attempts += 1
            stage.reason = stage.reused_from = ""
        case StageFinished() as event:
            stage.state, stage.job, stage.key = State(event.state), event.job, event.key
            stage.seconds, stage.reason, stage.exit_code = event.seconds, event.reason, event.exit_code
            stage.outputs, stage.result, stage.reused_from = event.outputs, event.result, event.reused_from
            stage.started_at, stage.finished_at = event.started_at or stage.started_at, entry.time
