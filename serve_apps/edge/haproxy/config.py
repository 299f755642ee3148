"""HAProxy's configuration, a pure function from routes and settings to text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from cluster.security.authorization.policy import EDGE_ACTIONS, Action, Policy
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import MAX_TEXT, TokenRules
from serve_apps.edge.haproxy import backends, connections, dashboard, fallback, limiting, scopes
from serve_apps.edge.haproxy import unauthenticated as strangers
from serve_apps.edge.haproxy.answers import ERROR_STATUSES, refuse, say
from serve_apps.edge.haproxy.keys import JwtKey
from serve_apps.edge.haproxy.limiting import Limits
from serve_apps.edge.haproxy.openapi import document
from serve_apps.edge.haproxy.routes import NO_ROLLOUT, Backend, Routes
from serve_apps.edge.haproxy.token_checks import VERIFIED_TOKENS, token_checks
from serve_apps.replica.edge_headers import (
    ARM,
    ARRIVED,
    PREFIX,
    PROOF,
    PROOF_VARIABLE,
    REQUEST_ID,
    ROLLOUT,
    UNIT_HASH,
    VARIANT,
)
from serve_apps.rollout.assignment import CHAMPION_VARIANT

OUTCOMES_APP, FEATURES_APP = "outcomes", "features"
_FEATURES = "/v1/features:read /v1/features:push"
_LIVE = '{"live":true}'
_HOP_BY_HOP = ("upgrade", "keep-alive", "proxy-connection", "te", "trailer", "http2-settings")
"""Headers for the next hop alone (RFC 9110, 7.6.1); HAProxy keeps `Connection` by itself. Behind us only Ray's dashboard
speaks anything but plain HTTP."""
_SERVER = json.dumps(
    {"name": "falaj", "version": metadata.version("falaj"), "extensions": ["binary_tensor_data"]}
)
ANSWER_MS = 30_000
_MAX_SUBJECT_BYTES = 4 * MAX_TEXT
MODEL_NAME = "[A-Za-z0-9._-]{1,200}"
_IS_READY = "{ path /v2/health/ready }"


def edge_roles() -> Mapping[Action, frozenset[Role]]:
    """Who may do what the edge tells apart by path, as the policies have it."""
    policy = Policy.load()
    return {action: policy.roles_for(action) for action in EDGE_ACTIONS}


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSettings:
    """Where the edge listens and where its files are."""

    bind: str
    metrics_bind: str
    certificate: str
    dashboard: str
    """Address of Ray's dashboard."""
    tokens: TokenRules
    """What the edge checks of them; replicas check the rest."""
    map_file: str
    error_folder: str
    admin_socket: str
    limits: Limits
    max_body_bytes: int
    threads: int
    max_connections: int
    max_connections_of_one_address: int
    wake_timeout_s: float
    """How long a request for a version that was scaled to zero, or a champion without a replica, waits for one."""
    holder: str = ""
    """Address of Serve's proxy, which holds such a champion's requests; empty where they are refused instead."""
    role_claim: str = "role"
    tenant_claim: str = "tenant"
    scope_claim: str = "scope"
    tenant: str = "default"
    """Of all that is behind the edge; whoever says that he is of another one is let nowhere."""
    roles: Mapping[Action, frozenset[Role]] = field(default_factory=edge_roles)
    """Compiled from the policies when the edge starts."""
    hang_ms: int
    """A treatment's replica that answers no health check for so long hangs; see `fallback`."""

    @property
    def again_socket(self) -> str:
        """Where treated requests come in again."""
        return str(Path(self.admin_socket).with_name("again.sock"))


def render(routes: Routes, keys: Sequence[JwtKey], settings: EdgeSettings) -> str:
    """The whole configuration.

    Args:
        routes: what is served, and how it is split.
        keys: the issuer's; without any, every token is refused.
        settings: where everything is.
    """
    asleep = any(backend.asleep and backend.name in routes.champions for backend in routes.backends)
    parts = [
        _global(settings),
        _defaults(settings),
        limiting.tables(settings.limits),
        strangers.table(),
        connections.tables(),
        _frontend(routes, keys, settings),
        _metrics(settings),
        dashboard.backend(settings.dashboard),
        VERIFIED_TOKENS,
        *_applications(routes, settings),
        backends.readiness(routes),
        fallback.frontend(map_file=settings.map_file, socket=settings.again_socket),
        *(
            _treated(backend, settings, asleep=asleep)
            for backend in routes.backends
            if backend.name not in (OUTCOMES_APP, FEATURES_APP)
        ),
    ]
    return "\n".join(parts)


