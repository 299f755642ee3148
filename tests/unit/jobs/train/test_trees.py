"""Trees without Ray: filled by row groups, and fitted in segments that a broken run continues."""

from __future__ import annotations

from pathlib import Path

import lightgbm
import numpy as np
import pytest

from cluster.security.keys.access import KeyAccess
from jobs.train.config import LearningConfig
from jobs.train.data import TrainingSet, load_dataset
from jobs.train.lightgbm import Fitted, Parameters, _settings, fit_trees
from jobs.train.rows.file import RowFile
from jobs.train.run.files import RunFiles, run_files
from jobs.train.training_data import TrainingData, prepare_rows
from tests.processes.training import checkpoint_bytes

PARAMETERS = Parameters(rounds=40, patience=40, segment_rounds=10, num_threads=1, num_leaves=7)


@pytest.fixture
def data(row_file: RowFile) -> TrainingData:
    config = LearningConfig(name="m", training_set="t", label="y")
    return prepare_rows(config, TrainingSet(table=row_file, manifest={}, hash="h"))


class Broken(Exception):
    """The process ends here."""


def fit(
    data: TrainingData, parameters: Parameters, files: RunFiles | None, *, broken_at: int | None = None
) -> Fitted:
    def on_round(completed: int, losses: dict[str, float]) -> None:
        rounds.append(completed)
        if completed == broken_at:
            raise Broken

    rounds: list[int] = []
    fitted = fit_trees(data.rows, parameters, 3, files=files, on_round=on_round)
    assert broken_at is None
    return fitted


def trees(text: str) -> str:
    """Return the trees of a model's text, without its parameters."""
    return text[text.index("Tree=0") : text.index("end of trees")]


def test_row_groups_give_the_trees_of_one_matrix(data: TrainingData) -> None:
    """One segment that early stopping ends is what LightGBM fits to a matrix in memory."""
    parameters = Parameters(rounds=80, patience=5, num_threads=1)
    dataset = load_dataset(data.rows)
    train = lightgbm.Dataset(
        dataset.matrix[dataset.fit],
        dataset.target[dataset.fit],
        categorical_feature=dataset.signature.categorical,
    )
    booster = lightgbm.train(
        _settings(dataset.signature, parameters, 3),
        train,
        num_boost_round=parameters.rounds,
        valid_sets=[
            train.create_valid(dataset.matrix[dataset.validation], dataset.target[dataset.validation])
        ],
        callbacks=[lightgbm.early_stopping(parameters.patience, verbose=False)],
    )
    expected = booster.model_to_string(num_iteration=booster.best_iteration)
    fitted = fit(data, parameters, None)
    assert fitted.best_round == booster.best_iteration < 80
    assert trees(fitted.text) == trees(expected)


def test_a_broken_run_gives_the_trees_of_an_unbroken_one(
    data: TrainingData, tmp_path: Path, access: KeyAccess
) -> None:
    """It breaks within the second and the third segment, and continues after the last complete one."""

    def files(run: str) -> RunFiles:
        return run_files(str(tmp_path), model="m", run=run, access=access)

    unbroken = fit(data, PARAMETERS, files("a"))
    for broken_at in (15, 27):
        with pytest.raises(Broken):
            fit(data, PARAMETERS, files("b"), broken_at=broken_at)
    assert files("b").names("checkpoints") == ["segment-000000", "segment-000001"]
    assert fit(data, PARAMETERS, files("b")) == unbroken
    assert fit(data, PARAMETERS, None) == unbroken
    matrix = load_dataset(data.rows).matrix
    scores = lightgbm.Booster(model_str=unbroken.text).predict(matrix)
    assert ((scores > 0.5) == data.target).mean() > 0.8
    content = checkpoint_bytes(tmp_path / "training_runs")
    assert b"Tree=" not in content
    assert np.isfinite(scores).all()
