"""The signature of a model version: its inputs and outputs, as plain data in `model.json`.

With the signature, serving can turn named columns into the model's matrix, and scores into answers. So predictions need
neither the training set nor the training code.
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
"""File with the shape of the tabular network. Shape and weights are enough to build the network."""
DECODER_FILE = "decoder.json"
"""File with the shape of a decoder. A decoder has no signature, because it takes text and no columns."""
LANGUAGE_MODEL = "language_model"
"""Task of a decoder's versions. It is no `Task`: what takes a table's rows does not take such a version."""
ONNX_INPUT = "inputs"
ONNX_OUTPUT = "scores"

NUMERIC = frozenset(
    {
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float", "double", "halffloat", "float16", "float32", "float64", "bool",
    }
)  # fmt: skip
"""Names of the Arrow types that a model can take as numbers."""


class Task(enum.Enum):
    """Kind of prediction."""

    binary = "binary"
    multiclass = "multiclass"
    regression = "regression"


class Precision(enum.Enum):
    """Number type in which a network's layers multiply."""

    float32 = "float32"
    int8 = "int8"
    """Weights are stored as int8; activations are converted to uint8 at run time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """One input column, `<view>__<feature>`."""

    name: str
    dtype: str
    """Name of the Arrow type of the values, or of the elements if the input is a list."""
    categories: tuple[Label, ...] | None = None
    """Known values of a categorical input, in the order of their codes. None for a number."""
    length: int | None = None
    """Length of a list of numbers; None for other inputs. Each element is a column of the model's matrix."""

    def __post_init__(self) -> None:
        if self.length is not None and (self.length < 1 or self.categories is not None):
            raise ValueError(
                f"Input '{self.name}' is a list of length {self.length}: it needs at least one element and no "
                "categories."
            )
        if self.categories is None and self.dtype not in NUMERIC:
            raise ValueError(
                f"Input '{self.name}' has type {self.dtype}, which a model cannot take as a number: "
                "declare it categorical, exclude it, or convert it to a number in a transform."
            )

    @property
    def width(self) -> int:
        """Number of columns of this input in the model's matrix."""
        return 1 if self.length is None else self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSignature:
    """Inputs, task and meaning of the scores of a model version."""

    task: Task
    inputs: tuple[InputSpec, ...]
    """Inputs in the order of the model's matrix."""
    label: str
    classes: tuple[Label, ...] | None = None
    """Classes in the order of the scores. A binary task's second class is the positive class. None for regression."""
    service: str = ""
    """Feature service that provides the inputs; empty if the training set had no manifest."""
    service_version: str = ""
    threshold: float = 0.5
    """Lowest probability for which a binary model predicts the positive class."""
    precision: Precision = Precision.float32
    """Signatures of older releases do not have this field."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("A model needs at least one input.")
        if (self.classes is None) != (self.task is Task.regression):
            raise ValueError(f"A {self.task.value} signature has classes {self.classes}.")
        if self.task is Task.binary and len(self.classes or ()) != 2:
            raise ValueError(f"A binary signature needs two classes, got {self.classes}.")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}.")

    @property
    def columns(self) -> list[str]:
        """Names of the inputs, in order."""
        return [spec.name for spec in self.inputs]

    @property
    def matrix_columns(self) -> list[InputSpec]:
        """The input of each column of the model's matrix. A list has several columns."""
        return [spec for spec in self.inputs for _ in range(spec.width)]

    @property
    def matrix_names(self) -> list[str]:
        """Name of each column of the model's matrix, such as `emb[2]` for an element of a list."""
        return [
            spec.name if spec.length is None else f"{spec.name}[{element}]"
            for spec in self.inputs
            for element in range(spec.width)
        ]

    @property
    def width(self) -> int:
        """Number of columns of the model's matrix."""
        return sum(spec.width for spec in self.inputs)

    @property
    def categorical(self) -> list[int]:
        """Positions of the categorical inputs in the matrix."""
        return [i for i, spec in enumerate(self.matrix_columns) if spec.categories is not None]

    @property
    def num_scores(self) -> int:
        """Number of scores per row: one for binary and regression, one per class for multiclass."""
        return len(self.classes or ()) if self.task is Task.multiclass else 1

    def to_json(self) -> str:
        """Return the content of `model.json`."""
        enums = {"task": self.task.value, "precision": self.precision.value}
        return json.dumps(asdict(self) | enums, indent=1, ensure_ascii=False)


def parse_signature(text: str | bytes) -> ModelSignature:
    """Parse `model.json`.

    Raises:
        RefusedError: The text is not a signature.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        inputs = tuple(
            InputSpec(
                name=spec["name"],
                dtype=spec["dtype"],
                categories=_tuple(spec["categories"]),
                length=spec.get("length"),
            )
            for spec in fields.pop("inputs")
        )
        task = Task(fields.pop("task"))
        classes = _tuple(fields.pop("classes"))
        precision = Precision(fields.pop("precision", Precision.float32.value))
        return ModelSignature(task=task, inputs=inputs, classes=classes, precision=precision, **fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(
            f"{SIGNATURE_FILE} is not a model signature: {error}. Train the version again."
        ) from error


def _tuple(values: list[Label] | None) -> tuple[Label, ...] | None:
    return None if values is None else tuple(values)
