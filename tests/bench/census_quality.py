"""`make bench BENCH=census_quality`: the AUC of each family on held-out people of the census, beside LightGBM's.

The rows are the people of 2015, with the attributes that the statistical office publishes, and without the computed
features of the demo. They are trained on as in `jobs.train`, with the same loop, but without Ray, so no cluster is
needed. `--seeds 3` trains each family three times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import polars as pl
import torch

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from feature_jobs.census.source import ATTRIBUTES, records
from jobs.metrics import roc_auc
from jobs.train.config import DeepSpeedConfig, LearningConfig
from jobs.train.data import Dataset, TrainingSet, load_dataset
from jobs.train.families import ResolvedFamily, resolve_family
from jobs.train.lightgbm import fit_trees
from jobs.train.network.plan import LoopConfig, plan_steps
from jobs.train.network.protocol import network_signature
from jobs.train.rows.arrow_types import without_string_views
from jobs.train.rows.batches import TableBatches
from jobs.train.rows.file import open_row_file
from jobs.train.training_data import TrainingData, prepare_rows
from tests.processes.training import Curve, run_group
from tests.servers.key_broker import running_broker

TIMEOUT_S = 7200.0
"""A busy machine takes many minutes for a network."""
LIMIT = 0.005
"""A network may have an AUC that is lower than LightGBM's by at most this."""


def census(folder: Path, access: KeyAccess, *, year: int = 2015) -> TrainingData:
    """Write the people of a year to a protected file, and split them by their id."""
    people = records().filter(pl.col("year") == year).select("person_id", *ATTRIBUTES, "employed")
    uri, protection = str(folder / "people.parquet"), Protection(default="rows")
    protected_files(access).write(without_string_views(people.to_arrow()), uri, protection)
    rows = open_row_file(uri, access, protection=protection)
    config = LearningConfig(name="census", training_set=uri, label="employed")
    return prepare_rows(config, TrainingSet(table=rows, manifest={}, hash=""))


def scores_of_trees(data: TrainingData, dataset: Dataset, family: ResolvedFamily, *, seed: int) -> Any:
    """Fit LightGBM, and return its scores of the held-out rows."""
    fitted = fit_trees(
        data.rows, family.parameters, seed, files=None, on_round=lambda completed, losses: None
    )
    return lightgbm.Booster(model_str=fitted.text).predict(dataset.matrix[dataset.held_out])


def scores_of_network(data: TrainingData, dataset: Dataset, family: ResolvedFamily, *, seed: int) -> Any:
    """Fit a network in one process, and return its logits for the held-out rows."""
    signature = network_signature(data)
    config = LoopConfig(
        module=family.module.__name__,
        parameters=family.parameters,
        signature=signature,
        batches=TableBatches(rows=data.rows),
        steps=plan_steps(int(data.fit.sum()), family.parameters, workers=[1], accumulation=1),
        deepspeed=DeepSpeedConfig(),
        seed=seed,
    )
    (result,) = run_group([Curve(config)], workers=1, timeout_s=TIMEOUT_S)
    network = family.module.build(signature, family.parameters).eval()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in result["weights"].items()})
    with torch.no_grad():
        parts = torch.from_numpy(dataset.matrix[dataset.held_out]).split(4096)
        return torch.cat([network(part) for part in parts]).squeeze(1).numpy()


def auc(data: TrainingData, dataset: Dataset, family: ResolvedFamily, *, seed: int) -> float:
    """Train a family, and return its AUC on the held-out rows."""
    scores_of = scores_of_network if family.is_network else scores_of_trees
    value = roc_auc(scores_of(data, dataset, family, seed=seed), dataset.target[dataset.held_out])
    assert value is not None, "the held-out people have both classes"
    return value


def main() -> int:
    """Train all families, print their AUCs, and return 1 if a network is too far below LightGBM."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--families", nargs="*", default=["tabular_network", "ft_transformer"])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of the networks"
    )
    options = parser.parse_args()
    changes = {name: _number(value) for name, _, value in (text.partition("=") for text in options.set)}
    means: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, running_broker("rows") as access:
        data = census(Path(folder), access)
        dataset = load_dataset(data.rows)
        print(
            f"{int(dataset.fit.sum())} people to fit on, {int(dataset.held_out.sum())} held out", flush=True
        )
        for name in ("lightgbm", *options.families):
            family = resolve_family({"family": name} | (changes if name != "lightgbm" else {}))
            started = time.monotonic()
            aucs = [auc(data, dataset, family, seed=seed) for seed in range(options.seeds)]
            means[name] = float(np.mean(aucs))
            print(
                f"{name:16} AUC {means[name]:.5f} ({', '.join(f'{value:.5f}' for value in aucs)}), "
                f"{means[name] - means['lightgbm']:+.5f} to LightGBM, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return int(min(means.values()) < means["lightgbm"] - LIMIT)


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


if __name__ == "__main__":
    sys.exit(main())
