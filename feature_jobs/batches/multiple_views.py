"""Run a command for several views: `view=income`, `view=[income,sector]` or `view=all`."""

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
"""Stands for every view that the command can process. A view that is itself named `all` is `view=[all]`."""


def validate_views(setting: Any) -> None:
    """Validate that `view=…` is a text or a list of texts. The configuration schema has no such type.

    Raises:
        ValueError: the setting is something else, or an empty list.
    """
    names = setting if isinstance(setting, list) else [setting]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"view must be a name, a list as [a,b], or {ALL}, got {setting}.")


def resolve_views(setting: str | list[str], known: Iterable[str]) -> list[str]:
    """Return the views that `view=…` names, each once.

    Args:
        setting: a name, several names, or `ALL`.
        known: the views that `ALL` stands for.

    Raises:
        ConfigError: the setting is `ALL`, and there are no known views.
    """
    if setting != ALL:
        return list(dict.fromkeys(setting)) if isinstance(setting, list) else [setting]
    names = list(known)
    if not names:
        raise ConfigError(
            "view=all finds no view that this command can take. Name one, or apply the definitions."
        )
    return names


def views_with_batches(definitions: str, ledger: Ledger) -> Iterator[str]:
    """Yield the module's views that can ingest batches. Retired views and views of Kafka topics are left out.

    This is a generator, so the ledger is read only if the command does not name its views.
    """
    states = read_lifecycles(ledger)
    for view in load_definitions(definitions).views.values():
        retired = view.name in states and states[view.name].state is ViewState.retired
        if not retired and not isinstance(view.source, KafkaSource):
            yield view.name


def for_each(views: Sequence[str], run: Callable[[str], None]) -> None:
    """Call a function for each view. If one view is refused, the others still run.

    Raises:
        RefusedError: at least one view was refused; raised after the last view.
    """
    refused = []
    for view in views:
        try:
            run(view)
        except RefusedError as error:
            if len(views) == 1:
                raise
            refused.append(view)
            print(f"view {view}: refused: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if refused:
        raise RefusedError(
            f"{len(refused)} of {len(views)} views, for the reasons above: {', '.join(refused)}. "
            "The others are done."
        )
