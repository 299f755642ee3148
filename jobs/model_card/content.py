"""The content of a card, for both pages: sections of facts, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from cluster.ledger.chain import Entry
from jobs.pipeline.report.formats import ABSENT

SHOWN = 30
"""A table or figure has at most this many inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A drawing with its caption."""

    drawing: Markup
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part of a card."""

    title: str
    text: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    events: Sequence[Entry] = ()
    """The ledger's entries that the section is made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A model card."""

    title: str
    lead: str
    sections: Sequence[Section]


def number(value: float | None) -> str:
    """Format a metric with four significant digits."""
    return ABSENT if value is None else f"{value:.4g}"


def interval(ends: list[float] | None) -> str:
    return ABSENT if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def short(digest: str | None) -> str:
    return digest[:16] if digest else ABSENT
