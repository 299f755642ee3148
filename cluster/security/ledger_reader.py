"""How commands for people open a ledger: ordinary flags, no running cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.errors import ConfigError
from cluster.ledger.store import Ledger, open_ledger
from cluster.security.acting import check_reader
from cluster.settings import LedgerConfig, PlatformConfig, StorageConfig
from cluster.storage import layout


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which ledger, and who reads it."""
    parser.add_argument(
        "--root", default=".falaj", help="storage root (default: .falaj below the project root)"
    )
    parser.add_argument("--url", help="SQLAlchemy URL of the ledger, if it is not SQLite below the root")
    parser.add_argument(
        "--token",
        type=Path,
        help="file with the reader's token; without it you read as whoever can open the database",
    )


def open_reader(arguments: argparse.Namespace) -> Ledger:
    """The ledger that the flags name.

    Raises:
        ConfigError: there is none, or the URL holds a password.
        Unauthenticated, AccessDenied: the token's holder may not read it.
    """
    storage = StorageConfig(root=arguments.root)
    if arguments.url is None and not Path(layout(storage).ledger_path).exists():
        raise ConfigError(f"No ledger at {layout(storage).ledger_path}. Give --root or --url.")
    try:
        named = LedgerConfig(url=arguments.url)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    ledger = open_ledger(PlatformConfig(storage=storage, ledger=named))
    if arguments.token is not None:
        check_reader(ledger, layout(storage), arguments.token)
    return ledger
