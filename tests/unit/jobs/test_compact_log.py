"""`jobs.compact_log`, but for attaching and the policies: both logs, and one event for each compaction."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.errors import AccessDenied
from cluster.ledger import open_ledger
from cluster.ledger.events import OutcomesCompacted, PredictionsCompacted
from cluster.records import OutcomeRecord, SegmentWriter, count_records
from cluster.registry import Registry
from cluster.security.acting import Actor
from cluster.security.authorization.audit import Decisions
from cluster.security.authorization.policy import Policy
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.settings import PlatformConfig, StorageConfig
from jobs.compact_log import __main__ as compact_log
from tests.broker import running_broker

KEYS = ("predictions/m/sensitive", "outcomes/m/sensitive")


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_compaction_is_one_event_also_where_it_was_killed_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the table's version, and what it took; a run that finds nothing says nothing."""
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

        def said(kind: type[PredictionsCompacted] | type[OutcomesCompacted]) -> list[tuple[int, int, int]]:
            found = [entry.payload for entry in ledger.entries(kind)]
            return [(one["table_version"], one["segments"], one["records"]) for one in found]

        log = write("predictions")
        monkeypatch.setattr(compact_log, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            compact_log.run(log, PredictionsCompacted, ledger, actor, model="m")
        monkeypatch.undo()
        assert said(PredictionsCompacted) == []
        write("predictions")
        for taken in (1, 0):
            assert compact_log.run(log, PredictionsCompacted, ledger, actor, model="m") == taken
            assert said(PredictionsCompacted) == [(1, 1, 3), (2, 1, 3)]
        assert compact_log.run(write("outcomes"), OutcomesCompacted, ledger, actor, model="m") == 1
        assert said(OutcomesCompacted) == [(1, 1, 3)]
        assert count_records(log) == 6
    ledger.engine.dispose()


def test_a_token_scoped_to_one_model_compacts_the_logs_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's log is the model's."""
    storage = StorageConfig(root=str(tmp_path))
    ledger = open_ledger(PlatformConfig(storage=storage))
    monkeypatch.setattr(Registry, "names", lambda _: ["m", "other"])
    actor = Actor(
        principal=Principal(subject="t", role=Role.ml_engineer, purpose="", expires_at=0, models=("m",)),
        access=cast(KeyAccess, None),
        policy=Policy.load(),
        environment="development",
        decisions=Decisions(ledger.append),
    )
    taken: list[str] = []
    monkeypatch.setattr(compact_log, "run", lambda log, *_, model: taken.append(model) or 0)
    compact_log.compact_both(compact_log.CompactLogConfig(name="m", storage=storage), ledger, actor)
    with pytest.raises(AccessDenied, match="scope"):
        compact_log.compact_both(compact_log.CompactLogConfig(name="other", storage=storage), ledger, actor)
    assert taken == ["m", "m"]
    ledger.engine.dispose()