def _global(settings: EdgeSettings) -> str:
    return f"""global
    log stdout len 4096 format raw local0 {strangers.LEVEL}
    localpeer edge
    nbthread {settings.threads}
    maxconn {settings.max_connections}
    hard-stop-after 1h
{connections.tuning()}
    stats socket {settings.admin_socket} mode 600 level admin expose-fd listeners
    ssl-default-bind-options ssl-min-ver TLSv1.3
    tune.ssl.default-dh-param 2048
"""


def _defaults(settings: EdgeSettings) -> str:
    files = "\n".join(
        f"    errorfile {status} {settings.error_folder}/{status}.http" for status in ERROR_STATUSES
    )
    return f"""http-errors json
{files}

defaults
    mode http
    errorfiles json
    timeout connect 2s
    timeout check 3s
    timeout client 30s
    timeout server {ANSWER_MS}ms
    timeout queue 5s
    timeout http-request 10s
    timeout http-keep-alive 60s
    option idle-close-on-response
    option redispatch 1
    retries 3
    retry-on conn-failure empty-response response-timeout
"""


def _frontend(routes: Routes, keys: Sequence[JwtKey], settings: EdgeSettings) -> str:
    return f"""frontend edge
    bind {settings.bind} ssl crt {settings.certificate} alpn h2,http/1.1
    log global
    log-format '{_LOG_FORMAT}'
    unique-id-format %[uuid()]
{connections.rules(settings.max_connections_of_one_address)}
{strangers.rules()}
    http-request del-header {PREFIX} -m beg
{_health()}
    {refuse(400, "Give one Authorization header.")} if {{ req.fhdr_cnt(authorization) gt 1 }}
    http-request set-var(txn.token) http_auth_bearer
{dashboard.entrance()}
{_classify()}
{token_checks(keys, settings.tokens, role_claim=settings.role_claim, tenant_claim=settings.tenant_claim)}
    {refuse(401, "The token's subject is too long.")} hdr WWW-Authenticate "Bearer" if {{ var(txn.claims),json_query('$.sub') -m len gt {_MAX_SUBJECT_BYTES} }}
    http-request set-var(txn.principal) var(txn.claims),json_query('$.sub')
{strangers.known()}
{_authorise(settings)}
{scopes.rules(claim=settings.scope_claim)}
{dashboard.passage()}
{limiting.rules(settings.limits, tenant=settings.tenant)}
{connections.stated_length(settings.max_body_bytes)}
{connections.body()}
    {say(_SERVER)} if {{ path /v2 }}
    {say(json.dumps(document(), separators=(",", ":")))} if {{ path /openapi.json }}
{_route(settings)}
    http-response set-var(txn.prediction_id) res.hdr(x-falaj-prediction-id)
    http-response del-header server
{fallback.recorded()}
{backends.only_json()}
    use_backend {backends.READINESS} if {_IS_READY}
    use_backend %[var(txn.treatment)]{fallback.SUFFIX} if treated treatable
    use_backend %[var(txn.backend)]
"""


def _health() -> str:
    return f"""    {refuse(405, "This path takes GET.")} hdr allow GET if {{ path_beg /v2/health/ }} !METH_GET
    {say(_LIVE)} if {{ path /v2/health/live }}
    http-request allow if {_IS_READY}"""


