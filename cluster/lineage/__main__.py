"""`python -m cluster.lineage --model m --version 1`: show the source columns that a model version was built from."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, RefusedError
from cluster.lineage.trace import ModelTrace, as_json, describe, read_entries, trace_model
from cluster.registry import LATEST
from cluster.security.ledger_reader import add_ledger_flags, open_reader


def main() -> None:
    """Parse the flags and print the lineage."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.lineage",
        description="Show the source columns that a model version was built from.",
    )
    add_ledger_flags(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--version", required=True, help=f"a number, an alias, or {LATEST}")
    parser.add_argument("--format", choices=["text", "json", "openlineage"], default="text")
    parser.add_argument(
        "--namespace", default="falaj", help="namespace of jobs and data sets in OpenLineage events"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--emit",
        action="store_true",
        help="send the OpenLineage events to the transport that OPENLINEAGE_URL or openlineage.yml configures",
    )
    target.add_argument("--output", type=Path, help="file to write instead of standard output")
    arguments = parser.parse_args()
    try:
        entries = read_entries(open_reader(arguments), arguments.model, arguments.version)
        model_trace = trace_model(entries, arguments.model, arguments.version)
        if arguments.emit:
            _emit(model_trace, arguments.namespace)
            return
    except RefusedError as error:
        refuse(error)
    text = _formatted(model_trace, arguments.format, arguments.namespace) + "\n"
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.write_text(text)
        print(f"wrote the lineage of {arguments.model} to {arguments.output}")


def _emit(trace: ModelTrace, namespace: str) -> None:
    """Send the events.

    Raises:
        ConfigError: No transport is configured. OpenLineage would then only write the events to a log.
    """
    # Imported here and below, because the other formats do not need it. It imports requests.
    from openlineage.client import OpenLineageClient
    from openlineage.client.transport.console import ConsoleTransport

    from cluster.lineage.openlineage import run_events

    # The client would warn that it prints the events. The ConfigError below replaces this warning.
    logging.getLogger("openlineage.client.client").addFilter(_is_no_missing_transport)
    client = OpenLineageClient()
    if isinstance(client.transport, ConsoleTransport):
        raise ConfigError(
            "No OpenLineage transport is configured. Set OPENLINEAGE_URL, or write an openlineage.yml. To print the "
            "events, use --format openlineage without --emit."
        )
    for event in run_events(trace, namespace=namespace):
        client.emit(event)
    client.close()


def _is_no_missing_transport(record: logging.LogRecord) -> bool:
    return "transport configuration" not in record.getMessage()


def _formatted(trace: ModelTrace, output_format: str, namespace: str) -> str:
    match output_format:
        case "json":
            return json.dumps(as_json(trace), indent=1)
        case "openlineage":
            from openlineage.client.serde import Serde

            from cluster.lineage.openlineage import run_events

            return "\n".join(Serde.to_json(event) for event in run_events(trace, namespace=namespace))
        case _:
            return describe(trace)


if __name__ == "__main__":
    main()
