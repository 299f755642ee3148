"""Command-line flags of the commands that read a ledger without a running cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.errors import ConfigError
from cluster.ledger.store import Ledger, open_ledger
from cluster.security.acting import check_reader
from cluster.session import use_recorded_places
from cluster.settings import LedgerConfig, PlatformConfig, StorageConfig
from cluster.storage import layout


def add_ledger_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the ledger and the reader."""
    parser.add_argument(
        "--root", default=".falaj", help="storage root (default: .falaj below the project root)"
    )
    parser.add_argument("--url", help="SQLAlchemy URL of the ledger, if it is not SQLite below the root")
    parser.add_argument(
        "--token",
        type=Path,
        help="file with the reader's token; without it, access to the database is enough",
    )


def open_reader(arguments: argparse.Namespace) -> Ledger:
    """Open the ledger that the flags name.

    Raises:
        ConfigError: the ledger does not exist, or the URL contains a password.
        Unauthenticated, AccessDenied: the token is invalid, or its holder may not read the ledger.
    """
    try:
        config = PlatformConfig(
            storage=StorageConfig(root=arguments.root), ledger=LedgerConfig(url=arguments.url)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    use_recorded_places(config, given=())
    places = layout(config.storage)
    if config.ledger.url is None and not Path(places.ledger_path).exists():
        raise ConfigError(f"No ledger at {places.ledger_path}. Give --root or --url.")
    ledger = open_ledger(config)
    if arguments.token is not None:
        check_reader(ledger, places, arguments.token)
    return ledger