def _classify() -> str:
    version = f"(/versions/{MODEL_NAME})?"
    predict = f"^/v1/models/{MODEL_NAME}:predict$"
    infer = f"^/v2/models/{MODEL_NAME}{version}/infer$"
    described = f"^/v2/models/{MODEL_NAME}{version}(/ready)?$"
    return f"""    http-request replace-path '^(/v1/[^%]*)%3[Aa]([a-z]+)$' '\\1:\\2' if {{ path_sub -i %3a }}
    http-request set-var(txn.action) str({Action.predict}) if {{ path_reg {predict} }} or {{ path_reg {infer} }}
    http-request set-var(txn.action) str({Action.read_metadata}) if {{ path_reg {described} }} or {{ path /v2 /openapi.json }}
    http-request set-var(txn.action) str({Action.write_outcome}) if {{ path /v1/outcomes }}
    http-request set-var(txn.action) str({Action.read_online}) if {{ path /v1/features:read }}
    http-request set-var(txn.action) str({Action.push_features}) if {{ path /v1/features:push }}
    {refuse(404, "No such path.")} unless {{ var(txn.action) -m found }}
    acl reads var(txn.action) -m str {Action.read_metadata}
    {refuse(405, "This path takes POST.")} hdr allow POST if !reads !dashboard !METH_POST
    {refuse(405, "This path takes GET.")} hdr allow GET if reads !METH_GET
    http-request set-var(txn.model) path,field(4,/),field(1,:) if {{ path_beg /v1/models/ /v2/models/ }}"""


def _authorise(settings: EdgeSettings) -> str:
    # Behind the edge the policies are asked for the tenant, too, but neither Ray's dashboard nor GET /v2 asks anybody.
    # A tenant that is no text, which HAProxy reads as none, is for replicas to refuse; none stands before the dashboard.
    message = "Your tenant is not the one that this installation is for."
    stated = f"{{ var(txn.claims) -m sub -- '\"{settings.tenant_claim}\"' }}"
    lines = [
        "    acl of_a_tenant var(txn.tenant) -m found",
        f"    {refuse(403, message)} if of_a_tenant !{{ var(txn.tenant) -m str -- {settings.tenant} }}",
        f"    {refuse(403, message)} if dashboard !of_a_tenant {stated}",
    ]
    for action, roles in settings.roles.items():
        names = " ".join(sorted(roles))
        message = f"Your role may not {action.value.replace('_', ' ')}."
        refusal = f"{refuse(403, message)}"
        lines.append(
            f"    {refusal} if {{ var(txn.action) -m str {action} }} !{{ var(txn.role) -m str {names} }}"
        )
    return "\n".join(lines)


def _route(settings: EdgeSettings) -> str:
    """The split: arm by bucket, backend by arm, the champion where the treatment has no healthy replica."""
    return f"""    acl by_model var(txn.model) -m found
    http-request set-var(txn.route) var(txn.model),map_str({settings.map_file}) if by_model
    {refuse(404, "No such model is deployed.")} if by_model !{{ var(txn.route) -m found }}
    http-request set-var(txn.backend) str({OUTCOMES_APP}) if {{ path /v1/outcomes }}
    http-request set-var(txn.backend) str({FEATURES_APP}) if {{ path {_FEATURES} }}
    http-request set-var(txn.backend) var(txn.route),field(1,|) if by_model
    http-request set-var(txn.variant) str({CHAMPION_VARIANT}) if by_model
    http-request set-var(txn.rollout) var(txn.route),field(4,|) if by_model
    http-request set-var(txn.salt) var(txn.route),field(5,|) if by_model
    http-request set-var(txn.below) var(txn.route),field(6,|) if by_model
    http-request set-var(txn.from) var(txn.route),field(7,|) if by_model
    {refuse(400, "Give one X-Unit-ID header.")} if by_model {{ req.fhdr_cnt(x-unit-id) gt 1 }}
    http-request set-var(txn.unit) req.fhdr(x-unit-id) if by_model
    acl has_unit var(txn.unit) -m len gt 0
    http-request set-var(txn.arm) str(none) if by_model
    http-request set-var(txn.arm) str(outside) if has_unit
    http-request set-var(txn.unit_hash) var(txn.unit),sha2(256),hex,bytes(0,16) if has_unit
    http-request set-var(txn.bucket) var(txn.salt),concat(:,txn.unit),xxh32(0),mod(10000) if has_unit
    http-request set-var(txn.arm) str(treatment) if has_unit {{ var(txn.bucket),sub(txn.below) -m int lt 0 }}
    http-request set-var(txn.arm) str(control) if has_unit !{{ var(txn.bucket),sub(txn.from) -m int lt 0 }}
    acl treated var(txn.arm) -m str treatment
    http-request set-var(txn.treatment) var(txn.route),field(2,|) if treated
    acl treatable var(txn.treatment),nbsrv -m int gt 0
    http-request set-var(txn.backend) var(txn.treatment) if treated treatable
    http-request set-var(txn.variant) var(txn.route),field(3,|) if treated treatable
    http-request set-var(txn.fallback) bool(true) if treated !treatable
    {refuse(503, "No healthy replica; try again.")} unless {{ var(txn.backend),nbsrv -m int gt 0 }}
{_told()}
    http-request set-path /%[var(txn.backend)]%[path]"""


