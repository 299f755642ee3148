"""Build HAProxy's configuration: a pure function from routes, keys and settings to text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from cluster.node.edge_leaving import LEAVING
from cluster.security.authorization.policy import EDGE_ACTIONS, Action, Policy
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import MAX_TEXT, TokenRules
from serve_apps.edge.haproxy import (
    backends,
    connections,
    dashboard,
    fallback,
    request_limits,
    scopes,
    services,
    split,
    unauthenticated,
)
from serve_apps.edge.haproxy.access_log import LOG_FORMAT
from serve_apps.edge.haproxy.answers import ERROR_STATUSES, answer_json, refuse
from serve_apps.edge.haproxy.keys import JwtKey
from serve_apps.edge.haproxy.request_limits import Limits
from serve_apps.edge.haproxy.routes import Backend, Routes
from serve_apps.edge.haproxy.split import FEATURES_APP, OUTCOMES_APP
from serve_apps.edge.haproxy.token_checks import VERIFIED_TOKENS, token_checks
from serve_apps.edge.openapi.document import document
from serve_apps.replica.edge_headers import PREFIX
from serve_apps.replica.http_contract import PREDICTION_ID_HEADER, TRY_ANOTHER

_LIVE = '{"live":true}'
_SERVER = json.dumps(
    {"name": "falaj", "version": metadata.version("falaj"), "extensions": ["binary_tensor_data"]}
)
ANSWER_MS = 30_000
"""Timeout of a replica's answer."""
_MAX_SUBJECT_BYTES = 4 * MAX_TEXT
MODEL_NAME = "[A-Za-z0-9._-]{1,200}"
_IS_READY = "{ path /v2/health/ready }"


def edge_roles() -> Mapping[Action, frozenset[Role]]:
    """For each action that the edge derives from a path, return the roles that the policies allow."""
    policy = Policy.load()
    return {action: policy.roles_for(action) for action in EDGE_ACTIONS}


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSettings:
    """Addresses, files and limits of the edge."""

    bind: str
    metrics_bind: str
    certificate: str
    """PEM file with certificate and private key."""
    authority_folder: str
    """Folder with the certificate of the nodes' authority; it verifies replicas that are not on loopback."""
    dashboard: str
    """Address of Ray's dashboard."""
    jobs_socket: str
    """Socket of the service for submitted jobs."""
    rollouts_socket: str
    """Socket of this machine's controller of rollouts."""
    tokens: TokenRules
    """What the edge requires of a token."""
    map_file: str
    error_folder: str
    admin_socket: str
    limits: Limits
    max_body_bytes: int
    threads: int
    max_connections: int
    max_connections_of_one_address: int
    wake_timeout_s: float
    """How long a request waits for a replica, if a version is scaled to zero or a champion has no replica."""
    serve_proxy: str = ""
    """Address of Serve's proxy, which holds requests for champions without a replica. If empty, these are refused."""
    role_claim: str = "role"
    tenant_claim: str = "tenant"
    scope_claim: str = "scope"
    tenant: str = "default"
    """Tenant of this installation. Requests with another tenant's token get 403."""
    roles: Mapping[Action, frozenset[Role]] = field(default_factory=edge_roles)
    """The roles that are allowed for each action. They are read from the policies when the edge starts."""
    hang_ms: int
    """If a treatment's replica does not answer a health check for this long, it counts as hanging; see `fallback`."""

    @property
    def fallback_socket(self) -> str:
        """Socket to which HAProxy sends a treated request again, so that the champion answers it."""
        return str(Path(self.admin_socket).with_name("again.sock"))


def render(routes: Routes, keys: Sequence[JwtKey], settings: EdgeSettings) -> str:
    """Return the whole configuration.

    Args:
        routes: the models and their replicas, and how traffic is split.
        keys: the issuer's keys. If there are none, every token is refused.
        settings: addresses, files and limits.
    """
    parts = [
        _global(settings),
        _defaults(settings),
        request_limits.tables(settings.limits),
        unauthenticated.table(),
        connections.tables(),
        _frontend(keys, settings),
        _metrics(settings),
        dashboard.backend(settings.dashboard),
        services.backends(jobs_socket=settings.jobs_socket, rollouts_socket=settings.rollouts_socket),
        VERIFIED_TOKENS,
        *_plain_backends(routes, settings),
        backends.readiness(routes),
        fallback.frontend(map_file=settings.map_file, socket=settings.fallback_socket),
        *_treated_backends(routes, settings),
    ]
    return "\n".join(parts)


