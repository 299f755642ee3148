"""`python -m jobs.submit module=<module> <overrides>`: submit a command as a job, through the edge.

    python -m jobs.submit --token-file t.jwt module=feature_jobs.ingest definitions=shop view=income
    python -m jobs.submit --token-file t.jwt --follow job-1f…
    python -m jobs.submit --token-file t.jwt --stop job-1f…

It prints the job's log until the job ends, and exits with the job's exit code. Ctrl-C ends only this client: the job
goes on.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from cluster.command_line import MULTIRUN
from cluster.entrypoint import REFUSED, refuse
from cluster.errors import ConfigError, FalajError, RefusedError
from cluster.security.tokens.intent import read_token_file
from cluster.session import find_record
from cluster.settings import StorageConfig

TOKEN_VARIABLE = "FALAJ_TOKEN_FILE"  # noqa: S105 - the name of the variable
MODULE = "module="
TIMEOUT_S = 60.0
PATIENCE_S = 120.0
"""How long this client tries again while the edge or the job service does not answer."""
PAUSE_S = 1.0
"""Seconds before the next try."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""
_BLOCK = 64 * 1024


class EdgeUnavailable(FalajError):
    """The edge or the job service does not answer."""


class RequestRefused(RefusedError):
    """The job service refused the request."""


