"""`python -m cluster.ledger export | verify`: export or verify the ledger, without a running cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, RefusedError
from cluster.ledger.chain import Entry, read_lines, verify_chain
from cluster.ledger.checkpoint import load_public_key, verify_signatures
from cluster.ledger.events import CheckpointSigned
from cluster.ledger.store import Ledger
from cluster.security.ledger_reader import add_ledger_flags, open_reader


def main() -> None:
    """Parse the flags and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.ledger", description="Export and verify the ledger."
    )
    add_ledger_flags(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write every event as one JSON line")
    export.add_argument("--output", type=Path, help="file to write instead of standard output")
    verify = commands.add_parser(
        "verify", help="verify the hash chain; on failure, name the first bad event, exit 2"
    )
    verify.add_argument("--file", type=Path, help="export to verify instead of the ledger itself")
    verify.add_argument("--public-key", type=Path, help="key to verify the checkpoints' signatures with")
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "export":
                _export(open_reader(arguments), arguments.output)
            case "verify":
                _verify(arguments)
    except RefusedError as error:
        refuse(error)


def _export(ledger: Ledger, output: Path | None) -> None:
    if output is None:
        for entry in ledger.entries():
            sys.stdout.write(entry.line() + "\n")
        return
    with output.open("w") as file:
        file.writelines(entry.line() + "\n" for entry in ledger.entries())
    print(f"exported {ledger.head()} events to {output}")


def _verify(arguments: argparse.Namespace) -> None:
    entries = verify_chain(_entries(arguments))
    if arguments.public_key is not None:
        entries = verify_signatures(entries, load_public_key(arguments.public_key))
    count = covered = 0
    for entry in entries:
        count += 1
        if entry.type == CheckpointSigned.__name__:
            covered = entry.payload["upto_seq"]
    print(f"verified {count} events{_coverage(covered, with_key=arguments.public_key is not None)}")


def _coverage(covered: int, *, with_key: bool) -> str:
    """Describe which events the checkpoints' signatures prove. Anyone could have written or shortened the others."""
    if not with_key:
        return ": hash chain only; --public-key also verifies the checkpoints' signatures"
    if not covered:
        return ": hash chain only; they contain no signed checkpoint"
    return f"; signed checkpoints cover events 1 to {covered}"


def _entries(arguments: argparse.Namespace) -> Iterator[Entry]:
    if arguments.file is None:
        yield from open_reader(arguments).entries()
        return
    try:
        with arguments.file.open() as file:
            yield from read_lines(file)
    except OSError as error:
        raise ConfigError(f"{arguments.file} cannot be read: {error.strerror}.") from error


if __name__ == "__main__":
    main()
