"""The rows of a training set in their relation to a version: held out, for validation, or unknown to the version.

A version's lineage has the training set, the label and the split, so commands about a version need none of them.
"""

from __future__ import annotations

import numpy as np

from cluster.errors import TrainingSetError
from cluster.registry import ModelVersion
from jobs.train.config import SplitConfig
from jobs.train.data import TrainingSet
from jobs.train.split import Mask, version_held_out_mask

ALL_ROWS = "all"
"""Value of `rows` in the lineage of a registered artifact: its reference rows have no split."""


def recorded_training_set(version: ModelVersion) -> str:
    """Return the path of the training set (or of the reference rows) that a version's lineage has.

    Raises:
        TrainingSetError: The lineage has no path.
    """
    path = version.lineage.config.get("training_set")
    if not isinstance(path, str) or version.origin:
        reason = "it was imported from another installation" if version.origin else "its lineage has no path"
        raise TrainingSetError(
            f"The training set of version {version.version} of '{version.name}' is not known here: {reason}. Name a "
            "file with its inputs and its label."
        )
    return path


def require_same_rows(version: ModelVersion, source: TrainingSet, *, path: str, option: str) -> None:
    """Require that a file still has the rows that a version was trained on.

    Args:
        version: The version.
        source: The file's content.
        path: Path of the file.
        option: Option that names another file, for the error message.

    Raises:
        TrainingSetError: The rows are others.
    """
    expected = version.lineage.training_set_hash
    if expected and source.hash != expected:
        raise TrainingSetError(
            f"{path} is not the training set of version {version.version} of '{version.name}' any more: its hash is "
            f"{source.hash[:16]}, not {expected[:16]}. Build it again from its manifest, or name a file with "
            f"`{option}=…`."
        )


def held_out_rows(
    version: ModelVersion, source: TrainingSet, *, override: SplitConfig | None = None, advice: str
) -> Mask:
    """Return the mask of the rows that a version was not fitted on. All reference rows of a registered artifact count.

    Args:
        version, source, override, advice: See `jobs.train.split.version_held_out_mask`.

    Raises:
        TrainingSetError: See `jobs.train.split.version_held_out_mask`.
    """
    if override is None and has_no_split(version):
        return np.ones(source.table.num_rows, np.bool_)
    return version_held_out_mask(version, source, override=override, advice=advice)


def validation_rows(version: ModelVersion, source: TrainingSet) -> Mask:
    """Return the mask of the rows on which a version's training stopped early.

    Raises:
        TrainingSetError: The version has no such rows, or the data set is not its training set.
    """
    share = version.lineage.config.get("validation_share")
    if has_no_split(version) or share is None or version.lineage.training_set_hash != source.hash:
        raise TrainingSetError(
            f"Version {version.version} of '{version.name}' has no validation rows in this data set. Name its training "
            "set; a registered artifact has none."
        )
    held_out = version_held_out_mask(version, source, advice="Name the training set.")
    return validation_mask(held_out, share=share, seed=version.lineage.seed)


def validation_mask(held_out: Mask, *, share: float, seed: int) -> Mask:
    """Return the mask of the rows that `jobs.train.data` draws for early stopping from those that are not held out."""
    rest = np.flatnonzero(~held_out)
    order = np.random.default_rng(seed).permutation(rest)
    validation = np.zeros(len(held_out), np.bool_)
    validation[order[: max(1, int(len(rest) * share))]] = True
    return validation


def has_no_split(version: ModelVersion) -> bool:
    """Return whether a version was registered as an artifact, so that its training is not known."""
    return bool(version.lineage.config.get("rows") == ALL_ROWS)
