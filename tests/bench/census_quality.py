"""`make bench BENCH=census_quality`: the AUC of each family on held-out people of the census, beside LightGBM's.

The rows are the people of 2015, with the attributes that the statistical office publishes, and without the computed
features of the demo. Networks are trained by a plain torch loop in this process, with AdamW, and with the schedule of
`jobs.train`; so no cluster is needed. The state with the smallest validation loss counts, as in `jobs.train`.
`--seeds 3` trains each family three times.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm as lightgbm_package
import numpy as np
import polars as pl
import torch

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.runtime.tabular_network import TabularNetwork
from feature_jobs.census.source import ATTRIBUTES, records
from jobs.metrics import roc_auc
from jobs.train.arrow_types import without_string_views
from jobs.train.config import LearningConfig
from jobs.train.data import Dataset, TrainingSet, prepare
from jobs.train.ft_transformer import family as ft_transformer
from jobs.train.lightgbm import Parameters as TreeParameters
from jobs.train.lightgbm import _fit as fit_trees
from jobs.train.tabular_network.family import Parameters as NetworkParameters
from jobs.train.tabular_network.family import network_shape, rows_per_step
from jobs.train.tabular_network.loop import learning_rate, loss
from tests.samples.row_signature import row_signature

LIMIT = 0.005
"""A network may have an AUC that is lower than LightGBM's by at most this."""


def census(year: int = 2015) -> Dataset:
    """Return the people of a year, split by their id."""
    people = records().filter(pl.col("year") == year).select("person_id", *ATTRIBUTES, "employed")
    source = TrainingSet(table=without_string_views(people.to_arrow()), manifest={}, hash="")
    return prepare(LearningConfig(name="census", training_set="", label="employed"), source)


def fit(network: torch.nn.Module, dataset: Dataset, parameters: Any, *, seed: int) -> torch.nn.Module:
    """Train a network of a binary task, and return the state with the smallest validation loss."""
    inputs = torch.tensor(dataset.matrix)
    target = torch.tensor(dataset.target.astype(np.float32))
    fit_rows = np.flatnonzero(dataset.fit)
    validation = torch.from_numpy(np.flatnonzero(dataset.validation))
    batch = rows_per_step(dataset, parameters)
    steps = len(fit_rows) // batch
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=parameters.learning_rate, weight_decay=parameters.weight_decay
    )
    best, smallest = copy.deepcopy(network.state_dict()), float("inf")
    for epoch in range(parameters.epochs):
        network.train()
        order = np.random.default_rng([seed, epoch]).permutation(fit_rows)
        for step in range(steps):
            rate = learning_rate(
                parameters.learning_rate, (epoch * steps + step) / (parameters.epochs * steps)
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = torch.from_numpy(order[step * batch : (step + 1) * batch])
            step_loss = loss(network(inputs[rows]), target[rows], dataset.signature.task)
            optimizer.zero_grad()
            step_loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        network.eval()
        with torch.no_grad():
            current = float(loss(network(inputs[validation]), target[validation], dataset.signature.task))
        if current < smallest:
            best, smallest = copy.deepcopy(network.state_dict()), current
    network.load_state_dict(best)
    return network


def auc_of_trees(dataset: Dataset, *, seed: int) -> float:
    """Return LightGBM's AUC on the held-out rows."""
    fitted = fit_trees._function(dataset, TreeParameters(), seed, None)
    booster = lightgbm_package.Booster(model_str=fitted.text)
    return _auc(booster.predict(dataset.matrix[dataset.held_out]), dataset.target[dataset.held_out])


def auc_of_network(network: torch.nn.Module, dataset: Dataset) -> float:
    """Return a network's AUC on the held-out rows."""
    with torch.no_grad():
        parts = torch.tensor(dataset.matrix[dataset.held_out]).split(4096)
        scores = torch.cat([network.eval()(part) for part in parts]).squeeze(1).numpy()
    return _auc(scores, dataset.target[dataset.held_out])


def auc(family: str, dataset: Dataset, changes: dict[str, Any], *, seed: int) -> float:
    """Train one family with its default parameters, and return its AUC on the held-out rows."""
    torch.manual_seed(seed)
    match family:
        case "lightgbm":
            return auc_of_trees(dataset, seed=seed)
        case "tabular_network":
            shaped = replace(NetworkParameters(), **changes)
            network: torch.nn.Module = TabularNetwork(network_shape(dataset, shaped))
            return auc_of_network(fit(network, dataset, shaped, seed=seed), dataset)
        case _:
            parameters = replace(ft_transformer.Parameters(), **changes)
            network = ft_transformer.build(row_signature(dataset.signature, dataset), parameters)
            return auc_of_network(fit(network, dataset, parameters, seed=seed), dataset)


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
    dataset = census()
    print(f"{int(dataset.fit.sum())} people to fit on, {int(dataset.held_out.sum())} held out", flush=True)
    means: dict[str, float] = {}
    for family in ("lightgbm", *options.families):
        started = time.monotonic()
        aucs = [auc(family, dataset, changes, seed=seed) for seed in range(options.seeds)]
        means[family] = float(np.mean(aucs))
        print(
            f"{family:16} AUC {means[family]:.5f} ({', '.join(f'{value:.5f}' for value in aucs)}), "
            f"{means[family] - means['lightgbm']:+.5f} to LightGBM, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return int(min(means.values()) < means["lightgbm"] - LIMIT)


def _auc(scores: Any, target: Any) -> float:
    value = roc_auc(scores, target)
    assert value is not None, "the held-out people have both classes"
    return value


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


if __name__ == "__main__":
    sys.exit(main())