def _told() -> str:
    """Rules that tell a replica who asks and how; each header on every request, so that no trailer can stand in for one
    that is missing."""
    values = {
        PROOF: f"${{{PROOF_VARIABLE}}}",
        REQUEST_ID: "%[unique-id]",
        ARRIVED: "%[date(0,us)]",
        VARIANT: "%[var(txn.variant)]",
        ARM: "%[var(txn.arm)]",
        ROLLOUT: "%[var(txn.of_rollout)]",
        UNIT_HASH: "%[var(txn.unit_hash)]",
    }
    lines = [
        *(f"    http-request del-header {name}" for name in _HOP_BY_HOP),
        f"    http-request set-var(txn.of_rollout) var(txn.rollout) unless {{ var(txn.rollout) -m str {NO_ROLLOUT} }}",
        *(f'    http-request set-header {name} "{value}"' for name, value in values.items()),
    ]
    return "\n".join(lines)


def _metrics(settings: EdgeSettings) -> str:
    return f"""frontend metrics
    bind {settings.metrics_bind}
    http-request use-service prometheus-exporter if {{ path /metrics }}
    {refuse(404, "Metrics are at /metrics.")}
"""


def _applications(routes: Routes, settings: EdgeSettings) -> list[str]:
    """The backends that are not the treatment's; of what nobody stands in for also where there is no replica."""
    held = {*routes.champions, OUTCOMES_APP, FEATURES_APP} if settings.holder else set()
    missing = sorted(held - {one.name for one in routes.backends})
    return [
        backends.backend(
            one,
            holder=settings.holder if one.name in held else "",
            wake_timeout_s=settings.wake_timeout_s,
        )
        for one in (*routes.backends, *(Backend(name, ()) for name in missing))
    ]


def _treated(backend: Backend, settings: EdgeSettings, *, asleep: bool) -> str:
    if backend.asleep:
        name = f"{backend.name}{fallback.SUFFIX}"
        return backends.waking_backend(name, backend.servers, timeout_s=settings.wake_timeout_s)
    return fallback.treated(
        backend,
        socket=settings.again_socket,
        hang_ms=settings.hang_ms,
        champion_ms=round(settings.wake_timeout_s * 1000) if asleep else ANSWER_MS,
        asleep=asleep,
    )


_FIELDS = {
    "time": "%Ts.%ms",
    "request_id": '"%ID"',
    "model": '"%[var(txn.model),json(utf8s)]"',
    "action": '"%[var(txn.action)]"',
    "principal": '"%[var(txn.principal),bytes(0,400),json(utf8s)]"',
    "path": '"%[var(txn.path),bytes(0,300),json(utf8s)]"',
    "rollout": '"%[var(txn.rollout)]"',
    "arm": '"%[var(txn.arm)]"',
    "variant": '"%[var(txn.variant)]"',
    "fallback": '"%[var(txn.fallback)]"',
    "unit_hash": '"%[var(txn.unit_hash)]"',
    "status": "%ST",
    "latency_ms": "%Ta",
    "prediction_id": '"%[var(txn.prediction_id),json(utf8s)]"',
    "termination": '"%ts"',
}
_LOG_FORMAT = "{" + ",".join(f'"{name}":{value}' for name, value in _FIELDS.items()) + "}"
"""HAProxy cuts a record at 4,096 bytes, so what a client chooses is bounded: a byte may become six, as `\\u0001` is."""
