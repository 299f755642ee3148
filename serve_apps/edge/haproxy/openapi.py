"""The OpenAPI 3.1 document of the edge's paths; tests compare it with real answers.

It does not list a model's inputs, which the model's metadata names. HAProxy answers with the document from its
configuration, so the whole answer must fit into one of its buffers: `MAX_BYTES`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from serve_apps.replica.http_contract import (
    MAX_BODY_BYTES,
    MAX_ENTITIES,
    MAX_OUTCOMES,
    PREDICTION_ID_HEADER,
    PREDICTION_ID_PATTERN,
)

MAX_BYTES = 31_000
NAME = "^[A-Za-z0-9._-]+$"
MAX_WIDTH = 65_536
AS_OF = (
    "ISO 8601; null is now. Time-to-live counts from here. The store has one row an entity, its newest: where that is "
    "later than as_of the status is newer, and only a training set says what was known then."
)
_INTEGER = {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1}


def document() -> dict[str, Any]:
    """Return the document as plain data."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Falaj",
            "version": metadata.version("falaj"),
            "description": "Predictions by the Open Inference Protocol v2, or by key from the feature store.",
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "paths": _health() | _metadata() | _infer() | _by_key() | _outcomes() | _features(),
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "parameters": _parameters(),
            "requestBodies": {"Tensors": {"required": True, "content": _tensors("Infer")}},
            "responses": {"Tensors": _tensor_answer(), "Refusal": _refusal()},
            "schemas": _schemas() | _tensor_schemas() | _key_schemas() | _feature_schemas(),
        },
    }


def _health() -> dict[str, Any]:
    live = _get("live", "Whether the edge answers.", _json("Live"))
    ready = _get("ready", "Whether every champion has a healthy replica.", _json("Ready"))
    paths = {"/v2/health/live": live, "/v2/health/ready": ready}
    return {path: {"get": methods["get"] | {"security": []}} for path, methods in paths.items()}


def _metadata() -> dict[str, Any]:
    paths = {
        "/v2": _get("server", "Name, version and extensions of the server.", _json("Server")),
        "/openapi.json": _get("document", "This document.", _answer({"type": "object"})),
    }
    for suffix, parameters in _with_and_without_version():
        path, name = f"/v2/models/{{model}}{suffix}", "Version" if suffix else ""
        paths[path] = _get(f"model{name}", "A model's inputs and outputs.", _json("Model"), *parameters)
        summary = "Whether a model answers."
        paths[f"{path}/ready"] = _get(f"modelReady{name}", summary, _json("ModelReady"), *parameters)
    return paths


def _infer() -> dict[str, Any]:
    return {
        f"/v2/models/{{model}}{suffix}/infer": _post(
            "inferVersion" if suffix else "infer",
            "Predict from named tensors, one per input of the model.",
            _ref("Tensors", "requestBodies"),
            _ref("Tensors", "responses"),
            *parameters,
            _ref("jsonLength", "parameters"),
            _ref("unit", "parameters"),
        )
        for suffix, parameters in _with_and_without_version()
    }


def _tensors(schema: str) -> dict[str, Any]:
    """The content of a body: JSON, or JSON followed by binary data."""
    raw = {"schema": {"type": "string", "format": "binary"}}
    return {"application/json": {"schema": _ref(schema)}, "application/octet-stream": raw}


def _tensor_answer() -> dict[str, Any]:
    length = {
        "description": "Bytes of JSON, where binary data stands behind it.",
        "schema": {"type": "integer"},
    }
    return {
        "description": "An answer; with binary data behind the JSON where that was asked for.",
        "content": _tensors("Inference"),
        "headers": {"Inference-Header-Content-Length": length, **_PREDICTION_ID},
    }


def _by_key() -> dict[str, Any]:
    return {
        "/v1/models/{model}:predict": _post(
            "predict",
            "Predict for entities; their features are read online, unless given.",
            _body("Predict"),
            _json("Predictions") | {"headers": _PREDICTION_ID},
            _ref("model", "parameters"),
            _ref("unit", "parameters"),
        )
    }


def _outcomes() -> dict[str, Any]:
    accepted = _answer(_object({"accepted": {"type": "integer"}}, "accepted"))
    return {"/v1/outcomes": _post("outcomes", "What came true of predictions.", _body("Outcomes"), accepted)}


def _features() -> dict[str, Any]:
    return {
        "/v1/features:read": _post("readFeatures", "Features by key.", _body("Read"), _json("Features")),
        "/v1/features:push": _post("pushFeatures", "Rows of a feature view.", _body("Push"), _json("Pushed")),
    }


