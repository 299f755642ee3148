"""Ray's dashboard and its job API under `/ray/`, for principals who may manage the cluster.

A user of the dashboard can run code as the cluster's user. A program sends its token in the Authorization header. A
browser sends the token once to `/ray/login`. The answer stores it in a cookie that scripts cannot read. SameSite
protects the cookie from other sites. Other ports of this host count as the same site, so the edge also checks
`Sec-Fetch-Site`. Web sockets do not send `Sec-Fetch-Site`, so for them the edge checks `Origin`.

When the edge sends a request to Ray, it adds Ray's own token. The token is in a header that Ray's login does not read,
because Ray's login would send the token to the browser in a cookie. The token is in HAProxy's environment, not in its
configuration file.
"""

from __future__ import annotations

from pathlib import Path

from cluster.security.authorization.policy import Action
from serve_apps.edge.haproxy import connections
from serve_apps.edge.haproxy.answers import refuse

BACKEND = "ray_dashboard"
TOKEN_VARIABLE = "FALAJ_RAY_TOKEN"  # noqa: S105 - the name of the variable
COOKIE = "__Secure-falaj-session"
LOGIN_PAGE = Path(__file__).with_name("login.html")
_COOKIE_FLAGS = "Path=/ray/; HttpOnly; Secure; SameSite=Strict"
_PAGE_HEADERS = (
    "hdr cache-control no-store hdr content-security-policy "
    "\"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'\""
)


def login_rules() -> str:
    """Return rules that recognise the dashboard's paths, and read a browser's token from its login or cookie."""
    return "\n".join((_dashboard_paths(), _login_pages(), _browser_token(), _same_site()))


def forwarding_rules() -> str:
    """Return rules for an authorised request. A login stores the token; any other request is sent to Ray.

    No later rule is evaluated for these requests.
    """
    cookie = f"{COOKIE}=%[var(txn.token)]; Max-Age=%[var(txn.exp),sub(txn.now)]; {_COOKIE_FLAGS}"
    return f"""    http-request return status 303 hdr location /ray/ hdr cache-control no-store hdr set-cookie "{cookie}" if {{ path /ray/login }}
    http-request set-var(txn.backend) str({BACKEND}) if dashboard
    http-request del-header cookie if dashboard
    http-request del-header authorization if dashboard
    http-request set-header x-ray-authorization "Bearer ${{{TOKEN_VARIABLE}}}" if dashboard
    http-request set-path %[path,regsub(^/ray,)] if dashboard
    http-request allow if dashboard"""


def backend(address: str) -> str:
    """Return the backend of Ray's dashboard. It never sends a request again, because a job might be submitted twice."""
    return f"""backend {BACKEND}
    retries 0
    timeout server 10m
    timeout tunnel 1h
    http-response del-header set-cookie
    server dashboard {address}
"""


def _dashboard_paths() -> str:
    """For requests under `/ray/`, set the action, and put the path into the access record."""
    return f"""    http-request redirect code 308 location /ray/ if {{ path /ray }}
    http-request set-var(txn.action) str({Action.manage_cluster}) if {{ path_beg /ray/ }}
    acl dashboard var(txn.action) -m str {Action.manage_cluster}
    acl browser var(txn.browser) -m found
    http-request set-var(txn.path) path if dashboard"""


def _login_pages() -> str:
    """Answer requests for the login form and for the logout, which deletes the cookie. Neither needs a token."""
    return f"""    http-request return status 200 content-type text/html file {LOGIN_PAGE} {_PAGE_HEADERS} if {{ path /ray/login }} METH_GET
    http-request return status 303 hdr location /ray/login hdr set-cookie "{COOKIE}=; Max-Age=0; {_COOKIE_FLAGS}" if {{ path /ray/logout }}"""


def _browser_token() -> str:
    """Read a browser's token: from the login form, or from the cookie if there is no Authorization header."""
    return f"""    http-request set-var(txn.browser) bool(true) if {{ path /ray/login }} METH_POST
{connections.wait_for_login_body("browser")}
    http-request set-var(txn.token) req.body_param(token) if browser
    http-request set-var(txn.browser) bool(true) if dashboard !browser !{{ var(txn.token) -m found }} {{ req.cook({COOKIE}) -m found }}
    http-request set-var(txn.token) req.cook({COOKIE}) if browser !{{ var(txn.token) -m found }}"""


def _same_site() -> str:
    """Refuse a browser's request from another site or port. Redirect a browser without a token to the login."""
    return f"""    http-request set-var-fmt(txn.own_origin) https://%[req.hdr(host)] if browser
    acl own_page req.fhdr(sec-fetch-site) -m str same-origin none
    acl own_page req.fhdr(origin),strcmp(txn.own_origin) eq 0
    {refuse(403, "This request came from another site. Open the dashboard directly.")} if browser !own_page
    http-request redirect code 303 location /ray/login if dashboard !{{ var(txn.token) -m found }} {{ req.fhdr(sec-fetch-mode) -m str navigate }}"""
