"""Fit trees in segments of a fixed number of rounds. A run continues after its last complete segment.

Every segment starts from the raw scores of the segments before, with random generators that (seed, segment) has seeded.
That is so also if nothing breaks. So a continued run gives the trees of an unbroken one. LightGBM's own way to continue
a model gives other trees, because it does not restore its random generators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import lightgbm
import numpy as np
from lightgbm.basic import _LIB, _safe_call
from lightgbm.callback import CallbackEnv, EarlyStopException

from cluster.errors import ArtifactTampered, TrainingFailed
from jobs.train.progress import divergence_message
from jobs.train.rows.encoded import EncodedRows, Part
from jobs.train.run.files import RunFiles
from jobs.train.trees.rows import Values, add_raw_scores

VALIDATION = "validation"
OnRound = Callable[[int, dict[str, float]], None]
"""Called with the number of a round, from 1, and its losses."""


@dataclass(kw_only=True, slots=True)
class Segment:
    """The trees of one segment, and the state of early stopping after it."""

    text: str = ""
    """Trees in LightGBM's text format."""
    rounds: int = 0
    """Rounds of this and all earlier segments."""
    best_round: int = 0
    best_loss: float = math.inf
    loss_name: str = ""
    is_last: bool = False
    """Whether early stopping or the largest number of rounds ended the fit."""
    losses: list[dict[str, float]] = field(default_factory=list)
    """Losses of each round of this segment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentPlan:
    """How many rounds a fit has."""

    rounds: int
    segment_rounds: int
    patience: int
    seed: int

    def settings(self, segment: int) -> dict[str, int]:
        """Return the seeds of a segment. The first segment has LightGBM's own, which follow from `seed`."""
        if segment == 0:
            return {}
        draw = np.random.default_rng([self.seed, segment])
        names = ("bagging_seed", "feature_fraction_seed", "extra_seed", "objective_seed")
        return {name: int(draw.integers(2**31 - 1)) for name in names}


class SegmentedFit:
    """Fits segment after segment.

    Args:
        rows: All rows, to compute the raw scores of a segment.
        train: Data set of the rows to fit on.
        validation: Data set of the validation rows.
        settings: LightGBM's settings.
        plan: Number of rounds.
        files: Files of the run. None keeps no checkpoints.
    """

    def __init__(
        self,
        rows: EncodedRows,
        train: lightgbm.Dataset,
        validation: lightgbm.Dataset,
        *,
        settings: dict[str, Any],
        plan: SegmentPlan,
        files: RunFiles | None,
    ) -> None:
        self._rows, self._plan, self._files, self._settings = rows, plan, files, settings
        self._data = {Part.fit: train, Part.validation: validation}

    def run(self, on_round: OnRound) -> list[Segment]:
        """Fit all segments that are missing, and return all.

        Raises:
            TrainingFailed: A loss is NaN or infinite, or LightGBM refuses the parameters or rows.
        """
        segments = read_segments(self._files)
        for segment in segments:
            self._add_scores(segment)
        while not segments or not segments[-1].is_last:
            segment = self._fit(len(segments), segments[-1] if segments else Segment(), on_round)
            if self._files is not None:
                write_segment(self._files, len(segments), segment)
            segments.append(segment)
            if not segment.is_last:
                self._add_scores(segment)
        return segments

    def _fit(self, number: int, before: Segment, on_round: OnRound) -> Segment:
        """Fit one segment."""
        plan = self._plan
        state = Segment(
            rounds=before.rounds,
            best_round=before.best_round,
            best_loss=before.best_loss,
            loss_name=before.loss_name,
        )

        def after_round(env: CallbackEnv) -> None:
            _update(state, env, on_round)
            if state.rounds - state.best_round >= plan.patience:
                state.is_last = True
                raise EarlyStopException(env.iteration, env.evaluation_result_list or [])

        try:
            booster = lightgbm.train(
                self._settings | plan.settings(number),
                self._data[Part.fit],
                num_boost_round=min(plan.segment_rounds, plan.rounds - before.rounds),
                valid_sets=[self._data[Part.validation]],
                valid_names=[VALIDATION],
                callbacks=[after_round],
                keep_training_booster=True,
            )
        except lightgbm.basic.LightGBMError as error:
            message = str(error).partition(" at /")[0]  # the rest is a line number in LightGBM's own source
            raise TrainingFailed(f"LightGBM refuses these parameters or rows: {message}.") from error
        state.text = booster.model_to_string(num_iteration=-1)
        state.is_last |= state.rounds >= plan.rounds
        return state

    def _add_scores(self, segment: Segment) -> None:
        """Add the raw scores of a segment to those from which the next segment starts."""
        scores = {part: self._start_scores(part) for part in self._data}
        add_raw_scores(lightgbm.Booster(model_str=segment.text), self._rows, scores)
        for part, values in scores.items():
            # `set_init_score` would also keep a copy for Python.
            self._data[part].set_field("init_score", values)

    def _start_scores(self, part: Part) -> Values:
        """Return the raw scores from which the last segment started, float64 [rows] or [rows, classes]."""
        dataset, num_scores = self._data[part], self._rows.signature.num_scores
        scores = dataset.get_field("init_score")
        if scores is None:
            return np.zeros((dataset.num_data(), num_scores) if num_scores > 1 else dataset.num_data())
        return np.asarray(scores)


def _update(state: Segment, env: CallbackEnv, on_round: OnRound) -> None:
    """Add the losses of a round."""
    losses = {f"{data} {name}": float(loss) for data, name, loss, *_ in env.evaluation_result_list or ()}
    state.rounds += 1
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingFailed(divergence_message(f"{name} loss", loss, f"round {state.rounds}"))
    ((name, loss),) = losses.items()
    if loss < state.best_loss:
        state.best_round, state.best_loss, state.loss_name = state.rounds, loss, name
    state.losses.append(losses)
    on_round(state.rounds, losses)


def merge_segments(segments: list[Segment]) -> str:
    """Return the trees up to the best round in LightGBM's text format."""
    merged = lightgbm.Booster(model_str=segments[-1].text)
    for segment in reversed(segments[:-1]):
        # This puts the trees of the other model before those of this one.
        earlier = lightgbm.Booster(model_str=segment.text)
        _safe_call(_LIB.LGBM_BoosterMerge(merged._handle, earlier._handle))
    return str(merged.model_to_string(num_iteration=segments[-1].best_round))


def read_segments(files: RunFiles | None) -> list[Segment]:
    """Return the complete segments of a run, in order, up to the first one that is missing or altered."""
    segments: list[Segment] = []
    while files is not None:
        try:
            content = json.loads(files.read(_path(len(segments))))
        except (FileNotFoundError, ArtifactTampered):
            break
        segments.append(Segment(**content))
    return segments


def write_segment(files: RunFiles, number: int, segment: Segment) -> None:
    """Write a segment, and its losses as metrics of the run."""
    metrics = [
        {
            "epoch": 0,
            "step": segment.rounds - len(segment.losses) + index,
            "values": values,
            "rows_per_s": 0.0,
        }
        for index, values in enumerate(segment.losses, start=1)
    ]
    files.write(f"metrics/000000-{segment.rounds:09}", json.dumps(metrics).encode())
    files.write(_path(number), json.dumps(asdict(segment)).encode())


def _path(number: int) -> str:
    return f"checkpoints/segment-{number:06}"
