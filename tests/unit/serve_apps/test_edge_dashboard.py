"""Who reaches Ray's dashboard through a real HAProxy, with a header or with a browser's session."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from pathlib import Path

import pytest

from cluster.security.tokens.issuer import AUDIENCE, mint_token, sign
from cluster.security.tokens.roles import Role
from serve_apps.edge.haproxy.dashboard import COOKIE
from tests.edge import PREDICT, RAY_TOKEN, Edge

SAME_SITE = {"sec-fetch-site": "same-origin"}


def browse(
    edge: Edge, path: str, *, method: str = "GET", headers: dict[str, str] | None = None, body: str = ""
) -> tuple[http.client.HTTPResponse, bytes]:
    """A request as a browser sends it, and the whole answer."""
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
def test_only_who_may_manage_the_cluster_reaches_the_dashboard(edge: Edge, role: Role) -> None:
    """Whatever the method: a job that is submitted runs as the cluster's user."""
    expected = 200 if role is Role.admin else 403
    for method, path in (("GET", "/ray/"), ("POST", "/ray/api/jobs/"), ("DELETE", "/ray/api/jobs/1?x=1")):
        assert edge.call(path, method=method, token=edge.token(role))[0] == expected


@pytest.mark.parametrize("tenant", ["other", "", "default ", "Default"])
@pytest.mark.parametrize("path", ["/ray/", "/ray/api/jobs/", "/v2", PREDICT])
def test_an_admin_of_another_tenant_is_let_nowhere(edge: Edge, tenant: str, path: str) -> None:
    """As the policies have it; behind the dashboard nobody asks them again."""
    method = "POST" if path == PREDICT else "GET"
    assert edge.call(path, method=method, token=edge.token(Role.admin, tenant=tenant))[0] == 403
    assert edge.call(path, method=method, token=edge.token(Role.admin))[0] == 200
    assert sign_in(edge, edge.token(Role.admin, tenant=tenant))[0].status == 403


@pytest.mark.parametrize("tenant", [None, "default", ["other"], {"of": "other"}, 7, True])
def test_the_dashboard_lets_in_who_says_no_tenant_or_its_own(edge: Edge, tenant: object) -> None:
    """One that is no text cannot be told from none by HAProxy, and would be refused by everybody else."""
    claims = {"sub": "t", "role": "admin", "purpose": "", **({} if tenant is None else {"tenant": tenant})}
    token = sign(edge.places, claims, audience=AUDIENCE, token_type="JWT", ttl_s=60)  # type: ignore[arg-type]
    expected = 200 if tenant in (None, "default") else 403
    assert edge.call("/ray/", method="GET", token=token)[0] == expected


@pytest.mark.parametrize("scope", ["model:m", "openid model:m", ["model:m"], ["openid", "model:x"]])
def test_a_token_for_some_models_opens_no_dashboard(edge: Edge, scope: object) -> None:
    """Behind it there are all models. Other words of a scope are not ours."""
    claims = {"sub": "t", "role": "admin", "purpose": ""}
    for claimed, expected in ((scope, 403), ("openid profile", 200), ("", 200)):
        token = sign(edge.places, claims | {"scope": claimed}, audience=AUDIENCE, token_type="JWT", ttl_s=60)  # type: ignore[arg-type]
        assert edge.call("/ray/", method="GET", token=token)[0] == expected
        assert sign_in(edge, token)[0].status == (403 if expected == 403 else 303)


def test_without_a_token_nothing_is_shown(edge: Edge) -> None:
    """A program is told so; whoever navigates is led to where he can sign in."""
    assert edge.call("/ray/", method="GET")[0] == 401
    assert edge.call("/ray/api/version", method="GET", token="a.b.c")[0] == 401
    assert edge.call("/ray/login", method="PUT")[0] == 401
    response, _ = browse(edge, "/ray/", headers={"sec-fetch-mode": "navigate", "sec-fetch-site": "none"})
    assert (response.status, response.getheader("location")) == (303, "/ray/login")
    assert browse(edge, "/ray")[0].getheader("location") == "/ray/"


@pytest.mark.parametrize("path", ["/RAY/", "//ray/", "/rayx/", "/v1/../ray/", "/%72ay/", "/api/jobs/"])
def test_no_other_spelling_leads_there(edge: Edge, path: str) -> None:
    """Not even for an admin."""
    assert edge.call(path, method="GET", token=edge.token(Role.admin))[0] == 404


