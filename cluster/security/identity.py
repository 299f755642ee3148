"""Who is asking: signed tokens, verified against their issuer's keys.

    python -m cluster.security.identity token --sub alice --role data_scientist --purpose credit_scoring
    python -m cluster.security.identity intent --sub alice --role data_engineer --entrypoint feature_jobs.ingest …
    python -m cluster.security.identity verify FILE
    python -m cluster.security.identity rotate

Locally the dev issuer signs them (`cluster/security/tokens/issuer.py`). In production an OIDC issuer does, and
`cluster/security/tokens/trust.py` says whom to believe.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, RefusedError
from cluster.security.tokens.issuer import (
    ALGORITHM,
    AUDIENCE,
    ISSUER,
    JWKS_NAME,
    PRIVATE_NAME,
    PUBLIC_NAME,
    ensure_issuer,
    mint_token,
    replace_private,
    rotate_issuer,
    write_private,
)
from cluster.security.tokens.principal import Principal, TokenVerifier, current_actor, principal_of
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import (
    LEEWAY_S,
    MAX_LIFETIME_S,
    MAX_TOKEN_BYTES,
    scoped_models,
)
from cluster.settings import StorageConfig
from cluster.storage import Layout, layout

__all__ = [
    "ALGORITHM",
    "AUDIENCE",
    "ISSUER",
    "JWKS_NAME",
    "MAX_TOKEN_BYTES",
    "PRIVATE_NAME",
    "PUBLIC_NAME",
    "Principal",
    "TokenVerifier",
    "current_actor",
    "ensure_issuer",
    "mint_token",
    "principal_of",
    "write_private",
]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.security.identity", description="Local identities."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    token = commands.add_parser("token", help="mint a short-lived token from the dev issuer")
    intent = commands.add_parser("intent", help="mint one that runs a single job: identity.token_file=FILE")
    intent.add_argument("--entrypoint", required=True, help="the job's module, feature_jobs.ingest for one")
    roles = [role.value for role in Role if role is not Role.supervisor]  # no person's
    for command in (token, intent):
        command.add_argument("--sub", required=True, help="subject")
        command.add_argument("--role", required=True, choices=roles)
        command.add_argument("--purpose", default="", help="what the data will be used for")
        command.add_argument("--tenant", default="default", help="whose data it is (default: default)")
        command.add_argument(
            "--scope",
            default="",
            help="'model:a model:b' for these models alone (default: what the role may)",
        )
        command.add_argument("--ttl-s", type=int, default=900, help="seconds until it expires (default: 900)")
        command.add_argument(
            "--output", type=Path, help="file to write (mode 0600) instead of standard output"
        )
    rotate = commands.add_parser("rotate", help="sign with a new key; old tokens hold until they expire")
    rotate.add_argument(
        "--keep-s",
        type=int,
        default=MAX_LIFETIME_S + LEEWAY_S,
        help="seconds for which the old key's tokens still hold; 0 ends them now (default: the longest token's life)",
    )
    verify = commands.add_parser("verify", help="say whose token a file holds, or why it is refused")
    verify.add_argument("file", type=Path, help="file with one token")
    for command in (token, intent, rotate, verify):
        command.add_argument(
            "--root", default=".falaj", help="storage root (default: .falaj below the project root)"
        )
    return parser


def _run(arguments: argparse.Namespace) -> str:
    """What a command prints; nothing where it wrote a file."""
    places = layout(StorageConfig(root=arguments.root))
    if arguments.command == "rotate":
        return f"New tokens are signed with key {rotate_issuer(places, keep_s=arguments.keep_s)}."
    if arguments.command == "verify":
        if not arguments.file.is_file():
            raise ConfigError(f"No token file at {arguments.file}.")
        content = arguments.file.read_bytes()[: MAX_TOKEN_BYTES + 2].decode(errors="replace")
        return json.dumps(dataclasses.asdict(TokenVerifier.of(places).verify(content.strip())))
    text = _minted(places, arguments)
    if arguments.output is None:
        return text
    replace_private(arguments.output, text.encode())
    return ""


def _minted(places: Layout, arguments: argparse.Namespace) -> str:
    if arguments.command == "token":
        return mint_token(
            places,
            subject=arguments.sub,
            role=Role(arguments.role),
            purpose=arguments.purpose,
            ttl_s=arguments.ttl_s,
            tenant=arguments.tenant,
            scope=arguments.scope,
        )
    from cluster.security.tokens.intent import mint_intent  # which builds on this module

    stated = Principal(
        subject=arguments.sub,
        role=Role(arguments.role),
        purpose=arguments.purpose,
        tenant=arguments.tenant,
        expires_at=0,
        models=scoped_models({"scope": arguments.scope}, "scope"),
    )
    return mint_intent(places, stated, entrypoint=arguments.entrypoint, ttl_s=arguments.ttl_s)


def main() -> None:
    """Parse the flags and run a command."""
    try:
        printed = _run(_parser().parse_args())
    except RefusedError as error:
        refuse(error)
    if printed:
        print(printed)


if __name__ == "__main__":
    main()
