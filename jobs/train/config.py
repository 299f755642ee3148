"""Configuration of `jobs.train`. Each model family has its own dataclass of hyper-parameters."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cluster.runtime import Task
from cluster.settings import PlatformConfig

AUTO = "auto"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def parse_time(text: str, *, name: str) -> datetime:
    """Return an ISO 8601 time. Without an offset, it is UTC.

    Raises:
        ValueError: The text is not such a time. The message begins with `name`.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{name} must be an ISO 8601 time, got '{text}'.") from error
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def check_remainder(modulo: int, remainder: int) -> None:
    """Check the rule that holds rows or files out of training."""
    if modulo < 2:
        raise ValueError(f"split.modulo must be at least 2, got {modulo}.")
    if not 0 <= remainder < modulo:
        raise ValueError(f"split.remainder must be 0-{modulo - 1}, got {remainder}.")


def check_common(*, name: str, validation_share: float, seed: int) -> None:
    """Check the options that each configuration of a training has."""
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(f"name must be letters, digits, '_' and '-', at most 64, got '{name}'.")
    if not 0.0 < validation_share < 0.9:
        raise ValueError(f"validation_share must be between 0 and 0.9, got {validation_share}.")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be between 0 and 2^31 - 1, got {seed}.")


def check_run(run: str | None) -> None:
    """Check the id of a run. None is valid."""
    if run is not None and not RUN_ID.fullmatch(run):
        raise ValueError(f"run must be letters, digits, '.', '_' and '-', at most 64, got '{run}'.")


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
    seed: int | None = None
    """If set, the column's values are hashed with this seed first. Another seed holds out other entities."""
    from_time: str | None = None
    """ISO 8601 time. If set, the rows with an `event_timestamp` from this time on are held out, whatever the column."""

    def __post_init__(self) -> None:
        if self.from_time is not None:
            parse_time(self.from_time, name="split.from_time")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ValueError(f"split.seed must be between 0 and 2^31 - 1, got {self.seed}.")
        check_remainder(self.modulo, self.remainder)


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """DeepSpeed settings of networks."""

    zero_stage: int = 1
    """ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the weights."""
    torch_adam: bool = True
    """Whether to use PyTorch's Adam. False uses DeepSpeed's own Adam, which is compiled at start."""
    offload: bool = False
    """Whether the optimizer's state is in the memory of the CPU. It needs ZeRO stage 1, 2 or 3."""
    gradient_accumulation: int = 1
    """Backward passes of each worker in a step. More passes need less memory; the batch of a step stays the same."""
    gradient_clipping: float = 1.0
    """Largest norm of the gradient; 0 does not limit it."""
    warmup_share: float = 0.1
    """Share of all steps in which the learning rate rises."""
    activation_checkpointing: bool = False
    """Whether activations are computed again in the backward pass, instead of being kept in memory."""

    def __post_init__(self) -> None:
        if not 0 <= self.zero_stage <= 3:
            raise ValueError(f"deepspeed.zero_stage must be 0-3, got {self.zero_stage}.")
        if self.offload and not self.zero_stage:
            raise ValueError("deepspeed.offload=true needs deepspeed.zero_stage 1, 2 or 3, got 0.")
        if self.gradient_accumulation < 1:
            raise ValueError(
                f"deepspeed.gradient_accumulation must be at least 1, got {self.gradient_accumulation}."
            )
        if not 0 <= self.gradient_clipping < math.inf:
            raise ValueError(
                f"deepspeed.gradient_clipping must be finite and not negative, got {self.gradient_clipping}."
            )
        if not 0 <= self.warmup_share < 1:
            raise ValueError(
                f"deepspeed.warmup_share must be 0 or more and below 1, got {self.warmup_share}."
            )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When a run saves its state, and what it keeps."""

    every_steps: int | None = None
    """Steps between two checkpoints within an epoch. The end of each epoch always has a checkpoint."""
    every_s: float | None = 300.0
    """Seconds between two checkpoints within an epoch; None means never by time."""
    keep: int = 2
    """Number of checkpoints that are kept. The best weights are always kept."""
    log_every: int = 10
    """Steps between two entries of the run's metrics."""
    stall_after: float = 120.0
    """Seconds without an answer after which a worker is replaced, for example because its process was stopped."""
    watch_s: float = 5.0
    """Seconds between two questions to Ray: whether a node will end, and whether there is room for more workers."""

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"checkpoint.every_steps must be at least 1, got {self.every_steps}.")
        if self.every_s is not None and not 0 < self.every_s < math.inf:
            raise ValueError(f"checkpoint.every_s must be positive, got {self.every_s}.")
        for name in ("keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.watch_s < math.inf:
            raise ValueError(f"checkpoint.watch_s must be positive, got {self.watch_s}.")
        if not 5 <= self.stall_after < math.inf:
            raise ValueError(f"checkpoint.stall_after must be at least 5, got {self.stall_after}.")


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
    outcome_window_days: float | None = None
    """Days after a row's `event_timestamp` until its label is final. Younger rows are not used: their outcome may still
    change. None means that all labels are final."""
    outcomes_until: str | None = None
    """ISO 8601 time up to which outcomes are known. None means the time at which the training set was built."""
    seed: int = 0
    """Seed of all random draws, 0 to 2^31 - 1."""

    def __post_init__(self) -> None:
        if self.outcome_window_days is not None and not 0 < self.outcome_window_days < math.inf:
            raise ValueError(f"outcome_window_days must be positive, got {self.outcome_window_days}.")
        if self.outcomes_until is not None:
            parse_time(self.outcomes_until, name="outcomes_until")
        check_common(name=self.name, validation_share=self.validation_share, seed=self.seed)
        if self.max_categories < 2:
            raise ValueError(f"max_categories must be at least 2, got {self.max_categories}.")


class TrainAction(enum.Enum):
    """What `jobs.train` does."""

    train = "train"
    compare = "compare"


@dataclass(kw_only=True, slots=True)
class TrainConfig(LearningConfig):
    """Configuration of one training run, or of a comparison of two."""

    action: TrainAction = TrainAction.train
    """`train`, or `compare` for two runs."""
    runs: list[str] = field(default_factory=list)
    """The two runs to compare."""
    name: str = ""
    """Model name."""
    training_set: str = ""
    """Parquet file. If the manifest of this training set is in the same folder, the job reads it too."""
    label: str = ""
    """Column to predict."""
    threshold: float = 0.5
    """A binary model predicts the positive class if the probability of that class is at least this."""
    params_from: str | None = None
    """Output file (JSON) of a sweep. The sweep's best parameters replace the configured parameters."""
    label_permutation: bool = False
    """Whether to train on shuffled labels. This makes a broken version, to test that a rollout detects it."""
    output: str | None = None
    """File to write name, version and metrics to, as JSON. With `action=compare`, file for the plot, as SVG."""
    run: str | None = None
    """Id of the run. The same id continues a run that did not finish. None makes a new id."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_run(self.run)
        if self.action is TrainAction.compare:
            if len(self.runs) != 2:
                raise ValueError(f"action=compare needs two runs, such as runs=[a,b], got {len(self.runs)}.")
            return
        for name in ("name", "training_set", "label"):
            if not getattr(self, name):
                raise ValueError(f"`{name}=…` is missing.")
        # `slots=True` replaces the class, so zero-argument super() would refer to the original class and fail.
        LearningConfig.__post_init__(self)
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}.")
