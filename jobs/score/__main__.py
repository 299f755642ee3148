"""`python -m jobs.score name=m version=3 input=rows.parquet output=scores`: predict for many rows, exactly once.

The command can be killed at any time. Run it again, and it writes only the parts that are missing.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ScoringFinished
from cluster.ledger.store import utc_now
from cluster.placement import Selector, find_nodes
from cluster.security.acting import Actor, create_actor
from cluster.session import attach, require_running_cluster
from cluster.storage import is_uri, layout, local, sha256, write_bytes
from feature_jobs.batches.work import Work
from jobs.score.config import ScoreConfig
from jobs.score.files import (
    MANIFEST,
    FileOfRows,
    Manifest,
    PartResult,
    digest,
    is_empty,
    read_results,
    read_run,
    remove_left_behind,
    write_run,
)
from jobs.score.lock import run_lock
from jobs.score.part import score_part
from jobs.score.plan import Plan, make_plan
from jobs.score.set_aside import too_many
from jobs.score.source import Part, parts_of

PROGRESS_S = 10.0
"""Seconds between two lines about the progress."""


@job("score", ScoreConfig, timed=True)
def main(config: ScoreConfig) -> dict[str, Any]:
    """Score the rows of the input."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.score")
    finished = score(config, ledger, actor)
    reasons = "".join(f"\n  {count} rows set aside: {reason}" for reason, count in finished.set_aside.items())
    left_out = f"\nnot in the output, because you may not export it: {', '.join(finished.left_out)}"
    print(
        f"run {finished.run}: {finished.model} version {finished.version} scored {finished.scored} of {finished.rows} "
        f"rows to {finished.output}{reasons}{left_out if finished.left_out else ''}"
    )
    return {
        "run": finished.run,
        "version": finished.version,
        "rows": finished.rows,
        "scored": finished.scored,
        "set_aside": sum(finished.set_aside.values()),
        "output": finished.output,
    }


def score(config: ScoreConfig, ledger: Ledger, actor: Actor) -> ScoringFinished:
    """Start or continue a run, and return the event of its end. A finished run is not run again.

    Raises:
        RefusedError: The run cannot start, or too many rows are bad.
    """
    plan = make_plan(config, ledger, actor, now=utc_now())
    run = plan.started.run
    if (found := ledger.newest(ScoringFinished, run=run)) is not None:
        if read_run(plan.started.output) != run:
            raise ConfigError(
                f"Run '{run}' is finished, and its output {plan.started.output} is gone. Give another `run`."
            )
        print(f"run {run} is finished; nothing to do. For a new run, give another output", file=sys.stderr)
        return ScoringFinished(**found.payload)
    with run_lock(local(layout(config.storage).runs), run):
        require_own_folder(plan)
        folder = plan.scoring.folder
        write_run(folder.uri, run)
        if plan.is_new and ledger.append_once(plan.started, actor=actor.name, run=run) is None:
            raise ConfigError(
                f"Another command has just started run '{run}'. Run this one again to continue it."
            )
        results = score_parts(config, plan)
        remove_left_behind(folder)
        finished = finish(plan, results)
        ledger.append_once(finished, actor=actor.name, run=run)
    return finished


def require_own_folder(plan: Plan) -> None:
    """Require that the output folder is empty, or has the files of this run.

    Raises:
        ConfigError: The folder has other files.
    """
    uri = plan.scoring.folder.uri
    if is_empty(uri):
        return
    run = read_run(uri)
    if run == plan.started.run:
        return
    if run is not None:
        raise ConfigError(
            f"The output {uri} has the files of run '{run}', with other rows or settings. Give another output."
        )
    raise ConfigError(f"The output {uri} is not an empty folder. Give another output.")