def _global(settings: EdgeSettings) -> str:
    """Process limits, the admin socket, TLS and the log level. Only access records have a level that is logged."""
    return f"""global
    log stdout len 4096 format raw local0 {unauthenticated.LOG_LEVEL}
    localpeer edge
    nbthread {settings.threads}
    maxconn {settings.max_connections}
    hard-stop-after 1h
{connections.tuning()}
    stats socket {settings.admin_socket} mode 600 level admin expose-fd listeners
    ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-server-options ssl-min-ver TLSv1.3
    ca-base {settings.authority_folder}
    set-var {LEAVING} bool(false)
    tune.ssl.default-dh-param 2048
"""


def _defaults(settings: EdgeSettings) -> str:
    """Timeouts, retries and JSON error files. A request is sent again if its replica fails before it answers."""
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
    retry-on conn-failure empty-response response-timeout {TRY_ANOTHER}
"""


def _frontend(keys: Sequence[JwtKey], settings: EdgeSettings) -> str:
    """The public frontend. HAProxy evaluates its rules in this order."""
    return "\n".join(
        (
            _listener(settings),
            _health(),
            _bearer_token(),
            _actions(),
            _authentication(keys, settings),
            _authorization(settings),
            scopes.rules(claim=settings.scope_claim),
            dashboard.forwarding_rules(),
            request_limits.rules(settings.limits, tenant=settings.tenant),
            connections.check_length(settings.max_body_bytes),
            connections.wait_for_body(),
            services.forwarding_rules(),
            _descriptions(),
            split.rules(map_file=settings.map_file),
            _responses(),
            _use_backend(),
        )
    )


def _listener(settings: EdgeSettings) -> str:
    """The port, the access log, the counters, and a rule that removes the edge's own headers from clients' requests."""
    return f"""frontend edge
    bind {settings.bind} ssl crt {settings.certificate} alpn h2,http/1.1
    log global
    log-format '{LOG_FORMAT}'
    unique-id-format %[uuid()]
{connections.rules(settings.max_connections_of_one_address)}
{unauthenticated.rules()}
    http-request del-header {PREFIX} -m beg"""


def _health() -> str:
    """Health paths, which need no token."""
    return f"""    {refuse(405, "This path takes GET.")} hdr allow GET if {{ path_beg /v2/health/ }} !METH_GET
    {answer_json(_LIVE)} if {{ path /v2/health/live }}
    {refuse(503, "This edge is leaving.")} if {_IS_READY} {{ var({LEAVING}) -m bool }}
    http-request allow if {_IS_READY}"""


def _bearer_token() -> str:
    """Read the token from the Authorization header, or from the dashboard's login form or cookie."""
    return f"""    {refuse(400, "Send only one Authorization header.")} if {{ req.fhdr_cnt(authorization) gt 1 }}
    http-request set-var(txn.token) http_auth_bearer
{dashboard.login_rules()}"""


def _actions() -> str:
    """Set the action and the model from the path, and refuse unknown paths and wrong methods."""
    version = f"(/versions/{MODEL_NAME})?"
    predict = f"^/v1/models/{MODEL_NAME}:predict$"
    infer = f"^/v2/models/{MODEL_NAME}{version}/infer$"
    model_metadata = f"^/v2/models/{MODEL_NAME}{version}(/ready)?$"
    return f"""    http-request replace-path '^(/v1/[^%]*)%3[Aa]([a-z]+)$' '\\1:\\2' if {{ path_sub -i %3a }}
    http-request set-var(txn.action) str({Action.predict}) if {{ path_reg {predict} }} or {{ path_reg {infer} }}
    http-request set-var(txn.action) str({Action.read_metadata}) if {{ path_reg {model_metadata} }} or {{ path /v2 /openapi.json }}
    http-request set-var(txn.action) str({Action.write_outcome}) if {{ path /v1/outcomes }}
    http-request set-var(txn.action) str({Action.read_online}) if {{ path /v1/features:read }}
    http-request set-var(txn.action) str({Action.push_features}) if {{ path /v1/features:push }}
{services.paths(model_name=MODEL_NAME)}
    {refuse(404, "No such path.")} unless {{ var(txn.action) -m found }}
    acl reads var(txn.action) -m str {Action.read_metadata}
    {refuse(405, "This path takes POST.")} hdr allow POST if !reads !dashboard !jobs !rollouts !METH_POST
    {refuse(405, "This path takes GET.")} hdr allow GET if reads !METH_GET
    http-request set-var(txn.model) path,field(4,/),field(1,:) if {{ path_beg /v1/models/ /v2/models/ /v1/rollouts/ }}"""


