"""Tests of the client `jobs.submit`, against a double of the edge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, RefusedError
from cluster.security.tokens.intent import write_intent
from jobs import submit
from jobs.submit import EdgeClient


class DoubleEdge(EdgeClient):
    """Answers without a network. Each stream of a log breaks after some bytes."""

    def __init__(self, log: bytes, end: dict[str, Any], *, interrupted: bool = False) -> None:
        self.sent: list[tuple[str, str, Any]] = []
        self._log, self._end, self._interrupted = log, end, interrupted

    def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        self.sent.append((method, path, body))
        is_over = self.sent.count(("GET", "/v1/jobs/job-1", None)) > 2
        return {"id": "job-1", "status": "running"} | (self._end if is_over else {})

    def log(self, job: str, offset: int) -> Iterator[bytes]:
        if self._interrupted:
            raise KeyboardInterrupt
        yield self._log[offset : offset + 4]


@pytest.fixture
def token(tmp_path: Path) -> str:
    """A private file with a token."""
    path = tmp_path / "t.jwt"
    write_intent(path, "token")
    return str(path)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"status": "done", "exit_code": 0, "reason": ""}, 0),
        ({"status": "refused", "exit_code": 2, "reason": "refused: no view"}, 2),
        ({"status": "failed", "exit_code": 7, "reason": "oops"}, 7),
        ({"status": "stopped", "exit_code": -15, "reason": "the job was stopped"}, 1),
        ({"status": "lost", "exit_code": None, "reason": "gone"}, 1),
    ],
)
def test_log_is_whole_and_exit_code_is_the_jobs(
    capfd: pytest.CaptureFixture[str], end: dict[str, Any], code: int
) -> None:
    """A stream that breaks continues at its position."""
    edge = DoubleEdge(b"0123456789abcd", end)
    assert submit.follow(edge, "job-1") == code
    printed = capfd.readouterr()
    assert printed.out == "0123456789abcd"
    assert end["reason"] in printed.err


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is sent to stop it."""
    edge = DoubleEdge(b"", {}, interrupted=True)
    assert submit.follow(edge, "job-1") == 130
    assert "--stop job-1" in capfd.readouterr().err
    assert edge.sent == []


def test_expired_token_leaves_the_job_running(capfd: pytest.CaptureFixture[str]) -> None:
    """The message says that the job goes on. The exit code is not that of a refused job."""

    class Expired(DoubleEdge):
        def log(self, job: str, offset: int) -> Iterator[bytes]:
            raise submit.RequestRefused("The token has expired.")

    assert submit.follow(Expired(b"", {}), "job-1") == 1
    assert "expired. Job job-1 goes on" in capfd.readouterr().err


def test_submission_has_module_overrides_and_always_a_key(
    monkeypatch: pytest.MonkeyPatch, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the key, a request whose answer was lost can be sent again."""
    edge = DoubleEdge(b"", {})
    monkeypatch.setattr(submit, "edge_client", lambda options: edge)
    given = ["--no-follow", "--token-file", token, "module=jobs.train", "name=m", "model=lightgbm"]
    assert submit.run(given) == 0
    assert submit.run([*given, "--key", "k"]) == 0
    first, second = (body for _, _, body in edge.sent)
    assert (first["module"], first["overrides"]) == ("jobs.train", ["name=m", "model=lightgbm"])
    assert len(first["key"]) == 32
    assert second["key"] == "k"
    assert capsys.readouterr().out == "job-1\njob-1\n"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["-m", "module=jobs.train", "seed=1,2"], "jobs.sweep"),
        (["module=jobs.train"], "--token-file"),
        (["--token-file", "none.jwt", "--edge", "https://h", "module=x"], "none.jwt"),
        (["--token-file", "TOKEN", "--edge", "http://h", "module=x"], "https"),
        (["--token-file", "TOKEN", "module=x"], "--edge"),
        (["--token-file", "TOKEN", "--edge", "https://h", "--ca-file", "none.pem", "module=x"], "none.pem"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str, given: list[str], named: str
) -> None:
    """Nothing is sent."""
    monkeypatch.chdir(tmp_path)
    for variable in ("FALAJ_PROJECT_ROOT", "FALAJ_CLUSTER_RECORD", submit.TOKEN_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(RefusedError, match=named):
        submit.run([token if text == "TOKEN" else text for text in given])


def test_command_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules, or none, are a mistake."""
    monkeypatch.setattr(submit, "edge_client", lambda options: DoubleEdge(b"", {}))
    for given in (["view=income"], ["module=a", "module=b"]):
        with pytest.raises(ConfigError, match="module="):
            submit.run(given)