def score_parts(config: ScoreConfig, plan: Plan) -> list[PartResult]:
    """Score the parts that are not done, and return the results of all parts.

    Raises:
        RefusedError: A part cannot be read or scored, or too many rows are bad.
    """
    parts = parts_of(plan.source, config.part_rows)
    results = read_results(plan.scoring.folder)
    missing = [part for part in parts if not is_done(part, results.get(part.number))]
    if len(missing) < len(parts):
        print(f"continuing: {len(parts) - len(missing)} of {len(parts)} parts are done", flush=True)
    work = Work(config.task_values, lambda: attach_for_tasks(config, plan))
    values = sum(part.rows for part in missing) * max(1, plan.scoring.inputs.signature.width)
    work.expect(values, is_large=config.placement.region is not None)
    scoring = replace(plan.scoring, in_tasks=work.in_tasks)
    block = work.put(scoring)
    again = {part.number for part in missing}
    progress = _Progress(plan, (result for number, result in results.items() if number not in again))
    for result in work.run_all(score_part, ((block, part) for part in missing)):
        results[result.number] = result
        progress.add(result)
    return [results[part.number] for part in parts]


def is_done(part: Part, result: PartResult | None) -> bool:
    """Return whether a result accounts for all rows of a part."""
    if result is None:
        return False
    return result.rows == part.rows == result.scored + sum(result.set_aside.values())


def attach_for_tasks(config: ScoreConfig, plan: Plan) -> Selector:
    """Attach to Ray, and return where tasks may run: on this node only if they use files of its disk.

    Raises:
        ConfigError: No node may run them.
    """
    attach(config)
    uses_disk = not is_uri(plan.source.uri) or not is_uri(plan.scoring.folder.uri)
    reason = "it reads or writes files of this machine" if uses_disk else None
    return find_nodes(config.placement, on_this_node=reason)


class _Progress:
    """Counts rows, prints the progress, and refuses the run when too many rows are bad."""

    def __init__(self, plan: Plan, done: Iterable[PartResult]) -> None:
        self._rows, self._limit = plan.source.rows, plan.scoring.max_bad
        self._done = 0
        self._reasons: Counter[str] = Counter()
        self._began = self._printed = time.monotonic()
        self._scored_here = 0
        for result in done:
            self._count(result)

    def add(self, result: PartResult) -> None:
        """Count a part.

        Raises:
            TooManyBadRows: More rows are bad than allowed.
        """
        self._count(result)
        self._scored_here += result.rows
        now = time.monotonic()
        if now - self._printed >= PROGRESS_S:
            self._printed = now
            rate = self._scored_here / (now - self._began)
            left_s = (self._rows - self._done) / rate if rate else 0
            print(f"{self._done} of {self._rows} rows, {rate:.0f} rows/s, {left_s:.0f} s left", flush=True)

    def _count(self, result: PartResult) -> None:
        self._done += result.rows
        self._reasons.update(result.set_aside)
        if (count := self._reasons.total()) > self._limit:
            raise too_many(count, self._limit, self._reasons)


def finish(plan: Plan, results: list[PartResult]) -> ScoringFinished:
    """Write the manifest, and return the event of the run's end."""
    started, folder = plan.started, plan.scoring.folder
    reasons: Counter[str] = Counter()
    for result in results:
        reasons.update(result.set_aside)
    manifest = Manifest(
        run=started.run,
        model=started.model,
        version=started.version,
        key=folder.key,
        input=started.input,
        input_hash=started.input_hash,
        rows=sum(result.rows for result in results),
        scored=sum(result.scored for result in results),
        set_aside=dict(sorted(reasons.items())),
        columns=list(results[0].columns),
        files=[_hashed(folder.uri, file) for result in results for file in result.files],
        set_aside_files=[_hashed(folder.uri, file) for result in results for file in result.set_aside_files],
    )
    data = manifest.to_bytes()
    write_bytes(f"{folder.uri}/{MANIFEST}", data)
    return ScoringFinished(
        run=started.run,
        model=started.model,
        version=started.version,
        input_hash=started.input_hash,
        rows=manifest.rows,
        scored=manifest.scored,
        set_aside=manifest.set_aside,
        output=started.output,
        manifest_hash=digest(data),
        columns=manifest.columns,
        left_out=plan.left_out,
    )


def _hashed(uri: str, file: FileOfRows) -> FileOfRows:
    return replace(file, sha256=sha256(f"{uri}/{file.name}"))


if __name__ == "__main__":
    main()
