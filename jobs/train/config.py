"""Configuration of `jobs.train`; a model family owns the dataclass of its own hyper-parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from cluster.runtime import Task
from cluster.settings import PlatformConfig

AUTO = "auto"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """Which rows are held out of training."""

    column: str | None = AUTO
    """Held out are rows where this column modulo `modulo` is `remainder`; a text counts by its hash (xxh32).

    None draws rows by the seed. `auto` takes the join key of the training set, so that all rows of one entity are on
    one side; without a join key, the only `*_id` column; without that, it draws rows by the seed.
    """
    modulo: int = 4
    remainder: int = 3

    def __post_init__(self) -> None:
        if self.modulo < 2:
            raise ValueError(f"split.modulo must be at least 2, got {self.modulo}.")
        if not 0 <= self.remainder < self.modulo:
            raise ValueError(f"split.remainder must be 0-{self.modulo - 1}, got {self.remainder}.")


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """How DeepSpeed spreads a model over the workers; used by the tabular network."""

    zero_stage: int = 1
    """0 replicates all; 1 shards the optimizer's state, 2 the gradients too, 3 the weights too."""
    torch_adam: bool = True
    """PyTorch's Adam; DeepSpeed's own is compiled at start."""

    def __post_init__(self) -> None:
        if not 0 <= self.zero_stage <= 3:
            raise ValueError(f"deepspeed.zero_stage must be 0-3, got {self.zero_stage}.")


@dataclass(kw_only=True, slots=True)
class LearningConfig(PlatformConfig):
    """What training and a sweep share: the data, and how a model is fitted to it."""

    name: str
    """Of the model."""
    training_set: str
    """Parquet file; its manifest is read when it lies beside it."""
    label: str
    """The column to predict."""
    task: Task = Task.binary
    model: dict[str, Any] = field(default_factory=dict)
    """`family`, `module` (a user's own family) and the family's hyper-parameters."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    inputs: list[str] | None = None
    """Columns to learn from; none takes all features of the manifest, or all columns that are no key and no time."""
    exclude: list[str] = field(default_factory=list)
    """Columns to leave out of the inputs."""
    validation_share: float = 0.1
    """Share of the training rows that early stopping and the choice of the epoch look at."""
    max_categories: int = 1000
    """A categorical input with more values is refused: it is likely to be an identifier."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '_' and '-', at most 64, got '{self.name}'.")
        if not 0.0 < self.validation_share < 0.9:
            raise ValueError(f"validation_share must lie between 0 and 0.9, got {self.validation_share}.")
        if self.max_categories < 2:
            raise ValueError(f"max_categories must be at least 2, got {self.max_categories}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie between 0 and 2^31 - 1, got {self.seed}.")


@dataclass(kw_only=True, slots=True)
class TrainConfig(LearningConfig):
    """One training run."""

    threshold: float = 0.5
    """A binary model answers the positive class from this probability on."""
    params_from: str | None = None
    """JSON file of a sweep, whose best parameters replace the configured ones."""
    label_permutation: bool = False
    """Train on shuffled labels: a version that is broken on purpose, to see it caught."""
    output: str | None = None
    """File that name, version and metrics are written to as JSON."""

    def __post_init__(self) -> None:
        # A slotted dataclass is made anew by its decorator, where zero-argument super() finds the old class.
        LearningConfig.__post_init__(self)
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}.")
