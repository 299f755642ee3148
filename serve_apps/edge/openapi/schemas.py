"""Schemas of requests and answers in the OpenAPI document.

The schemas do not list the inputs of a model, because these are in the model's metadata.
"""

from __future__ import annotations

from typing import Any

from serve_apps.edge.openapi.json_schema import array, closed_object, json_object, optional_object, ref
from serve_apps.replica.http_contract import MAX_ENTITIES, MAX_OUTCOMES, PREDICTION_ID_PATTERN

IDEMPOTENCY = "A repeated push with the same key gets the same answer and is stored once."
MAX_WIDTH = 65_536
"""Largest number in a tensor's shape."""
AS_OF = (
    "ISO 8601 time of the read; null is now. Time-to-live is measured at this time. The store has only the newest row "
    "of each entity. If that row became known after as_of, its status is newer; only a training set has earlier values."
)
_INTEGER = {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1}


def schemas() -> dict[str, Any]:
    """Return all schemas by name."""
    own = _model_schemas() | _tensor_schemas() | _key_schemas() | _feature_schemas()
    return own | _job_schemas() | _rollout_schemas()


def _model_schemas() -> dict[str, Any]:
    text = {"type": "string"}
    tensor = json_object(
        {"name": text, "datatype": ref("Datatype"), "shape": array({"type": "integer"})},
        "name",
        "datatype",
        "shape",
    )
    model = {
        "name": text,
        "versions": array(text),
        "platform": text,
        "inputs": array(tensor),
        "outputs": array(tensor),
        "task": {"enum": ["binary", "multiclass", "regression"]},
        "classes": array({"type": ["string", "number", "boolean"]}),
    }
    yes = {"const": True}
    return {
        "Error": json_object(
            {"error": text, "code": {"type": "integer"}, "features_status": ref("FeaturesStatus")},
            "error",
            "code",
        ),
        "Live": json_object({"live": yes}, "live"),
        "Ready": json_object({"ready": yes}, "ready"),
        "Server": json_object(
            {"name": text, "version": text, "extensions": array(text)}, "name", "version", "extensions"
        ),
        "Model": json_object(model, "name", "versions", "platform", "inputs", "outputs", "task"),
        "ModelReady": json_object({"name": text, "ready": yes}, "name", "ready"),
        "Datatype": {
            "enum": [
                "BOOL",
                *(f"{kind}{bits}" for kind in ("UINT", "INT") for bits in (8, 16, 32, 64)),
                *("FP16", "FP32", "FP64", "BYTES"),
            ]
        },
    }


def _tensor_schemas() -> dict[str, Any]:
    text, value = {"type": "string"}, {"type": ["string", "number", "boolean", "null"]}
    shape = {**array({"type": "integer", "minimum": 1, "maximum": MAX_WIDTH}), "minItems": 1, "maxItems": 2}
    tensor = {
        "name": text,
        "datatype": ref("Datatype"),
        "shape": {**shape, "description": "[n] or [n, 1]; [n, m] for a list"},
        "data": {
            **array({"anyOf": [value, array(value)]}),
            "description": "Flat or nested; null is a missing value.",
        },
        "parameters": {
            "type": ["object", "null"],
            "properties": {"binary_data_size": {"type": "integer", "minimum": 0}},
        },
    }
    flag = {"type": "boolean", "default": False}
    requested_output = json_object({"name": text, "parameters": optional_object("binary_data", flag)}, "name")
    infer = {
        "id": {"type": ["string", "null"], "description": "Returned in the answer."},
        "parameters": optional_object("binary_data_output", flag),
        "inputs": {**array(json_object(tensor, "name", "datatype", "shape")), "minItems": 1},
        "outputs": {
            **array(requested_output),
            "type": ["array", "null"],
            "description": "Outputs to return; all if empty.",
        },
    }
    output = {
        "name": text,
        "datatype": ref("Datatype"),
        "shape": array({"type": "integer"}),
        "data": array({"type": ["string", "number", "boolean"]}),
        "parameters": {"type": "object"},
    }
    inference = {
        "model_name": text,
        "model_version": text,
        "id": text,
        "parameters": json_object({"prediction_id": text, "variant": text}, "prediction_id", "variant"),
        "outputs": array(json_object(output, "name", "datatype", "shape")),
    }
    return {
        "Infer": json_object(infer, "inputs"),
        "Inference": json_object(inference, "model_name", "model_version", "parameters", "outputs"),
    }


