"""Access to Ray's dashboard through a real HAProxy, with a header or with a browser's session."""

from __future__ import annotations

import http.client
import urllib.parse
from pathlib import Path

import pytest

from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from serve_apps.edge.haproxy.dashboard import COOKIE
from tests.servers.edge import PREDICT, RAY_TOKEN, Edge
from tests.servers.polling import wait_until

SAME_SITE = {"sec-fetch-site": "same-origin"}


def browse(
    edge: Edge, path: str, *, method: str = "GET", headers: dict[str, str] | None = None, body: str = ""
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send a request as a browser does, and return the whole answer."""
    connection = edge.connect()
    connection.request(method, path, body=body or None, headers=headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def sign_in(edge: Edge, token: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    form = {"content-type": "application/x-www-form-urlencoded", **SAME_SITE, **headers}
    body = urllib.parse.urlencode({"token": token})
    return browse(edge, "/ray/login", method="POST", headers=form, body=body)


@pytest.mark.parametrize("role", list(Role))
def test_only_roles_that_manage_the_cluster_reach_the_dashboard(edge: Edge, role: Role) -> None:
    """For every method: a submitted job runs as the cluster's user."""
    expected = 200 if role is Role.admin else 403
    for method, path in (("GET", "/ray/"), ("POST", "/ray/api/jobs/"), ("DELETE", "/ray/api/jobs/1?x=1")):
        assert edge.call(path, method=method, token=edge.token(role))[0] == expected


@pytest.mark.parametrize("tenant", ["other", "", "default ", "Default"])
@pytest.mark.parametrize("path", ["/ray/", "/ray/api/jobs/", "/v2", PREDICT])
def test_admin_of_another_tenant_gets_403_everywhere(edge: Edge, tenant: str, path: str) -> None:
    """The policies require this. The dashboard does not check the policies again."""
    method = "POST" if path == PREDICT else "GET"
    assert edge.call(path, method=method, token=edge.token(Role.admin, tenant=tenant))[0] == 403
    assert edge.call(path, method=method, token=edge.token(Role.admin))[0] == 200
    assert sign_in(edge, edge.token(Role.admin, tenant=tenant))[0].status == 403


@pytest.mark.parametrize("tenant", [None, "default", ["other"], {"of": "other"}, 7, True])
def test_dashboard_accepts_own_or_missing_tenant(edge: Edge, tenant: object) -> None:
    """HAProxy reads a tenant that is not text as missing; such a token is refused."""
    token = edge.token_with() if tenant is None else edge.token_with(tenant=tenant)
    expected = 200 if tenant in (None, "default") else 403
    assert edge.call("/ray/", method="GET", token=token)[0] == expected


@pytest.mark.parametrize("scope", ["model:m", "openid model:m", ["model:m"], ["openid", "model:x"]])
def test_token_for_single_models_does_not_open_the_dashboard(edge: Edge, scope: object) -> None:
    """The dashboard controls all models. Other words of a scope have no effect."""
    for claimed, expected in ((scope, 403), ("openid profile", 200), ("", 200)):
        token = edge.token_with(scope=claimed)
        assert edge.call("/ray/", method="GET", token=token)[0] == expected
        assert sign_in(edge, token)[0].status == (403 if expected == 403 else 303)


def test_dashboard_needs_a_token(edge: Edge) -> None:
    """A program gets 401; a browser is redirected to the login."""
    assert edge.call("/ray/", method="GET")[0] == 401
    assert edge.call("/ray/api/version", method="GET", token="a.b.c")[0] == 401
    assert edge.call("/ray/login", method="PUT")[0] == 401
    response, _ = browse(edge, "/ray/", headers={"sec-fetch-mode": "navigate", "sec-fetch-site": "none"})
    assert (response.status, response.getheader("location")) == (303, "/ray/login")
    assert browse(edge, "/ray")[0].getheader("location") == "/ray/"


@pytest.mark.parametrize("path", ["/RAY/", "//ray/", "/rayx/", "/v1/../ray/", "/%72ay/", "/api/jobs/"])
def test_other_spellings_of_the_path_are_404(edge: Edge, path: str) -> None:
    """This is true even for an admin."""
    assert edge.call(path, method="GET", token=edge.token(Role.admin))[0] == 404


def test_ray_gets_its_own_token_and_not_the_callers(edge: Edge) -> None:
    """Ray's token is not in the file, and Ray's own login, which reads another header, does not return it."""
    session = {"cookie": f"{COOKIE}=x; ray-authentication-token=stolen"}
    status, echo = edge.call("/ray/api/jobs/?a=b", token=edge.token(Role.admin), headers=session)
    assert status == 200
    assert echo["path"] == "/api/jobs/?a=b"
    assert echo["x-ray-authorization"] == f"Bearer {RAY_TOKEN}"
    assert not {"authorization", "cookie"} & echo.keys()
    forged = {"x-ray-authorization": "Bearer mine"}
    assert (
        edge.call("/ray/", token=edge.token(Role.admin), headers=forged)[1]["x-ray-authorization"]
        == echo["x-ray-authorization"]
    )
    assert RAY_TOKEN not in (Path(edge.settings.map_file).parent / "haproxy.cfg").read_text()


def test_cookies_of_ray_are_dropped(edge: Edge) -> None:
    """Ray's login would return its token in one."""
    headers = {"cookie": f"{COOKIE}={edge.token(Role.admin)}", **SAME_SITE}
    response, _ = browse(edge, "/ray/api/authenticate", headers=headers)
    assert (response.status, response.getheader("set-cookie")) == (200, None)


def test_browser_session_ends_with_its_token(edge: Edge) -> None:
    """Scripts, plain HTTP, other sites and other paths cannot use the cookie."""
    page, content = browse(edge, "/ray/login")
    assert page.status == 200
    assert b'name="token"' in content
    assert "form-action 'self'" in str(page.getheader("content-security-policy"))
    token = edge.token(Role.admin, ttl_s=600)
    response, _ = sign_in(edge, token)
    cookie, *flags = str(response.getheader("set-cookie")).split("; ")
    assert (response.status, response.getheader("location")) == (303, "/ray/")
    assert cookie == f"{COOKIE}={token}"
    assert {"HttpOnly", "Secure", "SameSite=Strict", "Path=/ray/"} < set(flags)
    age = next(int(flag.removeprefix("Max-Age=")) for flag in flags if flag.startswith("Max-Age="))
    assert 500 < age <= 600
    assert browse(edge, "/ray/api/version", headers={"cookie": cookie, **SAME_SITE})[0].status == 200
    expired = mint_token(edge.places, subject="t", role=Role.admin, purpose="", ttl_s=-5)
    assert browse(edge, "/ray/", headers={"cookie": f"{COOKIE}={expired}", **SAME_SITE})[0].status == 401
    left = browse(edge, "/ray/logout")[0]
    assert "Max-Age=0" in str(left.getheader("set-cookie"))


def test_session_is_valid_for_the_dashboard_only(edge: Edge) -> None:
    """Elsewhere only the header counts, so no page can make a browser predict."""
    cookie = {"cookie": f"{COOKIE}={edge.token(Role.admin)}", **SAME_SITE}
    assert edge.call(headers=dict(cookie))[0] == 401


@pytest.mark.parametrize("site", ["same-site", "cross-site", ""])
def test_other_sites_cannot_use_or_start_a_session(edge: Edge, site: str) -> None:
    """Another port of this host is the same site for SameSite; a browser without these headers is refused too."""
    token = edge.token(Role.admin)
    cookie = {"cookie": f"{COOKIE}={token}"}
    other_origin = f"https://127.0.0.1:{edge.port - 1}"
    for headers in (cookie | {"sec-fetch-site": site}, cookie | {"origin": other_origin}, cookie):
        for method in ("GET", "POST"):
            assert browse(edge, "/ray/api/jobs/", method=method, headers=headers)[0].status == 403
    assert sign_in(edge, token, **{"sec-fetch-site": site})[0].status == 403
    own = cookie | {"origin": f"https://127.0.0.1:{edge.port}"}
    assert browse(edge, "/ray/api/jobs/", headers=own)[0].status == 200, "as a web socket comes"


@pytest.mark.parametrize("token", ["", "a.b.c", "x" * 5000], ids=["none", "no token", "too long"])
def test_wrong_token_starts_no_session(edge: Edge, token: str) -> None:
    """A token of another role does not start a session, either."""
    for refused in (sign_in(edge, token), sign_in(edge, edge.token(Role.service))):
        assert refused[0].status in (401, 403)
        assert refused[0].getheader("set-cookie") is None


def test_access_records_name_the_principal(edge: Edge) -> None:
    """For dashboard requests, predictions and refused roles; the name is text, whatever it contains.

    Requests without a valid token have no record.
    """
    subject = 'é"\\\n{"status":200}'
    edge.call(token=edge.token() + "x")
    edge.call(token=edge.token_with(sub=subject, role="service"))
    edge.call("/ray/api/jobs/secret?token=x", token=edge.token(Role.admin))
    edge.call("/ray/refused", token=edge.token(Role.service))
    edge.call(token=edge.token())
    wait_until(lambda: [each["action"] for each in edge.records()][-1:] == ["predict"])
    records = edge.records()
    managed = [each for each in records if each["path"] == "/ray/api/jobs/secret"]
    assert {each["principal"] for each in managed} == {"t"}
    assert [(each["principal"], each["status"]) for each in records if each["path"] == "/ray/refused"] == [
        ("t", 403)
    ]
    predicted = [(each["principal"], each["status"]) for each in records if each["action"] == "predict"]
    assert predicted[-2:] == [(subject, 200), ("t", 200)]
    assert 401 not in {each["status"] for each in records}
