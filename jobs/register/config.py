"""Configuration of `jobs.register`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.runtime import Precision, Task
from cluster.settings import PlatformConfig
from jobs.train.config import MODEL_NAME


@dataclass(kw_only=True, slots=True)
class RegisterConfig(PlatformConfig):
    """Configuration of one registration."""

    name: str
    """Model name."""
    artifact: str
    """ONNX file, for example a default export of skl2onnx."""
    reference: str
    """Parquet file with rows like those that the model was fitted on: its inputs and the label."""
    label: str
    """Column of the reference with the true values."""
    task: Task = Task.binary
    """Kind of prediction: `binary`, `multiclass` or `regression`."""
    inputs: list[str] | None = None
    """For a graph with one matrix: the columns in the matrix's order. None means all features of the manifest or,
    without a manifest, all columns except label, keys and times."""
    columns: dict[str, str] = field(default_factory=dict)
    """For a graph with one input per column: maps the graph's inputs to columns, where the names differ."""
    scores: str | None = None
    """Output with probabilities or values. Only needed if the graph has several outputs of numbers."""
    expected: str | None = None
    """Column of the reference with the original model's scores: probabilities of the second class, or values. Scores of
    the registered model that differ are refused. This finds faults of the export, too."""
    precision: Precision = Precision.float32
    """int8 quantises the graph."""
    threshold: float = 0.5
    """A binary model predicts the positive class if the probability of that class is at least this."""
    max_categories: int = 1000
    """A text column with more values than this is refused, because it is probably an identifier."""
    max_difference: float = 1e-4
    """Largest difference between the scores of the artifact and of the registered graph: of a probability, or as a
    share of the range of the scores of a regression. For int8 it is 0.1."""

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '_' and '-', at most 64, got '{self.name}'.")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}.")
        if self.max_difference <= 0:
            raise ValueError(f"max_difference must be positive, got {self.max_difference}.")
        if self.inputs is not None and self.columns:
            raise ValueError(
                "`inputs` is for a graph with one matrix, `columns` for one with an input per column."
            )