@dataclass(kw_only=True)
class EdgeClient:
    """Sends requests with the caller's token."""

    url: str
    context: ssl.SSLContext
    token: Callable[[], str]
    """Returns the token. A file is read for each request, because another process may renew it."""

    def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Return the JSON answer. While the edge does not answer, try again.

        Raises:
            RequestRefused: the answer is an error that another try would not change.
            EdgeUnavailable: the edge has not answered for `PATIENCE_S`.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self._open(method, path, body) as response:
                    return dict(json.loads(response.read()))
            except (OSError, http.client.HTTPException, EdgeUnavailable) as error:
                if isinstance(error, ssl.SSLCertVerificationError) or time.monotonic() > deadline:
                    raise EdgeUnavailable(f"{self.url} does not answer: {error}") from error
                time.sleep(PAUSE_S)

    def log(self, job: str, offset: int) -> Iterator[bytes]:
        """Yield the log of a job from a position on, until the stream ends or breaks."""
        try:
            with self._open("GET", f"/v1/jobs/{job}/logs?offset={offset}", None) as response:
                while data := response.read1(_BLOCK):
                    yield data
        except (OSError, http.client.HTTPException, EdgeUnavailable):
            time.sleep(PAUSE_S)

    @contextmanager
    def _open(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        address = urlsplit(self.url)
        connection = http.client.HTTPSConnection(
            address.hostname or "", address.port, timeout=TIMEOUT_S, context=self.context
        )
        try:
            headers = {"Authorization": f"Bearer {self.token()}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            response = connection.getresponse()
            if response.status >= 500:
                raise EdgeUnavailable(f"HTTP {response.status}")
            if response.status >= 400:
                raise RequestRefused(_message(response))
            yield response
        finally:
            connection.close()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Do what the arguments say, and exit."""
    try:
        sys.exit(run(sys.argv[1:] if arguments is None else arguments))
    except RefusedError as error:
        refuse(error)
    except EdgeUnavailable as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say, and return the exit code.

    Raises:
        RefusedError: the arguments are wrong, or the job service refuses the request.
        EdgeUnavailable: the edge does not answer.
    """
    if not MULTIRUN.isdisjoint(arguments):
        raise ConfigError(
            "A job runs one point. Submit each point of a multirun as a job of its own, for example in a loop of your "
            "shell, or use `module=jobs.sweep`."
        )
    options = _parser().parse_intermixed_args(list(arguments))
    client = edge_client(options)
    if options.list:
        for job in client.request("GET", "/v1/jobs")["jobs"]:
            print(f"{job['id']}  {job['status']:<11}  {job['submitted_at'][:19]}  {job['module']}")
        return 0
    if options.stop:
        print(f"job {options.stop} is {client.request('DELETE', f'/v1/jobs/{options.stop}')['status']}")
        return 0
    if options.follow:
        return follow(client, options.follow)
    job = str(client.request("POST", "/v1/jobs", submission(options))["id"])
    if options.no_follow:
        print(job)
        return 0
    print(f"job {job} is submitted", file=sys.stderr, flush=True)
    return follow(client, job)


def submission(options: argparse.Namespace) -> dict[str, Any]:
    """Return the body of the request. Its key lets this client send it again if the answer was lost."""
    modules = [text for text in options.arguments if text.startswith(MODULE)]
    if len(modules) != 1:
        raise ConfigError("Give the command once: `module=<module>`, such as `module=feature_jobs.ingest`.")
    intent = None if options.intent_file is None else read_token_file(Path(options.intent_file))
    return {
        "module": modules[0].removeprefix(MODULE),
        "overrides": [text for text in options.arguments if not text.startswith(MODULE)],
        "key": options.key or uuid.uuid4().hex,
        **({} if intent is None else {"intent": intent}),
    }


def follow(client: EdgeClient, job: str) -> int:
    """Print the log of a job until it ends, and return its exit code; see `exit_code`."""
    offset = 0
    try:
        while True:
            for data in client.log(job, offset):
                offset += len(data)
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            state = client.request("GET", f"/v1/jobs/{job}")
            if "exit_code" in state:
                break
        for data in client.log(job, offset):  # what it printed after the stream had ended
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        print(
            f"\njob {job} goes on. `python -m jobs.submit --follow {job}` shows its log again, and "
            f"`python -m jobs.submit --stop {job}` stops it.",
            file=sys.stderr,
        )
        return INTERRUPTED
    except RequestRefused as error:  # for example, the token has expired
        print(
            f"{error} Job {job} goes on. `python -m jobs.submit --follow {job}` shows its log.",
            file=sys.stderr,
        )
        return 1
    reason = f": {state['reason']}" if state["reason"] else ""
    print(f"job {job} is {state['status']}{reason}", file=sys.stderr)
    return exit_code(state)


def exit_code(state: Mapping[str, Any]) -> int:
    """Return the exit code of a job that is over; 1 if its process was killed by a signal, or never ran."""
    code = state["exit_code"]
    if code is None:
        return REFUSED if state["status"] == "refused" else 1
    return int(code) if code >= 0 else 1


def edge_client(options: argparse.Namespace) -> EdgeClient:
    """Return the client of the edge that the options name, or else of this folder's cluster.

    Raises:
        ConfigError: there is no token, or no edge.
    """
    file = options.token_file or os.environ.get(TOKEN_VARIABLE)
    if file is None:
        raise ConfigError(
            "Give your token: --token-file FILE. With the development issuer, `python -m cluster.security.identity "
            "token --sub … --role … --output FILE` makes one."
        )
    record = None if options.edge else find_record(StorageConfig())
    if options.edge is None and record is None:
        raise ConfigError("No cluster of this folder is up. Name the edge with --edge https://host:port.")
    url = options.edge or (record.edge_url if record is not None else "")
    if urlsplit(url).scheme != "https":
        raise ConfigError(f"--edge must be an https URL, because it gets your token, got '{url}'.")
    authority = options.ca_file or (None if record is None else f"{record.layout.tls}/ca.pem")
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise ConfigError(f"--ca-file {authority} cannot be read: {error.strerror or error}.") from error
    path = Path(file)
    read_token_file(path)
    return EdgeClient(url=url, context=context, token=lambda: read_token_file(path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit", description="Submit a command as a job, and follow its log."
    )
    parser.add_argument(
        "arguments", nargs="*", metavar="module=… key=value", help="the command and its options"
    )
    parser.add_argument("--follow", metavar="ID", help="follow the log of a job instead")
    parser.add_argument("--stop", metavar="ID", help="stop a job instead")
    parser.add_argument("--list", action="store_true", help="list your newest jobs instead")
    parser.add_argument("--key", help="text of your own: the same key and content start no second job")
    parser.add_argument("--no-follow", action="store_true", help="print the job's id and end")
    parser.add_argument("--token-file", help=f"file with your token, mode 0600 (default: {TOKEN_VARIABLE})")
    parser.add_argument("--intent-file", help="with an OIDC issuer: file with the job's own token")
    parser.add_argument("--edge", help="URL of the edge (default: the cluster of this folder)")
    parser.add_argument("--ca-file", help="certificate authority of the edge (default: as --edge)")
    return parser


def _message(response: http.client.HTTPResponse) -> str:
    try:
        return str(json.loads(response.read())["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status}"


if __name__ == "__main__":
    main()
