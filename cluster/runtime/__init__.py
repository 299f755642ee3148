"""Verify, load and run model versions. Jobs and serve_apps both use this package, so their predictions are the same."""

from cluster.runtime.encoding import Encoder, encode
from cluster.runtime.loader import load_model, open_model
from cluster.runtime.model import Model
from cluster.runtime.predictions import Predictions
from cluster.runtime.signature import InputSpec, ModelSignature, Precision, Task, parse_signature
from cluster.runtime.truths import Truths

__all__ = [
    "Encoder",
    "InputSpec",
    "Model",
    "ModelSignature",
    "Precision",
    "Predictions",
    "Task",
    "Truths",
    "encode",
    "load_model",
    "open_model",
    "parse_signature",
]
