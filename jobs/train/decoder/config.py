"""Configuration of `jobs.train_text`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.settings import PlatformConfig
from jobs.train.config import MODEL_NAME, RUN_ID, CheckpointConfig, DeepSpeedConfig


@dataclass(kw_only=True, slots=True)
class TextSplitConfig:
    """Rule that selects the files to hold out of training."""

    modulo: int = 10
    """A file is held out if the hash of its content modulo this equals `remainder`."""
    remainder: int = 9

    def __post_init__(self) -> None:
        if self.modulo < 2:
            raise ValueError(f"split.modulo must be at least 2, got {self.modulo}.")
        if not 0 <= self.remainder < self.modulo:
            raise ValueError(f"split.remainder must be 0-{self.modulo - 1}, got {self.remainder}.")


@dataclass(kw_only=True, slots=True)
class TrainTextConfig(PlatformConfig):
    """Configuration of one training run on text files."""

    name: str
    """Model name."""
    text: str
    """Folder, file or pattern of the text files; a path, or a URI of fsspec. Hidden files are left out."""
    model: dict[str, Any] = field(default_factory=dict)
    """`family`, and its hyper-parameters."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    split: TextSplitConfig = field(default_factory=TextSplitConfig)
    validation_share: float = 0.05
    """Share of the training files used to choose the best epoch."""
    evaluated_rows: int = 2000
    """At most this many rows of the held-out files are evaluated, at equal distances."""
    seed: int = 0
    """Seed of all random draws, 0 to 2^31 - 1."""
    run: str | None = None
    """Id of the run. The same id continues a run that did not finish. None makes a new id."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: str | None = None
    """File to write name, version and metrics to, as JSON."""

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '_' and '-', at most 64, got '{self.name}'.")
        if self.run is not None and not RUN_ID.fullmatch(self.run):
            raise ValueError(f"run must be letters, digits, '.', '_' and '-', at most 64, got '{self.run}'.")
        if not 0.0 < self.validation_share < 0.9:
            raise ValueError(f"validation_share must be between 0 and 0.9, got {self.validation_share}.")
        if self.evaluated_rows < 1:
            raise ValueError(f"evaluated_rows must be at least 1, got {self.evaluated_rows}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be between 0 and 2^31 - 1, got {self.seed}.")
