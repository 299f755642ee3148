"""Verify, load and run model versions. Jobs and serve_apps both use this package, so their predictions are the same."""

from cluster.runtime.encoding import Encoder, encode
from cluster.runtime.loader import load_model, open_model
from cluster.runtime.model import Model
from cluster.runtime.outcome_parser import OutcomeParser
from cluster.runtime.predictions import Predictions
from cluster.runtime.signature import InputSpec, ModelSignature, Precision, Task, parse_signature

__all__ = [
    "Encoder",
    "InputSpec",
    "Model",
    "ModelSignature",
    "Precision",
    "Predictions",
    "Task",
    "OutcomeParser",
    "encode",
    "load_model",
    "open_model",
    "parse_signature",
]
