"""`jobs.compact_log` without a cluster: both logs are compacted, with one event for each compaction."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.errors import AccessDenied
from cluster.ledger import open_ledger
from cluster.ledger.events import OutcomesCompacted, PredictionsCompacted
from cluster.records.reading import count_records
from cluster.records.schema import OutcomeRecord
from cluster.records.segments import SegmentWriter
from cluster.registry import Registry
from cluster.security.acting import Actor
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Policy
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.settings import PlatformConfig, StorageConfig
from jobs.compact_log import __main__ as compact_log
from tests.servers.key_broker import running_broker

KEYS = ("predictions/m/sensitive", "outcomes/m/sensitive")


def kill(*_: Any, **__: Any) -> None:
    """Raise like a job that is interrupted."""
    raise KeyboardInterrupt


def test_each_compaction_has_one_event_even_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run after a kill appends the missing event; a run without segments appends nothing."""
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(tmp_path))))
    with running_broker(*KEYS) as access:
        actor = cast(Actor, SimpleNamespace(name="t", access=access))

        def write(kind: str) -> Path:
            log = tmp_path / kind / "m"
            writer = SegmentWriter(log, store=key_store(access), key=f"{kind}/m/sensitive")
            for number in range(3):
                writer.append(
                    OutcomeRecord(prediction_id=str(number), outcome=1, observed_at="", received_at="")
                )
            writer.close()
            return log

        def events(kind: type[PredictionsCompacted] | type[OutcomesCompacted]) -> list[tuple[int, int, int]]:
            payloads = [entry.payload for entry in ledger.entries(kind)]
            return [(event["table_version"], event["segments"], event["records"]) for event in payloads]

        log = write("predictions")
        monkeypatch.setattr(compact_log, "append_events", kill)
        with pytest.raises(KeyboardInterrupt):
            compact_log.compact_log(log, PredictionsCompacted, ledger, actor, model="m")
        monkeypatch.undo()
        assert events(PredictionsCompacted) == []
        write("predictions")
        for num_segments in (1, 0):
            assert (
                compact_log.compact_log(log, PredictionsCompacted, ledger, actor, model="m") == num_segments
            )
            assert events(PredictionsCompacted) == [(1, 1, 3), (2, 1, 3)]
        assert compact_log.compact_log(write("outcomes"), OutcomesCompacted, ledger, actor, model="m") == 1
        assert events(OutcomesCompacted) == [(1, 1, 3)]
        assert count_records(log) == 6
    ledger.engine.dispose()


def test_a_token_scoped_to_one_model_cannot_compact_the_logs_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scope of a model also covers its logs; the other model's logs are not touched."""
    storage = StorageConfig(root=str(tmp_path))
    ledger = open_ledger(PlatformConfig(storage=storage))
    monkeypatch.setattr(Registry, "names", lambda _: ["m", "other"])
    actor = Actor(
        principal=Principal(subject="t", role=Role.ml_engineer, purpose="", expires_at=0, models=("m",)),
        access=cast(KeyAccess, None),
        policy=Policy.load(),
        environment="development",
        decisions=DecisionRecorder(ledger.append),
    )
    compacted: list[str] = []
    monkeypatch.setattr(compact_log, "compact_log", lambda log, *_, model: compacted.append(model) or 0)
    compact_log.compact_logs(compact_log.CompactLogConfig(name="m", storage=storage), ledger, actor)
    with pytest.raises(AccessDenied, match="scope"):
        compact_log.compact_logs(compact_log.CompactLogConfig(name="other", storage=storage), ledger, actor)
    assert compacted == ["m", "m"]
    ledger.engine.dispose()