_PREDICTION_ID = {PREDICTION_ID_HEADER: {"schema": {"type": "string"}}}


def _parameters() -> dict[str, Any]:
    name = {"in": "path", "required": True, "schema": {"type": "string", "pattern": NAME}}
    return {
        "model": {"name": "model", **name},
        "version": {
            "name": "version",
            "description": "It does not choose: 404 if another version answers this request.",
            **name,
        },
        "unit": {
            "name": "X-Unit-ID",
            "in": "header",
            "description": "Keeps a unit at its variant while a rollout runs; without one the champion answers.",
            "schema": {"type": "string"},
        },
        "jsonLength": {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Bytes of JSON, where binary tensor data stands behind it.",
            "schema": {"type": "integer", "minimum": 0},
        },
    }


def _schemas() -> dict[str, Any]:
    text = {"type": "string"}
    tensor = _object(
        {"name": text, "datatype": _ref("Datatype"), "shape": _list({"type": "integer"})},
        "name",
        "datatype",
        "shape",
    )
    model = {
        "name": text,
        "versions": _list(text),
        "platform": text,
        "inputs": _list(tensor),
        "outputs": _list(tensor),
        "task": {"enum": ["binary", "multiclass", "regression"]},
        "classes": _list({"type": ["string", "number", "boolean"]}),
    }
    yes = {"const": True}
    return {
        "Error": _object(
            {"error": text, "code": {"type": "integer"}, "features_status": _ref("FeaturesStatus")},
            "error",
            "code",
        ),
        "Live": _object({"live": yes}, "live"),
        "Ready": _object({"ready": yes}, "ready"),
        "Server": _object(
            {"name": text, "version": text, "extensions": _list(text)}, "name", "version", "extensions"
        ),
        "Model": _object(model, "name", "versions", "platform", "inputs", "outputs", "task"),
        "ModelReady": _object({"name": text, "ready": yes}, "name", "ready"),
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
    shape = {**_list({"type": "integer", "minimum": 1, "maximum": MAX_WIDTH}), "minItems": 1, "maxItems": 2}
    tensor = {
        "name": text,
        "datatype": _ref("Datatype"),
        "shape": {**shape, "description": "[n] or [n, 1]; [n, m] for a list"},
        "data": {
            **_list({"anyOf": [value, _list(value)]}),
            "description": "Flat or nested; null is missing.",
        },
        "parameters": {
            "type": ["object", "null"],
            "properties": {"binary_data_size": {"type": "integer", "minimum": 0}},
        },
    }
    flag = {"type": "boolean", "default": False}
    requested_output = _object({"name": text, "parameters": _optional("binary_data", flag)}, "name")
    infer = {
        "id": {"type": ["string", "null"], "description": "Comes back in the answer."},
        "parameters": _optional("binary_data_output", flag),
        "inputs": {**_list(_object(tensor, "name", "datatype", "shape")), "minItems": 1},
        "outputs": {
            **_list(requested_output),
            "type": ["array", "null"],
            "description": "All, if none is named.",
        },
    }
    output = {
        "name": text,
        "datatype": _ref("Datatype"),
        "shape": _list({"type": "integer"}),
        "data": _list({"type": ["string", "number", "boolean"]}),
        "parameters": {"type": "object"},
    }
    inference = {
        "model_name": text,
        "model_version": text,
        "id": text,
        "parameters": _object({"prediction_id": text, "variant": text}, "prediction_id", "variant"),
        "outputs": _list(_object(output, "name", "datatype", "shape")),
    }
    return {
        "Infer": _object(infer, "inputs"),
        "Inference": _object(inference, "model_name", "model_version", "parameters", "outputs"),
    }


def _key_schemas() -> dict[str, Any]:
    text, value = {"type": "string"}, {"type": ["string", "number", "boolean", "null"]}
    label = {"type": ["string", "number", "boolean"]}
    predict = {
        "entities": _ref("Entities"),
        "features": {
            "type": ["object", "null"],
            "additionalProperties": {"anyOf": [value, _list({"anyOf": [value, _list(value)]})]},
            "description": "Input to one value, or one per entity, in place of what the store holds. A value is as in "
            "features:read.",
        },
        "as_of": _ref("AsOf"),
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
        "predictions": _list(_object(row)),
        "features_status": _ref("FeaturesStatus"),
        "features_defaults": {
            "type": "object",
            "description": "Input to the value put in where it is missing or expired.",
        },
    }
    outcome = {
        "prediction_id": {"type": "string", "pattern": f"^{PREDICTION_ID_PATTERN}$"},
        "row": {"type": "integer", "minimum": 0, "maximum": MAX_ENTITIES - 1, "default": 0},
        "outcome": label,
        "observed_at": {"type": "string", "description": "ISO 8601."},
    }
    closed = _closed(outcome, "prediction_id", "outcome")
    outcomes = {"model": text, "outcomes": {**_list(closed), "minItems": 1, "maxItems": MAX_OUTCOMES}}
    return {
        "FeaturesStatus": {
            "type": "object",
            "additionalProperties": _list(_ref("Status")),
            "description": "Of the inputs that were not all present.",
        },
        "Predict": _closed(predict, "entities"),
        "Predictions": _object(predictions, "prediction_id", "model_version", "variant", "predictions"),
        "Outcomes": _object(outcomes, "model", "outcomes"),
    }


def _feature_schemas() -> dict[str, Any]:
    text, name = {"type": "string"}, {"type": "string", "minLength": 1, "maxLength": 200}
    keys = {"type": "object", "additionalProperties": {"anyOf": [text, _INTEGER]}}
    entities = _list({**keys, "minProperties": 1})
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
        "idempotency_key": {**name, "description": "The same again is answered the same and stored once."},
        "rows": {**_list(_closed(row, "keys", "event_timestamp")), "minItems": 1, "maxItems": MAX_ENTITIES},
    }
    columns = {"type": "object", "additionalProperties": _list({})}
    forms = (
        'By dtype: numbers and bools as they are; timestamp and date ISO 8601; decimal(p, s) text, as "12.50"; bytes '
        "base64; list<…> an array. A push takes the same."
    )
    features = {
        "service": text,
        "service_version": text,
        "as_of": text,
        "features": {**columns, "description": forms},
        "status": {**columns, "additionalProperties": _list(_ref("Status"))},
    }
    quarantined = _object({"row": {"type": "integer"}, "reason": text}, "row", "reason")
    pushed = {"view": text, "accepted": {"type": "integer"}, "quarantined": _list(quarantined)}
    return {
        "Entities": {**entities, "minItems": 1, "maxItems": MAX_ENTITIES},
        "AsOf": {"type": ["string", "null"], "description": AS_OF},
        "Status": {"enum": ["present", "null", "missing", "expired", "newer"]},
        "Read": _closed(
            {"service": name, "entities": _ref("Entities"), "as_of": _ref("AsOf")}, "service", "entities"
        ),
        "Features": _object(features, *features),
        "Push": _closed(push, *push),
        "Pushed": _object(pushed, *pushed),
    }


