"""Join tokens: a file with which a machine may join a cluster, until it expires.

    python -m cluster.membership.join_token --output node.join

The file has the token and the certificate of the cluster's authority. With it, the new node knows that it talks to the
right head before it sends the token. The head stores no tokens: a token is its own expiry, signed with a key of the
head (HMAC-SHA256). To end all tokens at once, remove `keys/join.key` and run `python -m cluster.up`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import re
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.entrypoint import compose_platform, refuse
from cluster.errors import ConfigError, RefusedError, Unauthenticated
from cluster.membership.shared_state import require_shared_state
from cluster.security.private_file import read_secret_file
from cluster.security.tls.certificates import CA_NAME
from cluster.security.tokens.issuer import ensure_secret, replace_private_file
from cluster.session import find_own_record
from cluster.settings import StorageConfig
from cluster.storage import Layout, layout, local

TTL_S, MAX_TTL_S = 3600, 7 * 86_400
KEY_NAME = "join.key"
COMMAND = "`python -m cluster.membership.join_token --output node.join`"
_PREFIX = "falaj-join"
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class JoinToken:
    """Content of a file with a join token."""

    text: str
    authority: str
    """Certificate of the cluster's authority, as PEM."""

    def __repr__(self) -> str:
        return "JoinToken(***)"


def ensure_join_key(places: Layout) -> None:
    """Create the head's key for join tokens if it does not exist."""
    ensure_secret(local(places.keys) / KEY_NAME)


def mint(places: Layout, *, ttl_s: int = TTL_S, now: float | None = None) -> JoinToken:
    """Return a new token.

    Raises:
        ConfigError: the cluster admits no nodes, or the lifetime is invalid.
    """
    if not 0 < ttl_s <= MAX_TTL_S:
        raise ConfigError(f"A join token may be valid for 1 to {MAX_TTL_S} s, got {ttl_s}.")
    expires_at = int(time.time() if now is None else now) + ttl_s
    body = f"{_PREFIX}.{expires_at}.{secrets.token_hex(8)}"
    authority = (local(places.tls) / CA_NAME).read_text()
    return JoinToken(f"{body}.{_signature(places, body)}", authority)


def check(places: Layout, token: str, *, now: float | None = None) -> None:
    """Require that a token is one of this head and has not expired.

    Raises:
        Unauthenticated: it is not.
    """
    body, _, signature = token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(places, body).encode()):
        raise Unauthenticated(f"The join token is wrong. Make a new one on the head: {COMMAND}.")
    at = time.time() if now is None else now
    expires_at = int(body.split(".")[1])
    if expires_at > at + MAX_TTL_S:
        raise Unauthenticated(
            "The join token is valid for too long. Check the head's clock, and make a new one there: "
            f"{COMMAND}."
        )
    if expires_at < at:
        raise Unauthenticated(f"The join token has expired. Make a new one on the head: {COMMAND}.")


def write(token: JoinToken, path: Path) -> None:
    """Write a token to a file that only its owner can read."""
    replace_private_file(path, f"{token.text}\n{token.authority}".encode())


def read(path: Path) -> JoinToken:
    """Read a token's file.

    Raises:
        ConfigError: the file is missing, has no join token, or other users can read it.
    """
    try:
        text, _, authority = read_secret_file(path, what="a join token").partition("\n")
    except OSError as error:
        raise ConfigError(
            f"The join token at {path} cannot be read: {error.strerror}. Make one on the head: {COMMAND}. Then "
            "copy the file to this machine."
        ) from None
    if not text.startswith(f"{_PREFIX}.") or "BEGIN CERTIFICATE" not in authority:
        raise ConfigError(f"{path} has no join token. Make one on the head: {COMMAND}.")
    return JoinToken(text, f"{authority.strip()}\n")


def _signature(places: Layout, body: str) -> str:
    path = local(places.keys) / KEY_NAME
    try:
        key = read_secret_file(path, what="the key of join tokens")
    except FileNotFoundError:
        raise ConfigError(
            "This cluster admits no other nodes. Start it with cluster.address=… of this machine."
        ) from None
    if not _KEY.fullmatch(key):  # anyone can sign with an empty key
        raise ConfigError(
            f"{path} is damaged: it does not have 64 hex characters. Remove it, and run `python -m cluster.up` on the "
            "head."
        )
    digest = hmac.digest(key.encode(), body.encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def main() -> None:
    """Parse the flags, and write a token."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.membership.join_token", description="Make a token that lets a machine join."
    )
    parser.add_argument("--output", required=True, type=Path, help="file to write (mode 0600)")
    parser.add_argument(
        "--ttl-s", type=int, default=TTL_S, help="seconds until it expires (default: %(default)s)"
    )
    parser.add_argument("--root", default=".falaj", help="storage.local of the head (default: .falaj)")
    arguments = parser.parse_args()
    storage = StorageConfig(root=arguments.root)
    try:
        record = find_own_record(storage)
        if record is None or not record.has_nodes:
            raise ConfigError(
                f"No cluster that other machines can join is up for {arguments.root}. Run `python -m cluster.up "
                "cluster.address=…` first, and give --root if its storage.local is another folder."
            )
        if record.node_id is not None:
            raise ConfigError(
                f"Join tokens are made on the head. This machine is a node of the head at {record.head}."
            )
        require_shared_state(compose_platform(record.overrides or ()))
        token = mint(layout(storage), ttl_s=arguments.ttl_s)
        write(token, arguments.output)
    except RefusedError as error:
        refuse(error)
    except OSError as error:
        refuse(ConfigError(f"{arguments.output} cannot be written: {error.strerror}."))
    head = f"{record.address}:{record.ports['nodes']}"
    print(
        f"On the new machine, with this file there: python -m cluster.join head={head} "
        f"token_file={arguments.output.name} cluster.address=<address of the new machine>",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
