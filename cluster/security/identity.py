"""Command line of the development issuer: create and verify tokens, and replace the key that signs them.

    python -m cluster.security.identity token --sub alice --role data_scientist --purpose credit_scoring
    python -m cluster.security.identity intent --sub alice --role data_engineer --entrypoint feature_jobs.ingest …
    python -m cluster.security.identity verify FILE
    python -m cluster.security.identity rotate

The development issuer (`cluster/security/tokens/issuer.py`) signs local tokens. In production, an OIDC issuer signs
tokens. `cluster/security/tokens/trust.py` selects the trusted issuer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, RefusedError
from cluster.security.tokens.intent import mint_intent
from cluster.security.tokens.issuer import TOKEN_TTL_S, mint_token, replace_private_file, rotate_issuer
from cluster.security.tokens.principal import Principal, TokenVerifier
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import (
    LEEWAY_S,
    MAX_LIFETIME_S,
    MAX_TOKEN_BYTES,
    scoped_models,
)
from cluster.settings import StorageConfig
from cluster.storage import Layout, layout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.security.identity", description="Tokens of the development issuer."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    token = commands.add_parser("token", help="mint a short-lived token from the development issuer")
    intent = commands.add_parser(
        "intent", help="mint a token that runs a single job: identity.token_file=FILE"
    )
    intent.add_argument("--entrypoint", required=True, help="the job's module, such as feature_jobs.ingest")
    roles = [role.value for role in Role if role is not Role.supervisor]  # only the cluster has this role
    for command in (token, intent):
        command.add_argument("--sub", required=True, help="subject")
        command.add_argument("--role", required=True, choices=roles)
        command.add_argument("--purpose", default="", help="what the data will be used for")
        command.add_argument(
            "--tenant", default="default", help="tenant that owns the data (default: default)"
        )
        command.add_argument(
            "--scope",
            default="",
            help="'model:a model:b' to allow these models only (default: all that the role allows)",
        )
        command.add_argument(
            "--ttl-s",
            type=int,
            default=TOKEN_TTL_S,
            help="seconds until it expires (default: %(default)s)",
        )
        command.add_argument(
            "--output", type=Path, help="file to write (mode 0600) instead of standard output"
        )
    rotate = commands.add_parser(
        "rotate", help="sign with a new key; old tokens stay valid until they expire"
    )
    rotate.add_argument(
        "--keep-s",
        type=int,
        default=MAX_LIFETIME_S + LEEWAY_S,
        help="seconds for which old tokens stay valid; 0 ends them now (default: the longest lifetime of a token)",
    )
    verify = commands.add_parser("verify", help="print the principal of a token, or why the token is refused")
    verify.add_argument("file", type=Path, help="file with one token")
    for command in (token, intent, rotate, verify):
        command.add_argument(
            "--root", default=".falaj", help="storage root (default: .falaj below the project root)"
        )
    return parser


def _run(arguments: argparse.Namespace) -> str:
    """Run a command, and return the text to print, or "" if the command wrote a file."""
    places = layout(StorageConfig(root=arguments.root))
    if arguments.command == "rotate":
        return f"New tokens are signed with key {rotate_issuer(places, keep_s=arguments.keep_s)}."
    if arguments.command == "verify":
        if not arguments.file.is_file():
            raise ConfigError(f"No token file at {arguments.file}.")
        content = arguments.file.read_bytes()[: MAX_TOKEN_BYTES + 2].decode(errors="replace")
        return json.dumps(dataclasses.asdict(TokenVerifier.of(places).verify(content.strip())))
    text = _mint(places, arguments)
    if arguments.output is None:
        return text
    replace_private_file(arguments.output, text.encode())
    return ""


def _mint(places: Layout, arguments: argparse.Namespace) -> str:
    """Return a new token or intent of the development issuer, as the flags describe it."""
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
    principal = Principal(
        subject=arguments.sub,
        role=Role(arguments.role),
        purpose=arguments.purpose,
        tenant=arguments.tenant,
        expires_at=0,
        models=scoped_models({"scope": arguments.scope}, "scope"),
    )
    return mint_intent(places, principal, entrypoint=arguments.entrypoint, ttl_s=arguments.ttl_s)


def main() -> None:
    """Parse the flags and run the command."""
    try:
        printed = _run(_parser().parse_args())
    except RefusedError as error:
        refuse(error)
    if printed:
        print(printed)


if __name__ == "__main__":
    main()