def _with_and_without_version() -> list[tuple[str, list[dict[str, Any]]]]:
    model = _ref("model", "parameters")
    return [("", [model]), ("/versions/{version}", [model, _ref("version", "parameters")])]


def _get(name: str, summary: str, answer: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
    return {"get": _operation(name, summary, answer, parameters)}


def _post(
    name: str, summary: str, body: dict[str, Any], answer: dict[str, Any], *parameters: dict[str, Any]
) -> dict[str, Any]:
    operation = _operation(name, summary, answer, parameters)
    return {"post": operation | {"requestBody": body}}


def _body(schema: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": _ref(schema)}}}


def _operation(
    name: str, summary: str, answer: dict[str, Any], parameters: tuple[dict[str, Any], ...]
) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": name, "summary": summary}
    if parameters:
        operation["parameters"] = list(parameters)
    return operation | {"responses": {"200": answer, "default": _ref("Refusal", "responses")}}


def _refusal() -> dict[str, Any]:
    description = (
        "400: what of the request does not fit, and how. 401: no token, or one that does not hold. 403: its role or "
        "purpose may not do this, or its scope does not name the model. 404: no such path, model or version. 405: "
        "`Allow` names the method. 408: the request came too slowly. 413: the body is larger than "
        f"{MAX_BODY_BYTES:,} bytes. "
        "415: it is compressed. 429: more requests than a principal or tenant may send; `Retry-After` says when to try "
        "again. 503: no healthy replica, or nothing can be written down; try again. Other 5xx: a failure."
    )
    return _json("Error", description)


def _json(schema: str, description: str = "Done.") -> dict[str, Any]:
    return _answer(_ref(schema), description)


def _answer(schema: dict[str, Any], description: str = "Done.") -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _ref(name: str, kind: str = "schemas") -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return _object(properties, *required) | {"additionalProperties": False}


def _optional(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": ["object", "null"], "properties": {name: schema}}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}