def test_ray_gets_its_own_token_and_none_of_the_callers(edge: Edge) -> None:
    """Nor is Ray's to be had: not in the file, not from Ray's own login, which reads another header."""
    session = {"cookie": f"{COOKIE}=x; ray-authentication-token=stolen"}
    status, heard = edge.call("/ray/api/jobs/?a=b", token=edge.token(Role.admin), headers=session)
    assert status == 200
    assert heard["path"] == "/api/jobs/?a=b"
    assert heard["x-ray-authorization"] == f"Bearer {RAY_TOKEN}"
    assert not {"authorization", "cookie"} & heard.keys()
    asked = {"x-ray-authorization": "Bearer mine"}
    assert (
        edge.call("/ray/", token=edge.token(Role.admin), headers=asked)[1]["x-ray-authorization"]
        == heard["x-ray-authorization"]
    )
    assert RAY_TOKEN not in (Path(edge.settings.map_file).parent / "haproxy.cfg").read_text()


def test_ray_sets_no_cookie_of_its_own(edge: Edge) -> None:
    """Its login would hand its token out in one."""
    headers = {"cookie": f"{COOKIE}={edge.token(Role.admin)}", **SAME_SITE}
    response, _ = browse(edge, "/ray/api/authenticate", headers=headers)
    assert (response.status, response.getheader("set-cookie")) == (200, None)


def test_a_browser_signs_in_once_and_its_session_ends_with_its_token(edge: Edge) -> None:
    """The cookie is out of reach of scripts, of plain http, of other sites and of other paths."""
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


def test_a_session_is_no_good_for_anything_else(edge: Edge) -> None:
    """Elsewhere only the header counts, so no page can make a browser predict."""
    cookie = {"cookie": f"{COOKIE}={edge.token(Role.admin)}", **SAME_SITE}
    assert edge.call(headers=dict(cookie))[0] == 401


@pytest.mark.parametrize("site", ["same-site", "cross-site", ""])
def test_other_sites_cannot_use_a_session_nor_make_one(edge: Edge, site: str) -> None:
    """Another port of this host is the same site to SameSite; a browser too old to say is refused too."""
    token = edge.token(Role.admin)
    cookie = {"cookie": f"{COOKIE}={token}"}
    other = f"https://127.0.0.1:{edge.port - 1}"
    for headers in (cookie | {"sec-fetch-site": site}, cookie | {"origin": other}, cookie):
        for method in ("GET", "POST"):
            assert browse(edge, "/ray/api/jobs/", method=method, headers=headers)[0].status == 403
    assert sign_in(edge, token, **{"sec-fetch-site": site})[0].status == 403
    own = cookie | {"origin": f"https://127.0.0.1:{edge.port}"}
    assert browse(edge, "/ray/api/jobs/", headers=own)[0].status == 200, "as a web socket comes"


@pytest.mark.parametrize("token", ["", "a.b.c", "x" * 5000], ids=["none", "no token", "too long"])
def test_a_wrong_token_makes_no_session(edge: Edge, token: str) -> None:
    """Nor one of somebody else's role."""
    for refused in (sign_in(edge, token), sign_in(edge, edge.token(Role.service))):
        assert refused[0].status in (401, 403)
        assert refused[0].getheader("set-cookie") is None


def test_every_record_names_who_asked(edge: Edge) -> None:
    """Who managed the cluster, who predicted, and who was refused for his role; a name is text, whatever is in it. Who
    shows no valid token is no record."""
    odd = 'é"\\\n{"status":200}'
    claims = {"sub": odd, "role": "service", "purpose": ""}
    edge.call(token=edge.token() + "x")
    edge.call(token=sign(edge.places, claims, audience=AUDIENCE, token_type="JWT", ttl_s=60))
    edge.call("/ray/api/jobs/secret?token=x", token=edge.token(Role.admin))
    edge.call("/ray/refused", token=edge.token(Role.service))
    edge.call(token=edge.token())
    folder = Path(edge.settings.map_file).parent / "access"
    deadline = time.monotonic() + 10
    while True:
        lines = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
        records = [json.loads(line) for line in lines if line.startswith("{")]
        managed = [each for each in records if each["path"] == "/ray/api/jobs/secret"]
        if managed and records[-1]["action"] == "predict":
            break
        assert time.monotonic() < deadline
    assert {each["principal"] for each in managed} == {"t"}
    assert [(each["principal"], each["status"]) for each in records if each["path"] == "/ray/refused"] == [
        ("t", 403)
    ]
    predicted = [(each["principal"], each["status"]) for each in records if each["action"] == "predict"]
    assert predicted[-2:] == [(odd, 200), ("t", 200)]
    assert 401 not in {each["status"] for each in records}
