"""Configuration of `jobs.train_text`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.settings import PlatformConfig
from jobs.train.config import CheckpointConfig, DeepSpeedConfig, check_common, check_remainder, check_run


@dataclass(kw_only=True, slots=True)
class TextSplitConfig:
    """Rule that selects the files to hold out of training."""

    modulo: int = 10
    """A file is held out if the hash of its content modulo this equals `remainder`."""
    remainder: int = 9

    def __post_init__(self) -> None:
        check_remainder(self.modulo, self.remainder)


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
        check_common(name=self.name, validation_share=self.validation_share, seed=self.seed)
        check_run(self.run)
        if self.evaluated_rows < 1:
            raise ValueError(f"evaluated_rows must be at least 1, got {self.evaluated_rows}.")
