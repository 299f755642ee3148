"""Several events are appended in one transaction, or none of them if somebody changed the state they depend on."""

from __future__ import annotations

import pytest

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import ClusterStopped, LedgerEvent, RolloutWeightChanged, Subject

OURS = [ClusterStopped(cluster_id="1"), ClusterStopped(cluster_id="2")]


def of_m(entry: Entry) -> bool:
    return entry.payload["model"] == "m"


def append(ledger: Ledger, *, since: int) -> list[Entry] | None:
    return ledger.append_unless_changed(
        OURS, actor="test", since=since, types=Subject.serving.includes, concerns=of_m
    )


def weight(model: str) -> LedgerEvent:
    return RolloutWeightChanged(model=model, rollout="r", weight=5)


def test_all_events_are_appended(url: str) -> None:
    """They follow each other in the chain."""
    ledger = Ledger(url)
    entries = append(ledger, since=0)
    assert entries is not None
    assert [entry.seq for entry in entries] == [1, 2]
    assert entries[1].prev_hash == entries[0].hash


@pytest.mark.parametrize(
    ("event", "refused"),
    [(weight("m"), True), (weight("n"), False), (ClusterStopped(cluster_id="m"), False)],
)
def test_new_event_about_the_state_refuses_all(url: str, event: LedgerEvent, refused: bool) -> None:
    """An event of another model or of another type does not."""
    ledger = Ledger(url)
    ledger.append(weight("m"), actor="test")
    since = ledger.head()
    ledger.append(event, actor="test")
    assert (append(ledger, since=since) is None) is refused
    assert ledger.head() == since + 1 + (0 if refused else 2)


def test_failure_appends_none(url: str) -> None:
    """The second event cannot be written as JSON, so the first is not there either."""
    ledger = Ledger(url)
    broken = ClusterStopped(cluster_id={1, 2})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plain JSON values"):
        ledger.append_unless_changed(
            [OURS[0], broken], actor="test", since=0, types=Subject.serving.includes, concerns=of_m
        )
    assert ledger.head() == 0
