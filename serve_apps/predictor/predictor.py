"""The replica of a model version: a plain class, which `apps.py` makes a Serve deployment.

A request needs few steps on purpose: read the token from a cache and the features from memory-mapped pages, run the
model in this process, write one record, answer.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import InvalidRequest, ModelFailed, RefusedError
from cluster.records.schema import PredictionRecord
from cluster.security.edge_proof import edge_proof
from cluster.settings_conversion import from_plain
from serve_apps.predictor import inference_protocol, paths
from serve_apps.predictor.batching import batches
from serve_apps.predictor.inputs import ModelInputs, model_inputs
from serve_apps.predictor.metrics import PredictionMetrics
from serve_apps.predictor.parts import Parts
from serve_apps.predictor.paths import Operation
from serve_apps.predictor.request import PredictRequest, RequestInput, parse_predict
from serve_apps.predictor.shadow import copy_counter
from serve_apps.replica.cost import RequestCost
from serve_apps.replica.edge_headers import EdgeHeaderReader, EdgeHeaders
from serve_apps.replica.http import LOG, answer, parse_json, read_body, refusal
from serve_apps.replica.http_contract import PREDICTION_ID_HEADER
from serve_apps.replica.ongoing import OngoingRequests
from serve_apps.replica.outages import Outages, wait_s
from serve_apps.replica.process import prepare_replica
from serve_apps.replica.scaling import ONGOING, REQUESTED


class Predictor:
    """Answers requests for one model version."""

    def __init__(self, config: dict[str, Any], name: str, version: int) -> None:
        """Verify and load the version. Serve sends requests only after this has returned.

        Args:
            config: the platform's configuration as plain values.
            name: name of the model.
            version: number of the version.

        Raises:
            ArtifactTampered: a file is not the registered one. An event about this was appended to the ledger.
        """
        platform = from_plain(config)
        prepare_replica(self, max_concurrent=platform.replica.max_ongoing_requests)
        parts = Parts.of(platform, name, version)
        self._version = parts.version
        self._model = parts.model()
        self._batches = batches(self._model, platform.replica.batching)
        signature = self._model.signature
        self._inputs = {spec.name: spec for spec in signature.inputs}
        self._outputs = inference_protocol.output_names(signature)
        self._access = parts.access_check()
        self._edge = EdgeHeaderReader(edge_proof(parts.places))
        self._log = parts.log()
        features = parts.features(signature)
        self._reader = features.reader
        self._request_inputs = features.request_inputs
        self._predict_resource = features.resource
        self._allowed_inputs: dict[str, RequestInput] = {**self._request_inputs, **self._inputs}
        tags = {"model": name, "version": str(version)}
        self._metrics = PredictionMetrics(tags)
        self._shadowing = parts.shadowing(copy_counter(tags), self._log.append)
        self._ongoing = OngoingRequests()
        self._requested = parts.requested_number()
        self._outages = Outages()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return this replica's load, and what a rollout requested, for `serve_apps/replica/scaling.py`."""
        return {ONGOING: self._ongoing.take(), REQUESTED: float(self._requested.value)}

    def __del__(self) -> None:
        """Close the parts; Serve calls this when a replica stops normally."""
        for part in ("_access", "_log", "_shadowing", "_requested"):
            if (opened := getattr(self, part, None)) is not None:
                opened.close()

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        started = time.perf_counter()
        edge = self._edge.read(request.scope["headers"])
        try:
            response = await self._answer(request, edge)
        except Exception as error:  # noqa: BLE001 (every error becomes a JSON answer; unknown ones are logged)
            response = refusal(error)
        took_s = time.perf_counter() - started
        self._metrics.answer(response.status_code, took_s=took_s)
        if request.method == "POST":  # a GET is a readiness check, which does not count as load
            self._ongoing.add(arrived=edge.arrived, took_s=took_s)
        return response

    async def _answer(self, request: Request, edge: EdgeHeaders) -> Response:
        # The path is read from the scope, because `request.url` would build a whole URL.
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        name, version = self._version.name, self._version.version
        call = paths.parse_call(request.method, path, model=name)
        resource = self._predict_resource if call.operation is Operation.predict else None
        self._access(request.headers.get("authorization"), call.operation.action, resource)
        call.check_version(name, version)
        deadline = time.monotonic() + wait_s(edge.variant)
        match call.operation:
            case Operation.predict:
                body = await read_body(request)
                response = await self._log.after_durable(
                    await self._predict(edge, parse_json(body), deadline=deadline), deadline=deadline
                )
                return self._shadowing.add_copy(response, call.operation, edge, body)
            case Operation.infer:
                body = await read_body(request)
                length = request.headers.getlist(inference_protocol.JSON_LENGTH)
                response = await self._log.after_durable(
                    await self._infer(edge, body, length), deadline=deadline
                )
                return self._shadowing.add_copy(
                    response, call.operation, edge, body, json_length="".join(length)
                )
            case Operation.metadata:
                return answer(inference_protocol.metadata(name, version, self._model.signature))
            case Operation.ready:
                return answer({"name": name, "ready": True})

    async def _rows(
        self, columns: dict[str, list[Any]], cost: RequestCost
    ) -> tuple[list[dict[str, Any]], str]:
        """Return the predictions as rows, and a fault. The fault is empty if the model gave scores."""
        try:
            # Each request is encoded separately. If one has a value that cannot be encoded, only this request fails.
            if self._batches is None:
                with cost:
                    return self._model.predict(columns).require_finite().rows(), ""
            with cost:
                matrix = self._model.encode(columns)
            return (await self._batches.predict(matrix, cost=cost)).require_finite().rows(), ""
        except InvalidRequest:
            raise
        except ModelFailed as failed:
            fault = str(failed)
        except RefusedError as error:  # the engine's message goes into the log only
            LOG.error("the model does not run on a request", exc_info=error)
            fault = "does not run on this request"
        self._metrics.without_score()
        return [], fault

    def _failed(self, fault: str, prediction_id: str) -> Response:
        """Return a response with status 503. It counts as a failure of the request's arm."""
        model = f"Model '{self._version.name}' version {self._version.version}"
        response = refusal(ModelFailed(f"{model} {fault}, so there is no answer."))
        response.headers[PREDICTION_ID_HEADER] = prediction_id
        return response

    async def _predict(self, edge: EdgeHeaders, body: dict[str, Any], *, deadline: float) -> Response:
        now = dt.datetime.now(dt.UTC)
        request = parse_predict(body, self._allowed_inputs, now=now)
        overrides, cost = request.overrides, RequestCost()
        inputs = await self._read_inputs(request, cost, deadline=deadline)
        rows, fault = await self._rows(inputs.columns, cost)
        request_values = {name: overrides[name] for name in self._request_inputs if name in overrides}
        prediction_id = self._log_prediction(
            edge,
            now,
            as_of=request.as_of,
            entities=request.entities,
            columns=inputs.columns | request_values,
            rows=rows,
            given=sorted(overrides),
            defaulted=inputs.defaulted,
            fault=fault,
            cost=cost,
        )
        if fault:
            return self._failed(fault, prediction_id)
        content: dict[str, Any] = {
            "prediction_id": prediction_id,
            "model_version": str(self._version.version),
            "variant": edge.variant,
            "predictions": rows,
        }
        if inputs.status:
            content["features_status"] = inputs.status
        if inputs.defaults:
            content["features_defaults"] = inputs.defaults
        return answer(content, headers={PREDICTION_ID_HEADER: prediction_id})

    async def _read_inputs(
        self, request: PredictRequest, cost: RequestCost, *, deadline: float
    ) -> ModelInputs:
        """Read the features. While the online store does not answer, wait for it."""

        def read() -> ModelInputs:
            with cost:
                return model_inputs(
                    self._reader, self._inputs.keys(), request.entities, request.overrides, request.as_of
                )

        return await self._outages.retry_during_outage(read, deadline=deadline)

    async def _infer(self, edge: EdgeHeaders, body: bytes, length: list[str]) -> Response:
        content, raw = inference_protocol.split_body(body, length)
        request, cost = (
            inference_protocol.parse_infer(content, self._inputs, self._outputs, raw),
            RequestCost(),
        )
        rows, fault = await self._rows(request.columns, cost)
        now = dt.datetime.now(dt.UTC)
        prediction_id = self._log_prediction(
            edge,
            now,
            as_of=now,
            entities=[{} for _ in range(request.count)],
            columns=request.columns,
            rows=rows,
            given=sorted(request.columns),
            defaulted=None,
            fault=fault,
            cost=cost,
        )
        if fault:
            return self._failed(fault, prediction_id)
        head = {
            "model_name": self._version.name,
            "model_version": str(self._version.version),
            **({} if request.id is None else {"id": request.id}),
            "parameters": {
                "prediction_id": prediction_id,
                "variant": edge.variant,
            },
        }
        outputs = inference_protocol.output_tensors(self._model.signature, rows)
        content_and_length = inference_protocol.encode_answer(head, outputs, request.outputs)
        return _tensor_response(*content_and_length, {PREDICTION_ID_HEADER: prediction_id})

    def _log_prediction(
        self,
        edge: EdgeHeaders,
        now: dt.datetime,
        *,
        as_of: dt.datetime,
        entities: list[dict[str, Any]],
        columns: dict[str, list[Any]],
        rows: list[dict[str, Any]],
        given: list[str],
        defaulted: dict[str, list[int]] | None,
        fault: str,
        cost: RequestCost,
    ) -> str:
        """Append the record of an answer to the log before the answer is sent. Return the prediction id."""
        prediction_id = os.urandom(16).hex()
        moment = now.isoformat()
        record = PredictionRecord(
            prediction_id=prediction_id,
            request_id=edge.request_id,
            time=moment,
            model=self._version.name,
            version=self._version.version,
            variant=edge.variant,
            rollout=edge.rollout,
            arm=edge.arm,
            unit_hash=edge.unit_hash,
            as_of=moment if as_of is now else as_of.isoformat(),
            entities=entities,
            features=columns,
            predictions=rows,
            given=given,
            defaulted=defaulted or {},
            fault=fault,
            took_ms=cost.took_ms,
            cpu_ms=cost.cpu_ms,
        )
        self._log.append(record)
        return prediction_id


def _tensor_response(body: bytes, json_length: int | None, headers: dict[str, str]) -> Response:
    if json_length is None:
        return Response(body, media_type="application/json", headers=headers)
    headers = headers | {inference_protocol.JSON_LENGTH: str(json_length)}
    return Response(body, media_type="application/octet-stream", headers=headers)
