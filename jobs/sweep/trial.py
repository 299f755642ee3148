"""One trial, in a process of its own on any node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster.security.encryption.scratch import memory_folder, scratch_directory
from jobs.sweep.search import NUMBER, PARAMETERS
from jobs.train.families import FitContext, resolve_family
from jobs.train.trial import fit_trial
from jobs.train.trial_error import without_values

FIXED = "fixed"
"""Key of `TrialSettings` in a trial's configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSettings:
    """What all trials of a sweep share."""

    data: Any
    """Reference to the `TrainingData`."""
    model: dict[str, Any]
    """Family and hyper-parameters that are not searched."""
    num_workers: int
    context: FitContext
    scratch: str
    """Folder for the files of a family with `fit`, if memory has no room."""


def run_trial(config: dict[str, Any]) -> None:
    """Fit a model, and report its validation losses to Tune. Tune calls this in the trial's process.

    Raises:
        RefusedError: An input is refused.
        TrainingFailed: The fit diverged, or its code raised an error. Tune stores this error without encryption.
    """
    try:
        _run(config)
    except Exception as error:  # noqa: BLE001 - any error of a family's code
        raise without_values(error) from None


def _run(config: dict[str, Any]) -> None:
    settings: TrialSettings = config[FIXED]
    family = resolve_family(settings.model | config[PARAMETERS])
    with scratch_directory(memory_folder(otherwise=Path(settings.scratch))) as folder:
        context = replace(
            settings.context,
            folder=folder,
            run_name=f"trial-{config[NUMBER]}-{tune.get_context().get_trial_id()}",
        )
        fit_trial(
            ray.get(settings.data),
            family,
            context,
            num_workers=settings.num_workers,
            report=tune.report,
            worker_callbacks=[TuneReportCallback()] if settings.num_workers else [],  # type: ignore[no-untyped-call]
        )
