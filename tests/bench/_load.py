"""Closed-loop HTTP load: a fixed number of connections, each with one open request at a time.

If wrk is installed (Debian: `apt-get install wrk`), it sends the requests. wrk needs a few microseconds of a core per
request. Without wrk, a Python client sends the requests, and a warning is printed. On a machine with two cores, the
Python client needs so much of one core that every figure gets worse.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_SCRIPT = """
local requests, at = {}, 0
function init(arguments)
  for line in io.lines(arguments[1]) do
    local headers, body = line:match("^(.-)\\t(.*)$")
    local given = {["Content-Type"] = "application/json"}
    for name, value in headers:gmatch("([^:;]+):([^;]*)") do given[name] = value end
    requests[#requests + 1] = wrk.format("POST", nil, given, body)
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
function done(summary, latency, all)
  local errors = summary.errors
  io.write(string.format('{"count": %d, "took_us": %d, "p50_us": %d, "p99_us": %d, "errors": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """URL and requests of a load. The requests are sent in order; after the last one, the first is sent again."""

    url: str
    requests: Sequence[tuple[dict[str, str], bytes]]
    """For each request, headers and a JSON body of one line. A header value must not contain a semicolon."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The figures of one turn."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float


class LoadFailed(Exception):
    """A request of a turn did not get a 2xx answer."""


def has_wrk() -> bool:
    """Return whether wrk is installed. Print a warning if it is not."""
    if shutil.which("wrk"):
        return True
    print(
        "  WARNING: wrk is not installed (`apt-get install wrk`): a client in Python makes the load. It takes most of "
        "a core for itself, so rates are too low, latencies too high and ratios too near to 1.",
        flush=True,
    )
    return False


def measure(target: Target, *, connections: int, seconds: int, wrk: bool) -> Measured:
    """Run one turn and return its figures.

    Raises:
        LoadFailed: An answer was not 2xx, or no answer came.
    """
    with tempfile.TemporaryDirectory() as name:
        requests = Path(name, "requests")
        requests.write_text(
            "".join(f"{_joined(headers)}\t{body.decode()}\n" for headers, body in target.requests)
        )
        script = Path(name, "script.lua")
        script.write_text(_SCRIPT)
        by_wrk = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{seconds}s",
            f"-s{script}",
            target.url,
            "--",
            str(requests),
        ]
        by_python = [
            sys.executable,
            "-m",
            "tests.clients.load",
            target.url,
            str(requests),
            str(connections),
            str(seconds),
        ]
        result = subprocess.run(
            by_wrk if wrk else by_python,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + 60,
        )
    if result.returncode:
        raise LoadFailed(f"{target.url}: {result.stdout}{result.stderr}")
    said = json.loads(result.stdout.splitlines()[-1])
    if said["errors"] or not said["count"]:
        raise LoadFailed(f"{target.url}: {said}")
    return Measured(
        requests_per_s=said["count"] / said["took_us"] * 1e6,
        p50_ms=said["p50_us"] / 1e3,
        p99_ms=said["p99_us"] / 1e3,
    )


def _joined(headers: dict[str, str]) -> str:
    return ";".join(f"{name}:{value}" for name, value in headers.items())