def _key_schemas() -> dict[str, Any]:
    text, value = {"type": "string"}, {"type": ["string", "number", "boolean", "null"]}
    label = {"type": ["string", "number", "boolean"]}
    predict = {
        "entities": ref("Entities"),
        "features": {
            "type": ["object", "null"],
            "additionalProperties": {"anyOf": [value, array({"anyOf": [value, array(value)]})]},
            "description": "Values to use instead of stored ones: input to one value, or to one value for each entity. "
            "Formats are those of features:read.",
        },
        "as_of": ref("AsOf"),
    }
    row = {
        "probability": {"type": "number"},
        "probabilities": {"type": "object", "additionalProperties": {"type": "number"}},
        "label": label,
        "value": {"type": "number"},
    }
    predictions = {
        "prediction_id": text,
        "model_version": text,
        "variant": text,
        "predictions": array(json_object(row)),
        "features_status": ref("FeaturesStatus"),
        "features_defaults": {
            "type": "object",
            "description": "Input to the default that replaced missing or expired values.",
        },
    }
    outcome = {
        "prediction_id": {"type": "string", "pattern": f"^{PREDICTION_ID_PATTERN}$"},
        "row": {"type": "integer", "minimum": 0, "maximum": MAX_ENTITIES - 1, "default": 0},
        "outcome": label,
        "observed_at": {"type": "string", "description": "ISO 8601."},
    }
    closed = closed_object(outcome, "prediction_id", "outcome")
    outcomes = {"model": text, "outcomes": {**array(closed), "minItems": 1, "maxItems": MAX_OUTCOMES}}
    return {
        "FeaturesStatus": {
            "type": "object",
            "additionalProperties": array(ref("Status")),
            "description": "Input to the status of each entity, for inputs that are not all present.",
        },
        "Predict": closed_object(predict, "entities"),
        "Predictions": json_object(predictions, "prediction_id", "model_version", "variant", "predictions"),
        "Outcomes": json_object(outcomes, "model", "outcomes"),
    }


def _feature_schemas() -> dict[str, Any]:
    text, name = {"type": "string"}, {"type": "string", "minLength": 1, "maxLength": 200}
    keys = {"type": "object", "additionalProperties": {"anyOf": [text, _INTEGER]}}
    entities = array({**keys, "minProperties": 1})
    instant = {"type": "string", "description": "ISO 8601."}
    row = {
        "keys": keys,
        "features": {"type": "object"},
        "event_timestamp": instant,
        "created_timestamp": instant,
        "deleted": {"type": "boolean", "default": False},
    }
    push = {
        "view": name,
        "idempotency_key": {
            **name,
            "description": IDEMPOTENCY,
        },
        "rows": {
            **array(closed_object(row, "keys", "event_timestamp")),
            "minItems": 1,
            "maxItems": MAX_ENTITIES,
        },
    }
    columns = {"type": "object", "additionalProperties": array({})}
    forms = (
        "Values by dtype: numbers and booleans as in JSON; timestamp and date as ISO 8601; decimal(p, s) as text, for "
        'example "12.50"; bytes as base64; list<…> as an array. A push takes the same.'
    )
    features = {
        "service": text,
        "service_version": text,
        "as_of": text,
        "features": {**columns, "description": forms},
        "status": {**columns, "additionalProperties": array(ref("Status"))},
    }
    quarantined = json_object({"row": {"type": "integer"}, "reason": text}, "row", "reason")
    pushed = {"view": text, "accepted": {"type": "integer"}, "quarantined": array(quarantined)}
    return {
        "Entities": {**entities, "minItems": 1, "maxItems": MAX_ENTITIES},
        "AsOf": {"type": ["string", "null"], "description": AS_OF},
        "Status": {"enum": ["present", "null", "missing", "expired", "newer"]},
        "Read": closed_object(
            {"service": name, "entities": ref("Entities"), "as_of": ref("AsOf")}, "service", "entities"
        ),
        "Features": json_object(features, *features),
        "Push": closed_object(push, *push),
        "Pushed": json_object(pushed, *pushed),
    }


def _job_schemas() -> dict[str, Any]:
    text = {"type": "string"}
    job = {
        "id": text,
        "status": {
            "description": "pending, running, stopping; or how it ended: done, refused, failed, stopped, lost, "
            "not started.",
            **text,
        },
        "module": text,
        "overrides": array(text),
        "submitter": text,
        "role": text,
        "submitted_at": text,
        "exit_code": {"type": ["integer", "null"]},
        "seconds": {"type": "number"},
        "reason": text,
    }
    submit = {
        "module": {"description": "Command, such as feature_jobs.ingest.", **text},
        "overrides": array(text) | {"description": "Options of the command, such as view=income."},
        "key": {
            "description": "A repeated request with the same key and content returns the same job.",
            **text,
        },
        "intent": {"description": "With an OIDC issuer: the job's own token.", **text},
    }
    return {
        "Submit": closed_object(submit, "module"),
        "JobStatus": json_object({"id": text, "status": text}, "id", "status"),
        "Job": json_object(job, "id", "status", "module", "overrides", "submitter"),
        "Jobs": json_object({"jobs": array(ref("Job"))}, "jobs"),
    }


def _rollout_schemas() -> dict[str, Any]:
    text, integer = {"type": "string"}, {"type": "integer"}
    change = {
        "action": {"enum": ["start", "pause", "resume", "abort", "rollback"]},
        "version": {"description": "start: a deployed version.", **integer},
        "weight": {"description": "start: percent of units.", "type": "number"},
        "policy": {
            "description": "start, instead of weight: as in configs/rollout/*.yaml.",
            "type": "object",
        },
        "reason": text,
    }
    state = {
        "champion_version": {"type": ["integer", "null"]},
        "apps": {"type": "object"},
        **{name: {"type": ["object", "null"]} for name in ("rollout", "shadow", "policy", "promotion")},
    }
    changed = {"model": text, "rollout": text, "seq": integer}
    return {
        "RolloutChange": closed_object(change, "action"),
        "Rollout": json_object(state, *state),
        "RolloutChanged": json_object(changed, *changed),
    }
