"""The OpenAPI 3.1 document of the edge's paths; tests compare it with real answers.

The document is part of HAProxy's configuration. An answer from the configuration must fit into one HAProxy buffer:
`MAX_BYTES`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from serve_apps.edge.openapi.json_schema import json_object, ref
from serve_apps.edge.openapi.schemas import schemas
from serve_apps.replica.http_contract import MAX_BODY_BYTES, PREDICTION_ID_HEADER

MAX_BYTES = 31_000
NAME = "^[A-Za-z0-9._-]+$"
JOB = "^[A-Za-z0-9_-]{1,64}$"


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
        "paths": _health()
        | _metadata()
        | _infer()
        | _by_key()
        | _outcomes()
        | _features()
        | _jobs()
        | _rollouts(),
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "parameters": _parameters(),
            "requestBodies": {"Tensors": {"required": True, "content": _tensors("Infer")}},
            "responses": {"Tensors": _tensor_answer(), "Refusal": _refusal()},
            "schemas": schemas(),
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
            ref("Tensors", "requestBodies"),
            ref("Tensors", "responses"),
            *parameters,
            ref("jsonLength", "parameters"),
            ref("unit", "parameters"),
        )
        for suffix, parameters in _with_and_without_version()
    }


def _tensors(schema: str) -> dict[str, Any]:
    """Return the two media types of a body: JSON, or JSON followed by binary data."""
    raw = {"schema": {"type": "string", "format": "binary"}}
    return {"application/json": {"schema": ref(schema)}, "application/octet-stream": raw}


def _tensor_answer() -> dict[str, Any]:
    length = {
        "description": "Length of the JSON in bytes, if binary data follows it.",
        "schema": {"type": "integer"},
    }
    return {
        "description": "Predictions. Binary data follows the JSON if the request asks for it.",
        "content": _tensors("Inference"),
        "headers": {"Inference-Header-Content-Length": length, **_PREDICTION_ID},
    }


def _by_key() -> dict[str, Any]:
    return {
        "/v1/models/{model}:predict": _post(
            "predict",
            "Predict for entities. Features are read from the online store, unless the request gives them.",
            _body("Predict"),
            _json("Predictions") | {"headers": _PREDICTION_ID},
            ref("model", "parameters"),
            ref("unit", "parameters"),
        )
    }


def _outcomes() -> dict[str, Any]:
    accepted = _answer(json_object({"accepted": {"type": "integer"}}, "accepted"))
    return {
        "/v1/outcomes": _post("outcomes", "Post the outcomes of predictions.", _body("Outcomes"), accepted)
    }


def _features() -> dict[str, Any]:
    return {
        "/v1/features:read": _post("readFeatures", "Read features by key.", _body("Read"), _json("Features")),
        "/v1/features:push": _post(
            "pushFeatures", "Push rows of a feature view.", _body("Push"), _json("Pushed")
        ),
    }


def _jobs() -> dict[str, Any]:
    job = ref("job", "parameters")
    submit = _post("submitJob", "Submit a command as a job.", _body("Submit"), _json("JobStatus"))
    submit["post"]["responses"]["202"] = _json(
        "JobStatus", "Accepted. 200 is a repeated request with the same key."
    )
    stop = _operation("stopJob", "Stop a job.", _json("JobStatus", "It is over already."), (job,))
    stop["responses"]["202"] = _json("JobStatus", "It is being stopped.")
    log = _get(
        "jobLog",
        "The job's output as text, until the job ends; `?follow=false` for what is there.",
        _LOG,
        job,
    )
    return {
        "/v1/jobs": submit | _get("jobs", "Your newest jobs; an admin or auditor gets all.", _json("Jobs")),
        "/v1/jobs/{job}": _get("job", "A job and its status.", _json("Job"), job) | {"delete": stop},
        "/v1/jobs/{job}/logs": log,
    }


def _rollouts() -> dict[str, Any]:
    model = ref("model", "parameters")
    show = _get("rollout", "A model's versions, rollout and policy.", _json("Rollout"), model)
    change = _post(
        "changeRollout",
        "Start, pause, resume or roll back a rollout.",
        _body("RolloutChange"),
        _json("RolloutChanged"),
        model,
    )
    return {"/v1/rollouts/{model}": show | change}


_LOG = {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}}}}
_PREDICTION_ID = {PREDICTION_ID_HEADER: {"schema": {"type": "string"}}}


def _parameters() -> dict[str, Any]:
    name = {"in": "path", "required": True, "schema": {"type": "string", "pattern": NAME}}
    return {
        "model": {"name": "model", **name},
        "version": {
            "name": "version",
            "description": "Does not select a version: the answer is 404 if another version serves this request.",
            **name,
        },
        "job": {"name": "job", "in": "path", "required": True, "schema": {"type": "string", "pattern": JOB}},
        "unit": {
            "name": "X-Unit-ID",
            "in": "header",
            "description": "Unit of the request, such as a user. During a rollout a unit keeps its variant; without "
            "this header the champion answers. A rollout can take the token's subject as the unit instead.",
            "schema": {"type": "string"},
        },
        "jsonLength": {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Length of the JSON in bytes, if binary tensor data follows it.",
            "schema": {"type": "integer", "minimum": 0},
        },
    }


def _with_and_without_version() -> list[tuple[str, list[dict[str, Any]]]]:
    model = ref("model", "parameters")
    return [("", [model]), ("/versions/{version}", [model, ref("version", "parameters")])]


def _get(name: str, summary: str, answer: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
    return {"get": _operation(name, summary, answer, parameters)}


def _post(
    name: str, summary: str, body: dict[str, Any], answer: dict[str, Any], *parameters: dict[str, Any]
) -> dict[str, Any]:
    operation = _operation(name, summary, answer, parameters)
    return {"post": operation | {"requestBody": body}}


def _body(schema: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": ref(schema)}}}


def _operation(
    name: str, summary: str, answer: dict[str, Any], parameters: tuple[dict[str, Any], ...]
) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": name, "summary": summary}
    if parameters:
        operation["parameters"] = list(parameters)
    return operation | {"responses": {"200": answer, "default": ref("Refusal", "responses")}}


def _refusal() -> dict[str, Any]:
    description = (
        "400: the request is wrong; the message says what. 401: the token is missing or not valid. 403: the token's "
        "role, purpose, scope or tenant does not allow the request. 404: no such path, model or version. 405: wrong "
        "method; `Allow` names the right one. 408: the request arrived too slowly. 409: the key belongs to another "
        "job, or the rollout's state does not allow the change. 413: the body is larger than "
        f"{MAX_BODY_BYTES:,} bytes. 415: the body is compressed. 429: the principal or tenant is over its limit; "
        "`Retry-After` says when to try again. 503: no healthy replica, or the record cannot be written; try again. "
        "Other 5xx: the service failed."
    )
    return _json("Error", description)


def _json(schema: str, description: str = "Done.") -> dict[str, Any]:
    return _answer(ref(schema), description)


def _answer(schema: dict[str, Any], description: str = "Done.") -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
