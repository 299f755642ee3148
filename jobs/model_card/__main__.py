"""`python -m jobs.model_card --model m --version 1 --output m-1.html`: print or write the card of a model version."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, RefusedError
from cluster.registry import LATEST
from cluster.security.ledger_reader import add_ledger_flags, open_reader
from jobs.model_card.history import read_history
from jobs.model_card.pages import render_html, render_markdown
from jobs.model_card.sections import card

FORMATS = {".md": render_markdown, ".html": render_html}
"""Renderer of each file name extension."""


def main() -> None:
    """Parse the flags and print or write the card."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.model_card",
        description="Print the card of a model version, as Markdown. It is made from the ledger alone.",
    )
    add_ledger_flags(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--version", default=LATEST, help=f"a number, an alias, or {LATEST} (default)")
    parser.add_argument(
        "--output",
        type=Path,
        action="append",
        default=[],
        help="file to write instead: .md for Markdown, .html for a page with plots; can be given twice",
    )
    arguments = parser.parse_args()
    try:
        for path in arguments.output:
            require_format(path)
        page = card(read_history(open_reader(arguments), arguments.model, arguments.version))
    except RefusedError as error:
        refuse(error)
    for path in arguments.output:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FORMATS[path.suffix](page), encoding="utf-8")
        print(f"wrote the card of {page.title} to {path}")
    if not arguments.output:
        sys.stdout.write(render_markdown(page))


def require_format(path: Path) -> None:
    """Require a file name extension that has a renderer.

    Raises:
        ConfigError: It has none.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--output {path} must end with {' or '.join(FORMATS)}.")


if __name__ == "__main__":
    main()
