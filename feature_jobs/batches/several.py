"""Commands for several views at once: `view=income`, `view=[income,sector]` or `view=all`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cluster.errors import ConfigError, RefusedError
from cluster.ledger import Ledger
from feature_jobs.store.catalog.lifecycle import ViewState, read_lifecycles
from feature_jobs.store.catalog.specifications import load_definitions
from feature_jobs.store.definitions.kafka_source import KafkaSource

ALL = "all"
"""Every view that the command can take. A view that is called so itself is meant by `view=[all]`."""


def check_views(given: Any) -> None:
    """Check the form of `view=…`; the configuration cannot state "a text or a list of them" as a type.

    Raises:
        ValueError: it is neither.
    """
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"view must be a name, a list as [a,b], or {ALL}, got {given}.")


def chosen(given: str | list[str], known: Iterable[str]) -> list[str]:
    """The views that a command names, each once.

    Args:
        given: a name, several, or `ALL`.
        known: the views that `ALL` stands for.

    Raises:
        ConfigError: `ALL` stands for no view.
    """
    if given != ALL:
        return list(dict.fromkeys(given)) if isinstance(given, list) else [given]
    names = list(known)
    if not names:
        raise ConfigError(
            "view=all finds no view that this command can take. Name one, or apply the definitions."
        )
    return names


def with_batches(definitions: str, ledger: Ledger) -> Iterator[str]:
    """The views of a module that batches can be ingested into: not those of topics, and not retired ones.

    A generator, so that a command that names its views does not read the ledger for it.
    """
    states = read_lifecycles(ledger)
    for view in load_definitions(definitions).views.values():
        retired = view.name in states and states[view.name].state is ViewState.retired
        if not retired and not isinstance(view.source, KafkaSource):
            yield view.name


def for_each(views: Sequence[str], do: Callable[[str], None]) -> None:
    """Do something with each view. A refusal of one does not keep the others from their turn.

    Raises:
        RefusedError: one or more were refused, after all had their turn.
    """
    refused = []
    for view in views:
        try:
            do(view)
        except RefusedError as error:
            if len(views) == 1:
                raise
            refused.append(view)
            print(f"view {view}: refused: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if refused:
        raise RefusedError(
            f"{len(refused)} of {len(views)} views, as said above: {', '.join(refused)}. The others are done."
        )
