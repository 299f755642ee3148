"""Time that a ledger with many events takes for opening, for one append, and for each read of the commands.

The benchmark compares a ledger of 100 events with a ledger of the same models and views with a longer history: batches,
materialisations, compactions, weight changes, decisions and outcomes. `catch_up` is the first read after an older
release has written the ledger. This read fills the event index and the projections. It is measured once, on `CATCH_UP`
events.
"""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.events import (
    AccessDecided,
    AliasMoved,
    BatchIngested,
    EdgeLimitSet,
    FeatureServiceApplied,
    FeatureViewApplied,
    LedgerEvent,
    ModelDeployed,
    ModelRegistered,
    OutcomesReceived,
    PredictionsCompacted,
    RolloutStarted,
    RolloutWeightChanged,
    Subject,
    TrainingSetBuilt,
    ViewMaterialized,
)
from cluster.ledger.table_versions import unrecorded
from cluster.lineage.trace import read_entries, trace_model
from cluster.registry import Registry
from cluster.storage import Layout
from feature_jobs.batches.rules import new_columns
from feature_jobs.store.catalog.specifications import service_spec, view_spec
from feature_jobs.store.ingestion.quarantine import quarantined
from serve_apps.edge.control.own_limits import read_own_limits
from serve_apps.rollout.serving_state import read_states
from tests.samples.many_events import load_events

SMALL, LARGE, CATCH_UP = 100, 1_000_000, 50_000
TURNS, COMMANDS = 50, 3
HOUR = "2026-01-01T00:00:00+00:00"


def definition(view: str) -> dict[str, Any]:
    """Return the definition of a view with one feature."""
    return {
        "name": view,
        "schema": [{"name": "x", "dtype": "float64", "sensitivity": "public", "categorical": False}],
        "join_keys": ["id"],
        "entities": [],
        "purposes": [],
        "region": None,
        "ttl_s": None,
        "source": {"path": f"{view}.parquet"},
        "transform": None,
    }


def batch(view: str, number: int) -> BatchIngested:
    """Return the event of one batch of a view."""
    return BatchIngested(
        view=view,
        view_version="1",
        ingest_id=f"{view}-{number}",
        source=f"{view}.parquet",
        source_digest=f"{number:064}",
        rows_in=10,
        rows_stored=10,
        rows_quarantined=0,
        table_version=number,
        source_columns=["id", "x"],
    )


def state() -> Iterator[LedgerEvent]:
    """Yield the first events of both ledgers: views, a service, a training set, a model in a rollout, a limit."""
    for view in ("income", "clicks"):
        yield FeatureViewApplied(view=view, version="1", definition=definition(view))
        yield batch(view, 0)
    yield FeatureServiceApplied(
        service="credit", version="1", views={"income": "1"}, view_order=["income"], module="m"
    )
    yield TrainingSetBuilt(
        service="credit",
        service_version="1",
        rows=10,
        row_hash="h",
        entities_hash="e",
        table_versions={"income": 0},
        view_versions={"income": "1"},
        output="t.parquet",
    )
    lineage = {"training_set_hash": "h", "table_versions": {}, "service": "credit", "service_version": "1"}
    for version in (1, 2):
        yield ModelRegistered(
            name="loan",
            version=version,
            family="lightgbm",
            task="binary",
            manifest_hash="m",
            files={},
            lineage=lineage,
            metrics={},
        )
        app = f"loan-v{version}"
        yield ModelDeployed(name="loan", version=version, variant="v", app=app, route_prefix=f"/{app}")
    yield AliasMoved(name="loan", alias="champion", version=1, previous=None, reason="first")
    yield RolloutStarted(
        model="loan",
        rollout="r",
        salt="s",
        treatment_version=2,
        treatment_variant="t",
        champion_version=1,
        weight=5,
    )
    yield EdgeLimitSet(limited="tenant", name="bank", requests_per_s=100, concurrent=None)


def history(*, views: tuple[str, str] = ("clicks", "income"), model: str = "loan") -> Iterator[LedgerEvent]:
    """Yield more events: batches of the first view, materialisations of the second, and events of a model in a rollout.

    The iterator never ends.
    """
    ingested, materialized = views
    denied = AccessDecided(
        allowed=False,
        role="service",
        purpose="",
        tenant="bank",
        entrypoint="",
        action="predict",
        kind="model",
        resource=model,
        column_class="",
        policies=[],
    )
    for number in itertools.count(1):
        yield batch(ingested, number)
        yield OutcomesReceived(model=model, accepted=10, digest=f"{number:064}")
        yield ViewMaterialized(
            view=materialized, view_version="1", table_version=number, as_of=HOUR, entities=1000
        )
        yield OutcomesReceived(model=model, accepted=10, digest=f"{number:064}")
        yield PredictionsCompacted(model=model, table_version=number, segments=1, records=100)
        yield denied
        if number % 20 == 0:
            yield RolloutWeightChanged(model=model, rollout="r", weight=5 + number % 40)
            yield AliasMoved(name=model, alias="challenger", version=2, previous=2, reason="again")


