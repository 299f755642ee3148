"""Configuration of `jobs.train`. Each model family has its own dataclass of hyper-parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from cluster.runtime import Task
from cluster.settings import PlatformConfig

AUTO = "auto"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """Rule that selects the rows to hold out of training."""

    column: str | None = AUTO
    """Column to split by. A row is held out if the column's value modulo `modulo` equals `remainder`.

    Text values are hashed first (xxh32). None draws rows at random with the seed. `auto` uses the join key of the
    training set, so an entity's rows are all held out or all trained on. Without a join key, `auto` uses the only
    `*_id` column. Without such a column, it draws rows with the seed.
    """
    modulo: int = 4
    """Divisor; the share of held-out rows is about 1 / modulo."""
    remainder: int = 3
    """Remainder of the held-out rows."""

    def __post_init__(self) -> None:
        if self.modulo < 2:
            raise ValueError(f"split.modulo must be at least 2, got {self.modulo}.")
        if not 0 <= self.remainder < self.modulo:
            raise ValueError(f"split.remainder must be 0-{self.modulo - 1}, got {self.remainder}.")


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """DeepSpeed settings of the tabular network."""

    zero_stage: int = 1
    """ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the weights."""
    torch_adam: bool = True
    """Whether to use PyTorch's Adam. False uses DeepSpeed's own Adam, which is compiled at start."""

    def __post_init__(self) -> None:
        if not 0 <= self.zero_stage <= 3:
            raise ValueError(f"deepspeed.zero_stage must be 0-3, got {self.zero_stage}.")


@dataclass(kw_only=True, slots=True)
class LearningConfig(PlatformConfig):
    """Configuration that training and sweeps share: the data, and how to fit a model to the data."""

    name: str
    """Model name."""
    training_set: str
    """Parquet file. If the manifest of this training set is in the same folder, the job reads it too."""
    label: str
    """Column to predict."""
    task: Task = Task.binary
    """Kind of prediction: `binary`, `multiclass` or `regression`."""
    model: dict[str, Any] = field(default_factory=dict)
    """`family`, `module` (for a user's own family) and the hyper-parameters of the family."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    inputs: list[str] | None = None
    """Input columns. None means all features of the manifest or, without a manifest, all columns except label, keys and
    times."""
    exclude: list[str] = field(default_factory=list)
    """Columns to remove from the inputs."""
    validation_share: float = 0.1
    """Share of the training rows used for early stopping and to choose the best epoch."""
    max_categories: int = 1000
    """A categorical input with more values than this is refused, because it is probably an identifier."""
    seed: int = 0
    """Seed of all random draws, 0 to 2^31 - 1."""

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '_' and '-', at most 64, got '{self.name}'.")
        if not 0.0 < self.validation_share < 0.9:
            raise ValueError(f"validation_share must be between 0 and 0.9, got {self.validation_share}.")
        if self.max_categories < 2:
            raise ValueError(f"max_categories must be at least 2, got {self.max_categories}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be between 0 and 2^31 - 1, got {self.seed}.")


@dataclass(kw_only=True, slots=True)
class TrainConfig(LearningConfig):
    """Configuration of one training run."""

    threshold: float = 0.5
    """A binary model predicts the positive class if the probability of that class is at least this."""
    params_from: str | None = None
    """Output file (JSON) of a sweep. The sweep's best parameters replace the configured parameters."""
    label_permutation: bool = False
    """Whether to train on shuffled labels. This makes a broken version, to test that a rollout detects it."""
    output: str | None = None
    """File to write name, version and metrics to, as JSON."""

    def __post_init__(self) -> None:
        # `slots=True` replaces the class, so zero-argument super() would refer to the original class and fail.
        LearningConfig.__post_init__(self)
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}.")
