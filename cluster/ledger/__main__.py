"""`python -m cluster.ledger export | verify`: for auditors; needs no running cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, RefusedError
from cluster.ledger.chain import Entry, check, read_lines
from cluster.ledger.checkpoint import check_signatures, load_public_key
from cluster.ledger.store import Ledger, open_ledger
from cluster.security.acting import check_reader
from cluster.settings import LedgerConfig, PlatformConfig, StorageConfig
from cluster.storage import layout


def main() -> None:
    """Parse the flags and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.ledger", description="Export and verify the ledger."
    )
    parser.add_argument(
        "--root", default=".falaj", help="storage root (default: .falaj below the project root)"
    )
    parser.add_argument("--url", help="SQLAlchemy URL of the ledger, if it is not SQLite below the root")
    parser.add_argument(
        "--token",
        type=Path,
        help="file with the reader's token; without it you read as whoever can open the database",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write every event as one JSON line")
    export.add_argument("--output", type=Path, help="file to write instead of standard output")
    verify = commands.add_parser("verify", help="check the hash chain; exit 2 names the first bad event")
    verify.add_argument("--file", type=Path, help="an export to check instead of the ledger itself")
    verify.add_argument("--public-key", type=Path, help="also check the checkpoints' signatures")
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "export":
                _export(_open(arguments), arguments.output)
            case "verify":
                _verify(arguments)
    except RefusedError as error:
        refuse(error)


def _open(arguments: argparse.Namespace) -> Ledger:
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


def _export(ledger: Ledger, output: Path | None) -> None:
    if output is None:
        for entry in ledger.entries():
            sys.stdout.write(entry.line() + "\n")
        return
    with output.open("w") as file:
        file.writelines(entry.line() + "\n" for entry in ledger.entries())
    print(f"exported {ledger.head()} events to {output}")


def _verify(arguments: argparse.Namespace) -> None:
    entries = check(_entries(arguments))
    if arguments.public_key is not None:
        entries = check_signatures(entries, load_public_key(arguments.public_key))
    count = sum(1 for _ in entries)
    print(f"verified {count} events")


def _entries(arguments: argparse.Namespace) -> Iterator[Entry]:
    if arguments.file is None:
        yield from _open(arguments).entries()
        return
    try:
        with arguments.file.open() as file:
            yield from read_lines(file)
    except OSError as error:
        raise ConfigError(f"{arguments.file} cannot be read: {error.strerror}.") from error


if __name__ == "__main__":
    main()
