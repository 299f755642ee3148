"""The ledger's entries about one model version."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import ModelEvaluated, ModelMonitored, ModelReproduced
from cluster.lineage.trace import ModelTrace, read_entries, trace_model
from cluster.registry import retirement


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Everything that the ledger has about one version."""

    trace: ModelTrace
    """Registration, training set, source columns and deployments."""
    evaluation: Entry | None
    """The newest evaluation on held-out rows, or else the newest one."""
    same_rows: list[Entry]
    """All evaluations on the rows of `evaluation`, the newest first."""
    other_evaluations: list[Entry]
    """The newest evaluation of each other data set."""
    monitored: list[Entry]
    """The newest monitoring run of each variant."""
    reproduced: Entry | None
    retired: Entry | None
    """The retirement, if it is in force."""

    def newest_with(self, part: str) -> Entry | None:
        """Return the newest evaluation of these rows with a part, such as `fairness`. A run can leave parts out."""
        return next((entry for entry in self.same_rows if entry.payload.get(part)), None)


def read_history(ledger: Ledger, model: str, version: int | str) -> History:
    """Find the entries about a version with the event index.

    Raises:
        ModelNotFound: There is no such version.
    """
    trace = trace_model(read_entries(ledger, model, version), model, version)
    named: dict[str, Any] = {"name": trace.model, "version": trace.version}
    all_evaluations = list(ledger.find(ModelEvaluated, newest_first=True, **named))
    evaluations = _newest_of_each(all_evaluations, _rows)
    held_out = [entry for entry in evaluations if entry.payload.get("chosen_rows", "") != "all"]
    evaluation = next(iter([*held_out, *evaluations]), None)
    monitored = ledger.find(ModelMonitored, newest_first=True, model=trace.model, version=trace.version)
    return History(
        trace=trace,
        evaluation=evaluation,
        same_rows=[
            one for one in all_evaluations if evaluation is not None and _rows(one) == _rows(evaluation)
        ],
        other_evaluations=[entry for entry in evaluations if entry is not evaluation],
        monitored=_newest_of_each(monitored, lambda entry: entry.payload["variant"]),
        reproduced=ledger.newest(ModelReproduced, **named),
        retired=retirement(ledger, trace.model, trace.version),
    )


def _rows(entry: Entry) -> tuple[str, str]:
    """Return which rows an evaluation used. Older events have only the data set."""
    return entry.payload["data_hash"], entry.payload.get("chosen_rows", "")


def _newest_of_each(newest_first: Iterable[Entry], key: Callable[[Entry], Hashable]) -> list[Entry]:
    found: dict[Hashable, Entry] = {}
    for entry in newest_first:
        found.setdefault(key(entry), entry)
    return list(found.values())
