"""The split: by the join key of the training set, recorded with the version, and used again by other jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import ConfigError, TrainingSetError
from cluster.ledger import Ledger
from cluster.registry import Lineage, ModelVersion
from jobs.monitor.config import MonitorConfig
from jobs.monitor.reference import reference_rows
from jobs.train.config import LearningConfig, SplitConfig, TrainConfig
from jobs.train.data import TrainingSet, join_keys
from jobs.train.describe import describe_data, omitted_columns
from jobs.train.run.lineage import build_lineage
from jobs.train.split import held_out_mask, resolve_split, version_held_out_mask
from jobs.train.tabular_network.family import Parameters
from jobs.train.training_data import prepare_rows
from tests.samples.model_versions import model_version

ROWS = 400
KEYS = [f"k{n // 4}" for n in range(ROWS)]


def source(*, keys: tuple[str, ...] = (), manifest: bool = True, **columns: Any) -> TrainingSet:
    base = {
        "order_id": list(range(ROWS)),
        "customer": KEYS,
        "event_timestamp": pa.array(np.arange(ROWS), pa.timestamp("us", "UTC")),
        "region": ["north"] * ROWS,
        "income__amount": [float(n % 7) for n in range(ROWS)],
        "y": [n % 3 % 2 for n in range(ROWS)],
    }
    columns_of = [{"name": "income__amount", "categorical": False}]
    described = {"columns": columns_of, "join_keys": list(keys), "rows": ROWS} if manifest else {}
    return TrainingSet(table=pa.table(base | columns), manifest=described, hash="h", join_keys=keys)


def config(**changes: Any) -> LearningConfig:
    return LearningConfig(**{"name": "m", "training_set": "t", "label": "y"} | changes)


def version(split: dict[str, Any] | None, *, hash: str = "h") -> ModelVersion:
    settings = {} if split is None else {"split": split}
    return model_version(Lineage(training_set_hash=hash, config=settings, seed=5))


@pytest.mark.parametrize(
    ("data", "column"),
    [
        (source(keys=("order_id",)), "order_id"),
        (source(keys=("customer", "order_id")), "customer"),
        (source(keys=("elsewhere", "customer")), "customer"),
        (source(keys=("region", "order_id")), "order_id"),
        (source(keys=()), None),
        (source(manifest=False), "order_id"),
        (source(manifest=False, shop_id=KEYS), None),
    ],
)
def test_the_default_split_uses_the_join_key(data: TrainingSet, column: str | None) -> None:
    """The first key that splits the rows; without a manifest the only identifier; else rows are drawn by the seed."""
    assert resolve_split(SplitConfig(), data).column == column


def test_a_split_by_text_keeps_the_rows_of_an_entity_together() -> None:
    """About a quarter of the entities is held out, the same on every machine."""
    data = source(keys=("customer",))
    mask = held_out_mask(resolve_split(SplitConfig(), data), data.table, seed=0)
    assert {tuple(sides) for sides in mask.reshape(-1, 4).tolist()} == {(True,) * 4, (False,) * 4}
    assert 0.1 < mask.mean() < 0.4
    assert np.flatnonzero(mask)[:5].tolist() == [0, 1, 2, 3, 8]
    encoded = data.table.set_column(1, "customer", data.table["customer"].dictionary_encode())
    assert np.array_equal(held_out_mask(SplitConfig(column="customer"), encoded, seed=0), mask)


def test_training_records_the_column_that_auto_resolved_to() -> None:
    """Otherwise a change of the default would hold out other rows."""
    data = source(keys=("order_id",))
    chosen = TrainConfig(name="m", training_set="t", label="y", split=resolve_split(SplitConfig(), data))
    recorded = build_lineage(chosen, data, Parameters(), sweep={}).config["split"]
    drawn = {"column": "order_id", "modulo": 4, "remainder": 3}
    assert recorded == drawn | {"seed": None, "from_time": None}
    mask = version_held_out_mask(version(recorded), data, advice="")
    assert np.array_equal(np.flatnonzero(mask), np.arange(3, ROWS, 4))


@pytest.mark.parametrize("recorded", [{"column": "order_id", "modulo": 5, "remainder": 0}, None])
def test_monitoring_uses_the_recorded_split(recorded: dict[str, Any] | None) -> None:
    """A version without a recorded split gets the default. A modulo without a column is refused."""
    data = source(keys=("order_id",))
    default = MonitorConfig(name="m", reference="t", label="y")
    rows = reference_rows(data, version(recorded), default)["order_id"].to_list()
    assert rows == (list(range(0, ROWS, 5)) if recorded else list(range(3, ROWS, 4)))
    all_rows = MonitorConfig(name="m", reference="t", label="y", split=SplitConfig(column=None))
    assert reference_rows(data, version(recorded), all_rows).height == ROWS
    half = MonitorConfig(name="m", reference="t", label="y", split=SplitConfig(modulo=8))
    with pytest.raises(ConfigError, match=r"split\.column"):
        reference_rows(data, version(recorded), half)


def test_rows_drawn_by_the_seed_are_only_known_in_the_training_set() -> None:
    """The same draw from another file would return rows that were used in training."""
    drawn = {"column": None, "modulo": 4, "remainder": 3}
    data = source()
    mask = version_held_out_mask(version(drawn), data, advice="Use all.")
    assert np.array_equal(mask, held_out_mask(SplitConfig(column=None), data.table, seed=5))
    with pytest.raises(TrainingSetError, match=r"another data set\. Use all\."):
        version_held_out_mask(version(drawn, hash="other"), data, advice="Use all.")


def test_join_keys_of_an_older_manifest_come_from_the_ledger(tmp_path: Path) -> None:
    """If the ledger does not have the service, there are no join keys."""
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    assert join_keys({"join_keys": ["a", "b"]}, ledger) == ("a", "b")
    assert join_keys({"service": "gone", "service_version": "1"}, ledger) == ()
    assert join_keys({}, ledger) == ()


def test_training_describes_its_data_and_the_omitted_columns() -> None:
    """Rows, inputs, classes, and the reason for each omitted column."""
    data = source(keys=("order_id",))
    settings = config(split=resolve_split(SplitConfig(), data))
    lines = describe_data(settings, data, prepare_rows(settings, data))
    assert lines[0] == ("400 rows: 270 to fit on, 30 for early stopping, 100 held out (order_id % 4 == 3)")
    assert lines[1] == "1 inputs: income__amount"
    assert lines[2] == "label y: 2 classes, 0 (66.8%), 1 (33.2%)"
    assert omitted_columns(settings, data, ["income__amount"]) == {
        "order_id": "the split uses it",
        "customer": "in no feature view",
        "event_timestamp": "time",
        "region": "in no feature view",
    }
    plain = source(manifest=False, signup=pa.array([0] * ROWS, pa.date32()))
    settings = config(split=SplitConfig(column=None), exclude=["region"])
    assert omitted_columns(settings, plain, ["customer", "income__amount"]) == {
        "order_id": "identifier, judging by its name",
        "event_timestamp": "time",
        "signup": "time",
    }
