"""`POST /v1/features:read` and `/v1/features:push` as a Serve application.

The principal must be allowed to use every view of the request, for the purpose of its token. The replica opens keys for
that purpose only. Definitions are read from the ledger again every few seconds, so an applied change needs no restart.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import (
    DefinitionError,
    FeatureViewNotFound,
    Inconsistent,
    InvalidRequest,
    ModelNotFound,
    ViewRetired,
)
from cluster.ledger import open_ledger
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store, service_access
from cluster.security.keys.store import KeyStore
from cluster.security.tokens.principal import Principal
from cluster.session import require_running_cluster
from cluster.settings_conversion import from_plain
from cluster.storage import layout
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.online.reader import FeatureReader, open_online_store
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.streaming.push_log import PushLog, PushLogFull, PushLogUnavailable
from feature_jobs.store.streaming.push_tables import import_lmdb_logs, pushed_views
from feature_jobs.store.streaming.pushed_view import PushedView, load_pushed_view
from feature_jobs.store.streaming.pusher import Pusher, open_push_log
from feature_jobs.store.types.dtypes import to_json
from serve_apps.features.held_keys import HeldKeys
from serve_apps.features.request import Push, parse_push, parse_read
from serve_apps.replica.access import AccessCheck
from serve_apps.replica.http import OutageOfDatabase, Unavailable, answer, read_json, refusal
from serve_apps.replica.outages import Outages, is_outage
from serve_apps.replica.process import prepare_replica

LOG = logging.getLogger("falaj.features")
REFRESH_S = 5
"""Maximum time for which an outdated definition is used."""


class Features:
    """Reads features of all services, and takes pushed rows of all views."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Open the online store.

        Args:
            config: the platform's configuration as plain values.
        """
        self._platform = from_plain(config)
        prepare_replica(self, max_concurrent=self._platform.replica.max_ongoing_requests)
        self._places = layout(self._platform.storage)
        self._ledger = open_ledger(self._platform)
        self._region = self._platform.cluster.region
        all_features = Resource(kind="features", name="*", region=self._region)
        self._access = AccessCheck.of(self._platform, all_features, self._ledger)
        self._record = require_running_cluster(self._platform)
        self._engine = open_online_store(
            self._platform.online, self._places, self._keys(""), readonly=False, fails_fast=True
        ).engine
        try:
            import_lmdb_logs(self._ledger, Path(self._places.push("")))
        except Inconsistent as error:  # pushes to this view are refused; all else is served
            LOG.error("%s", error)
        self._outages = Outages()
        self._logs: dict[str, PushLog] = {}
        self._ahead = FutureLimit.of(self._platform.features.max_ahead_s, online_at_once=True)
        self._table_keys: dict[str, Mapping[str, str]] = {}
        self._opening = threading.Lock()  # appends to one log wait for each other in its object
        self._view = functools.lru_cache(maxsize=256)(self._read_view)
        self._reader = functools.lru_cache(maxsize=256)(self._read_reader)
        self._held_keys = HeldKeys(
            self._hold_keys, views=functools.partial(pushed_views, self._ledger.engine)
        )

    def __del__(self) -> None:
        """Close the parts; Serve calls this when a replica stops normally."""
        for part in ("_access", "_held_keys"):
            if (opened := getattr(self, part, None)) is not None:
                opened.close()

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        try:
            path = request.url.path.removeprefix(request.scope.get("root_path", ""))
            authorization = request.headers.get("authorization")
            match request.method, path:
                case "POST", "/v1/features:read":
                    principal = self._access(authorization, Action.read_online)
                    body = await read_json(request)
                    reading = functools.partial(self._read, principal, body)
                    return answer(await self._outages.retry_during_outage(reading))
                case "POST", "/v1/features:push":
                    principal = self._access(authorization, Action.push_features)
                    push = parse_push(await read_json(request))
                    pushing = functools.partial(self._push, principal, push)
                    return answer(await self._outages.retry_during_outage(pushing, in_thread=True))
                case _:
                    raise ModelNotFound(f"{request.method} {path} is not served here.")
        except Exception as error:  # noqa: BLE001 (every error becomes a JSON answer; unknown ones are logged)
            return refusal(error)

    def _read(self, principal: Principal, body: dict[str, Any]) -> dict[str, Any]:
        request = parse_read(body, now=dt.datetime.now(dt.UTC))
        reader = self._reader(request.service, principal.purpose, _period())
        for view in reader.spec.views:
            self._access.check(principal, Action.read_online, *view_resources(view, region=self._region))
        vectors = reader.read(request.entities, request.as_of)
        return {
            "service": reader.spec.name,
            "service_version": reader.spec.version,
            "as_of": request.as_of.isoformat(),
            "features": {
                name: to_json(values, reader.dtypes[name]) for name, values in vectors.columns.items()
            },
            "status": vectors.status,
        }

    def _push(self, principal: Principal, push: Push) -> dict[str, Any]:
        view = self._view(push.view, _period())
        self._access.check(principal, Action.push_features, *view_resources(view.spec, region=self._region))
        try:
            pusher = Pusher(
                view,
                self._places,
                self._store(_purpose(view)),
                self._log(view),
                ahead=self._ahead,
                table_keys=self._table_keys,
            )
            return pusher.push(
                push.rows,
                idempotency_key=push.idempotency_key,
                digest=push.digest,
                now=dt.datetime.now(dt.UTC),
            )
        except PushLogUnavailable as error:  # a repeated push is stored once
            kind = OutageOfDatabase if is_outage(error.__cause__) else Unavailable
            raise kind(str(error)) from error
        except (PushLogFull, Inconsistent) as error:
            raise Unavailable(str(error)) from error

    def _hold_keys(self, name: str) -> None:
        """Fetch the keys that a push to a view needs."""
        view = self._view(name, _period())
        self._log(view).hold_key()
        self._store(_purpose(view)).hold_keys(view.spec)

    def _read_view(self, name: str, period: int) -> PushedView:
        try:
            return load_pushed_view(self._ledger, name)
        except FeatureViewNotFound:
            raise
        except ViewRetired as error:
            raise InvalidRequest(str(error)) from error
        except DefinitionError as error:
            raise Unavailable(str(error)) from error

    def _read_reader(self, service: str, purpose: str, period: int) -> FeatureReader:
        return FeatureReader(service_spec(self._ledger, service), self._store(purpose))

    def _log(self, view: PushedView) -> PushLog:
        name = view.spec.name
        with self._opening:
            if name not in self._logs:
                self._logs[name] = open_push_log(self._ledger, self._places, name, self._keys(_purpose(view)))
            return self._logs[name]

    @functools.cache  # noqa: B019 (an application lives as long as its process)
    def _store(self, purpose: str) -> OnlineStore:
        return OnlineStore(self._engine, self._keys(purpose))

    def _keys(self, purpose: str) -> KeyStore:
        return key_store(service_access(self._platform, self._record, name="features", purpose=purpose))


def _purpose(view: PushedView) -> str:
    """Return the purpose for which the replica opens a view's keys to write: the first one that the view lists."""
    return next(iter(view.spec.purposes), "")


def _period() -> int:
    """Return a number that changes every `REFRESH_S`; as a cache key, it makes cached definitions expire."""
    return int(time.monotonic() // REFRESH_S)