def reads(ledger: Ledger, folder: Path, count: int) -> dict[str, Callable[[], object]]:
    """Return a function for each read that the commands make, by name."""
    registry = Registry(ledger, Layout(str(folder)))
    newest = range(max(0, count // 7 - 3), count // 7)
    return {
        "open": lambda: Ledger(str(ledger.engine.url)).close(),
        "head": ledger.head,
        "states": lambda: read_states(ledger),
        "limits": lambda: read_own_limits(ledger),
        "known_types": lambda: ledger.require_known(Subject.serving),
        "champion": lambda: registry.get("loan"),
        "view": lambda: view_spec(ledger, "clicks"),
        "service": lambda: service_spec(ledger, "credit"),
        "last_batch": lambda: new_columns(ledger, "clicks", ["id"]),
        "batch_of_content": lambda: list(ledger.find(BatchIngested, view="clicks", source_digest=f"{0:064}")),
        "batch_id": lambda: ledger.newest(BatchIngested, ingest_id="clicks-0"),
        "quarantined": lambda: quarantined(ledger, "clicks"),
        "materialization": lambda: ledger.newest(ViewMaterialized, view="income"),
        "compactions": lambda: unrecorded(ledger, PredictionsCompacted, newest, model="loan"),
        "lineage": lambda: trace_model(read_entries(ledger, "loan", "champion"), "loan", "champion"),
        "append": lambda: ledger.append(next(history()), actor="user:bench"),
    }


def milliseconds(works: Sequence[Callable[[], object]], *, turns: int) -> list[float]:
    """Return the shortest time of each function in milliseconds. The first call of each is not counted.

    The functions are called in turns, so all of them run under the same conditions.
    """
    took: list[list[float]] = [[] for _ in works]
    for turn in range(turns + 1):
        for number, work in enumerate(works):
            started = time.perf_counter()
            work()
            if turn:
                took[number].append((time.perf_counter() - started) * 1000)
    return [min(times) for times in took]


def command(root: Path) -> None:
    """Run one command in its own process."""
    arguments = ["--root", str(root), "--model", "loan", "--version", "champion"]
    subprocess.run(
        [sys.executable, "-m", "cluster.lineage", *arguments],
        check=True,
        capture_output=True,
        cwd=Path(__file__).resolve().parents[2],
    )


def build(folder: Path, count: int, *, indexed: bool = True) -> Ledger:
    """Return a new ledger with `count` events."""
    folder.mkdir()
    ledger = Ledger(f"sqlite:///{folder}/ledger.db")
    events = itertools.islice(itertools.chain(state(), history()), count)
    load_events(ledger, events, apart=dt.timedelta(seconds=20), indexed=indexed)
    return ledger


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """Measure and print the figures, and yield them."""
    ledgers = {}
    for count in (SMALL, LARGE):
        ledgers[count] = build(folder / str(count), count)
    names = {count: reads(ledger, folder / str(count), count) for count, ledger in ledgers.items()}
    for name in names[SMALL]:
        small, large = milliseconds([names[count][name] for count in (SMALL, LARGE)], turns=TURNS)
        yield from _figures(name, small, large)
    commands = [functools.partial(command, folder / str(count)) for count in (SMALL, LARGE)]
    yield from _figures("cluster.lineage", *milliseconds(commands, turns=COMMANDS))
    older = build(folder / "older", CATCH_UP, indexed=False)
    started = time.perf_counter()
    for read in (
        lambda: view_spec(older, "clicks"),
        lambda: read_states(older),
        lambda: quarantined(older, "clicks"),
    ):
        read()
    seconds = time.perf_counter() - started
    print(f"{CATCH_UP:9} events  catch_up {seconds:10.2f} s", flush=True)
    yield {
        "system": "falaj",
        "case": f"{CATCH_UP} events",
        "metric": "ledger_catch_up",
        "value": seconds,
        "unit": "s",
    }


def _figures(name: str, small: float, large: float) -> Iterator[dict[str, Any]]:
    print(f"ledger  {name:18} {small:9.3f} {large:9.3f} ms, ratio {large / small:5.2f}", flush=True)
    for count, value in ((SMALL, small), (LARGE, large)):
        yield {
            "system": "falaj",
            "case": f"{count} events",
            "metric": f"ledger_{name}",
            "value": value,
            "unit": "ms",
        }
