"""What a model version takes and gives, as plain data that is stored beside it in `model.json`.

The signature is all that serving needs to turn named columns into the model's matrix and scores into answers, so
neither the training set nor the code that trained the model is needed at prediction time.
"""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import RefusedError

Label = str | int | float | bool

SIGNATURE_FILE = "model.json"
LIGHTGBM_FILE = "model.txt"
ONNX_FILE = "model.onnx"
WEIGHTS_FILE = "model.safetensors"
NETWORK_FILE = "network.json"
"""What the tabular network is built from beside its weights."""
ONNX_INPUT = "inputs"
ONNX_OUTPUT = "scores"

NUMERIC = frozenset(
    {
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float", "double", "halffloat", "float16", "float32", "float64", "bool",
    }
)  # fmt: skip
"""Arrow type names that a model can take as numbers."""


class Task(enum.Enum):
    """What a model predicts."""

    binary = "binary"
    multiclass = "multiclass"
    regression = "regression"


class Precision(enum.Enum):
    """The numbers that a network's layers multiply."""

    float32 = "float32"
    int8 = "int8"
    """Weights are stored as int8, and what they are multiplied with becomes uint8 as it comes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """One input column, `<view>__<feature>`."""

    name: str
    dtype: str
    """Arrow type name of the values that are given."""
    categories: tuple[Label, ...] | None = None
    """The known values of a categorical input, in code order; none for a number."""
    length: int | None = None
    """Of a list of numbers: how many, each a column of the model's matrix; `dtype` is that of one."""

    def __post_init__(self) -> None:
        if self.length is not None and (self.length < 1 or self.categories is not None):
            raise ValueError(f"Input '{self.name}' is a list of {self.length} numbers with categories.")
        if self.categories is None and self.dtype not in NUMERIC:
            raise ValueError(
                f"Input '{self.name}' has type {self.dtype}, which a model cannot take as a number: "
                "declare it categorical, exclude it, or make a number of it in a transform."
            )

    @property
    def width(self) -> int:
        """Columns of the model's matrix."""
        return 1 if self.length is None else self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSignature:
    """A model version's inputs, its task and what its scores mean."""

    task: Task
    inputs: tuple[InputSpec, ...]
    """In the order of the model's matrix."""
    label: str
    classes: tuple[Label, ...] | None = None
    """In score order, the positive class second for a binary task; none for a regression."""
    service: str = ""
    """Feature service that gives the inputs; empty when the training set had no manifest."""
    service_version: str = ""
    threshold: float = 0.5
    """A binary model answers the positive class from this probability on."""
    precision: Precision = Precision.float32
    """Versions of before do not say."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("A model needs at least one input.")
        if (self.classes is None) != (self.task is Task.regression):
            raise ValueError(f"A {self.task.value} signature has classes {self.classes}.")
        if self.task is Task.binary and len(self.classes or ()) != 2:
            raise ValueError(f"A binary signature needs two classes, got {self.classes}.")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}.")

    @property
    def columns(self) -> list[str]:
        """The input names in order."""
        return [spec.name for spec in self.inputs]

    @property
    def matrix_columns(self) -> list[InputSpec]:
        """The input of each column of the model's matrix; a list has several."""
        return [spec for spec in self.inputs for _ in range(spec.width)]

    @property
    def matrix_names(self) -> list[str]:
        """The name of each column of the model's matrix, such as `emb[2]` for an element of a list."""
        return [
            spec.name if spec.length is None else f"{spec.name}[{element}]"
            for spec in self.inputs
            for element in range(spec.width)
        ]

    @property
    def width(self) -> int:
        """Columns of the model's matrix."""
        return sum(spec.width for spec in self.inputs)

    @property
    def categorical(self) -> list[int]:
        """Positions of the categorical inputs in the matrix."""
        return [i for i, spec in enumerate(self.matrix_columns) if spec.categories is not None]

    @property
    def num_scores(self) -> int:
        """Scores a row: one for binary and regression, one a class for multiclass."""
        return len(self.classes or ()) if self.task is Task.multiclass else 1

    def to_json(self) -> str:
        """The content of `model.json`."""
        named = {"task": self.task.value, "precision": self.precision.value}
        return json.dumps(asdict(self) | named, indent=1, ensure_ascii=False)


def parse_signature(text: str | bytes) -> ModelSignature:
    """Read `model.json`.

    Raises:
        RefusedError: it is no signature.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        inputs = tuple(
            InputSpec(
                name=one["name"],
                dtype=one["dtype"],
                categories=_tuple(one["categories"]),
                length=one.get("length"),
            )
            for one in fields.pop("inputs")
        )
        task = Task(fields.pop("task"))
        classes = _tuple(fields.pop("classes"))
        precision = Precision(fields.pop("precision", Precision.float32.value))
        return ModelSignature(task=task, inputs=inputs, classes=classes, precision=precision, **fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(
            f"{SIGNATURE_FILE} is no model signature: {error}. Train the version again."
        ) from error


def _tuple(values: list[Label] | None) -> tuple[Label, ...] | None:
    return None if values is None else tuple(values)