def _authentication(keys: Sequence[JwtKey], settings: EdgeSettings) -> str:
    """Verify the token and set the principal. A request that passes these rules gets an access record."""
    checks = token_checks(
        keys, settings.tokens, role_claim=settings.role_claim, tenant_claim=settings.tenant_claim
    )
    too_long = f"{{ var(txn.claims),json_query('$.sub') -m len gt {_MAX_SUBJECT_BYTES} }}"
    return f"""{checks}
    {refuse(401, "The token's subject is too long.")} hdr WWW-Authenticate "Bearer" if {too_long}
    http-request set-var(txn.principal) var(txn.claims),json_query('$.sub')
{unauthenticated.log_authenticated()}"""


def _authorization(settings: EdgeSettings) -> str:
    """Refuse other tenants' tokens, and roles that the policies do not allow for the action.

    Replicas check the tenant with the policies, too, but Ray's dashboard and GET /v2 do not. If a token's tenant is not
    text, HAProxy reads it as missing. Replicas refuse such a token. The dashboard does not, so for the dashboard the
    edge refuses it.
    """
    message = "Your token is for another tenant than this installation."
    claimed = f"{{ var(txn.claims) -m sub -- '\"{settings.tenant_claim}\"' }}"
    lines = [
        "    acl of_a_tenant var(txn.tenant) -m found",
        f"    {refuse(403, message)} if of_a_tenant !{{ var(txn.tenant) -m str -- {settings.tenant} }}",
        f"    {refuse(403, message)} if dashboard !of_a_tenant {claimed}",
    ]
    for action, roles in settings.roles.items():
        names = " ".join(sorted(roles))
        refusal = refuse(403, f"Your role may not {action.value.replace('_', ' ')}.")
        lines.append(
            f"    {refusal} if {{ var(txn.action) -m str {action} }} !{{ var(txn.role) -m str {names} }}"
        )
    return "\n".join(lines)


def _descriptions() -> str:
    """Rules that answer two paths without a replica: the server's metadata and the OpenAPI document."""
    return f"""    {answer_json(_SERVER)} if {{ path /v2 }}
    {answer_json(json.dumps(document(), separators=(",", ":")))} if {{ path /openapi.json }}"""


def _responses() -> str:
    """Rules for a replica's answer: copy values into the access record, and make every error JSON."""
    return f"""    http-response set-var(txn.prediction_id) res.hdr({PREDICTION_ID_HEADER})
    http-response del-header server
{fallback.record_fallback()}
{backends.json_errors_only()}"""


def _use_backend() -> str:
    """Choose the backend. Treated requests are sent to the strict backend, from which the champion can take over."""
    return f"""    use_backend {backends.READINESS} if {_IS_READY}
    use_backend %[var(txn.treatment)]{fallback.SUFFIX} if treated treatable
    use_backend %[var(txn.backend)]
"""


def _metrics(settings: EdgeSettings) -> str:
    """The frontend of HAProxy's own Prometheus metrics."""
    return f"""frontend metrics
    bind {settings.metrics_bind}
    http-request use-service prometheus-exporter if {{ path /metrics }}
    {refuse(404, "Metrics are at /metrics.")}
"""


def _plain_backends(routes: Routes, settings: EdgeSettings) -> list[str]:
    """The backends of all applications, for requests that are not treated.

    Champions, `outcomes` and `features` have no fallback. So each of them always has a backend. While it has no
    replica, its requests wait there.
    """
    waiting = {*routes.champions, OUTCOMES_APP, FEATURES_APP} if settings.serve_proxy else set()
    missing = sorted(waiting - {backend.name for backend in routes.backends})
    return [
        backends.backend(
            application,
            serve_proxy=settings.serve_proxy if application.name in waiting else "",
            wake_timeout_s=settings.wake_timeout_s,
        )
        for application in (*routes.backends, *(Backend(name, ()) for name in missing))
    ]


def _treated_backends(routes: Routes, settings: EdgeSettings) -> list[str]:
    """The backends of treated requests, one for each model version."""
    any_champion_at_zero = any(
        backend.scaled_to_zero and backend.name in routes.champions for backend in routes.backends
    )
    return [
        _treated_backend(backend, settings, champion_scaled_to_zero=any_champion_at_zero)
        for backend in routes.backends
        if backend.name not in (OUTCOMES_APP, FEATURES_APP)
    ]


def _treated_backend(backend: Backend, settings: EdgeSettings, *, champion_scaled_to_zero: bool) -> str:
    if backend.scaled_to_zero:
        name = f"{backend.name}{fallback.SUFFIX}"
        return backends.scaled_to_zero_backend(name, backend.servers, timeout_s=settings.wake_timeout_s)
    return fallback.treated_backend(
        backend,
        socket=settings.fallback_socket,
        hang_ms=settings.hang_ms,
        champion_ms=round(settings.wake_timeout_s * 1000) if champion_scaled_to_zero else ANSWER_MS,
        champion_scaled_to_zero=champion_scaled_to_zero,
    )
