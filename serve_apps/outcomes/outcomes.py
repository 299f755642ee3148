"""`POST /v1/outcomes` as a Serve application: validate all outcomes, write all, then answer."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import InvalidRequest, ModelNotFound, RefusedError
from cluster.ledger import open_ledger
from cluster.ledger.chain import canonical
from cluster.records.location import max_age_s, outcome_log
from cluster.records.schema import OutcomeRecord
from cluster.registry import Registry
from cluster.runtime import OutcomeParser
from cluster.runtime.loader import load_signature
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store, service_access
from cluster.security.keys.store import KeyNotFound, KeyStore
from cluster.session import require_running_cluster
from cluster.settings_conversion import from_plain
from cluster.storage import layout
from feature_jobs.store.catalog.log_keys import outcome_key
from serve_apps.outcomes.sums import OutcomeSums
from serve_apps.predictor.request import shortened, to_utc
from serve_apps.replica.access import AccessCheck
from serve_apps.replica.http import LOG, Unavailable, answer, read_json, refusal
from serve_apps.replica.http_contract import MAX_ENTITIES, MAX_OUTCOMES, PREDICTION_ID_PATTERN
from serve_apps.replica.process import prepare_replica
from serve_apps.replica.record_log import RecordLog

_FIELDS = frozenset({"prediction_id", "row", "outcome", "observed_at"})
_ID = re.compile(PREDICTION_ID_PATTERN)


def parse_outcomes(body: dict[str, Any], *, received_at: dt.datetime) -> tuple[str, list[OutcomeRecord]]:
    """Parse a request's body into the model's name and the outcomes.

    Raises:
        InvalidRequest: an outcome is wrong. The message names the first wrong outcome.
    """
    model, items = body.get("model"), body.get("outcomes")
    if not isinstance(model, str):
        raise InvalidRequest('Give "model" as text.')
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_OUTCOMES:
        raise InvalidRequest(f'Give "outcomes" as a list of 1 to {MAX_OUTCOMES} objects.')
    return model, [_outcome(position, item, received_at) for position, item in enumerate(items)]


def _outcome(position: int, item: Any, received_at: dt.datetime) -> OutcomeRecord:
    path = f"outcomes[{position}]"
    if not isinstance(item, dict) or item.keys() - _FIELDS:
        raise InvalidRequest(f"{path} must be an object with {', '.join(sorted(_FIELDS))}.")
    prediction_id, row, outcome = item.get("prediction_id"), item.get("row", 0), item.get("outcome")
    if not isinstance(prediction_id, str) or not _ID.fullmatch(prediction_id):
        raise InvalidRequest(f"{path}.prediction_id must be the id of an answer, got {prediction_id!r}.")
    if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < MAX_ENTITIES:
        raise InvalidRequest(f"{path}.row must be a whole number from 0 to {MAX_ENTITIES - 1}, got {row!r}.")
    if not isinstance(outcome, str | int | float):
        raise InvalidRequest(f"{path}.outcome must be a label or a number, got {outcome!r}.")
    observed_at = item.get("observed_at", received_at.isoformat())
    try:
        # In UTC, because readers of the log do not parse an offset with seconds.
        observed = to_utc(observed_at)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"{path}.observed_at must be an ISO 8601 instant, got {observed_at!r}."
        ) from error
    return OutcomeRecord(
        prediction_id=prediction_id,
        row=row,
        outcome=outcome,
        observed_at=observed.isoformat(),
        received_at=received_at.isoformat(),
    )


def normalise(records: list[OutcomeRecord], types: Sequence[OutcomeParser]) -> list[OutcomeRecord]:
    """Convert each outcome to a class or a number, with the first of `types` that the outcome fits.

    Args:
        records: the outcomes.
        types: outcome types of the model's versions. Any of these versions may have made the prediction.

    Raises:
        InvalidRequest: an outcome fits none of the types. The message names the first such outcome.
    """
    normalised = []
    for position, record in enumerate(records):
        values = (outcome_type.parse(record.outcome) for outcome_type in types)
        value = next((value for value in values if value is not None), None)
        if value is None:
            wanted = " or ".join(dict.fromkeys(outcome_type.expected for outcome_type in types))
            raise InvalidRequest(
                f"outcomes[{position}].outcome must be {wanted}, got {shortened(record.outcome)}."
            )
        normalised.append(record if value is record.outcome else replace(record, outcome=value))
    return normalised


class OutcomeTypes:
    """Outcome types of all versions of each model, because a prediction may come from an old version."""

    def __init__(self, registry: Registry, store: KeyStore) -> None:
        self._registry = registry
        self._store = store
        self._by_model: dict[str, dict[int, OutcomeParser]] = {}

    def of(self, model: str) -> list[OutcomeParser]:
        """Return the outcome type of each version, the newest version first.

        Raises:
            ModelNotFound: the model has no version.
            Unavailable: no version's signature can be read.
        """
        try:
            self._load_new_versions(model)
        except sa.exc.DBAPIError as error:  # for example, a full disk: use the versions known so far
            LOG.warning("the registry cannot be read: %s", error)
        by_version = self._by_model.get(model)
        if not by_version:
            raise Unavailable(f"No signature of '{model}' can be read, so no outcome can be checked.")
        return [by_version[number] for number in sorted(by_version, reverse=True)]

    def _load_new_versions(self, model: str) -> None:
        numbers = self._registry.versions(model)
        if not numbers:
            raise ModelNotFound(f"No model '{model}'.")
        by_version = self._by_model.setdefault(model, {})
        for number in numbers:
            if number not in by_version:
                try:
                    signature = load_signature(self._registry.get(model, number), self._store)
                except (RefusedError, OSError) as error:  # this version cannot serve, but others may
                    LOG.warning("the signature of %s version %s cannot be read: %s", model, number, error)
                else:
                    by_version[number] = OutcomeParser(signature)


class Outcomes:
    """Takes outcomes of all models."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Open the ledger.

        Args:
            config: the platform's configuration as plain values.
        """
        platform = from_plain(config)
        prepare_replica(self, max_concurrent=platform.replica.max_ongoing_requests)
        self._places = layout(platform.storage)
        self._ledger = open_ledger(platform)
        self._region = platform.cluster.region
        all_outcomes = Resource(kind="outcomes", name="*", region=self._region)
        self._access = AccessCheck.of(platform, all_outcomes, self._ledger)
        self._store = key_store(service_access(platform, require_running_cluster(platform), name="outcomes"))
        self._durability = platform.replica.durability
        self._max_age_s = max_age_s(platform.storage)
        self._types = OutcomeTypes(Registry(self._ledger, self._places), self._store)
        self._logs: dict[str, RecordLog] = {}
        self._sums = OutcomeSums(self._ledger.append)

    def __del__(self) -> None:
        """Close the sums, the access check and the logs; Serve calls this when a replica stops normally."""
        if (sums := getattr(self, "_sums", None)) is not None:
            sums.close()
        if (access := getattr(self, "_access", None)) is not None:
            access.close()
        for log in getattr(self, "_logs", {}).values():
            log.close()

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        try:
            principal = self._access(request.headers.get("authorization"), Action.write_outcome)
            body = await read_json(request)
            model, records = parse_outcomes(body, received_at=dt.datetime.now(dt.UTC))
            resource = Resource(kind="model", name=model, region=self._region)
            self._access.check(principal, Action.write_outcome, resource)
            records = normalise(records, self._types.of(model))
            await self._write(model, records, actor=f"{principal.role}:{principal.subject}")
            return answer({"accepted": len(records)})
        except Exception as error:  # noqa: BLE001 (every error becomes a JSON answer; unknown ones are logged)
            return refusal(error)

    async def _write(self, model: str, records: list[OutcomeRecord], *, actor: str) -> None:
        if model not in self._logs:
            self._logs[model] = self._open_log(model)
        log = self._logs[model]
        log.append(*records)
        await log.after_durable(None)
        content = canonical([[record.prediction_id, record.row, str(record.outcome)] for record in records])
        digest = hashlib.sha256(content).hexdigest()
        self._sums.add(model, accepted=len(records), digest=digest, actor=actor, at=time.time())

    def _open_log(self, model: str) -> RecordLog:
        try:
            return RecordLog(
                outcome_log(self._places, self._ledger, model),
                store=self._store,
                key=outcome_key(model),
                durability=self._durability,
                max_age_s=self._max_age_s,
            )
        except KeyNotFound as error:
            raise ModelNotFound(f"Model '{model}' has never been deployed, so it has no outcomes.") from error
