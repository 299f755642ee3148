"""Names in definitions: which are allowed, and which are too much alike.

Delta, SQL engines and some disks take two names for one that differ only in case. So names that share a table or a
folder must differ in more than that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from cluster.errors import DefinitionError

RESERVED = frozenset(
    {"event_timestamp", "created_timestamp", "ingested_at", "ingest_seq", "bucket", "deleted"}
)
"""Columns that the platform adds to a feature table."""
LONGEST_NAME = 200
"""Of a view or a service: clients ask by it, and a view's is also the name of a folder."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class Named(NamedTuple):
    """A thing with a name."""

    what: str
    """"join key", "field" and so on."""
    name: str


def check_name(what: str, name: str, *, longest: int | None = None) -> None:
    """Refuse what is no name.

    Args:
        what: says whose name it is.
        name: as it was given.
        longest: how many characters it may have; None is any number.

    Raises:
        DefinitionError
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DefinitionError(f"{what} {name!r}: a name is letters, digits and underscores, a letter first.")
    if longest is not None and len(name) > longest:
        raise DefinitionError(
            f"{what} '{name[:40]}…': a name has at most {longest} characters, got {len(name)}."
        )


def repeated_name(names: Iterable[str]) -> str | None:
    """The first name that comes a second time; None where all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def refuse_reserved(owner: str, one: Named) -> None:
    """Refuse a column's name that is the platform's, in any case.

    Raises:
        DefinitionError: naming both.
    """
    if one.name in RESERVED:
        raise DefinitionError(f"{owner}: the {one.what} name '{one.name}' is kept for the platform.")
    if one.name.lower() in RESERVED:
        raise DefinitionError(
            f"{owner}: the {one.what} '{one.name}' differs only in case from '{one.name.lower()}', which is kept for "
            "the platform. Rename it."
        )


def refuse_alike(owner: str, names: Iterable[Named]) -> None:
    """Refuse names that are the same, or differ only in case.

    Raises:
        DefinitionError: naming both.
    """
    seen: dict[str, Named] = {}
    for one in names:
        other = seen.setdefault(one.name.lower(), one)
        if other is one:
            continue
        if other.name == one.name:
            raise DefinitionError(f"{owner} names the {one.what} '{one.name}' twice.")
        raise DefinitionError(
            f"{owner}: the {other.what} '{other.name}' and the {one.what} '{one.name}' differ only in case. Rename one."
        )


def refuse_new_alike(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse new names that differ only in case from each other or from a known one; known names stay as they are.

    Raises:
        DefinitionError: naming both.
    """
    taken = set(known)
    spelled = {name.lower(): name for name in taken}
    for name in names:
        other = spelled.setdefault(name.lower(), name)
        if other != name and name not in taken:
            raise DefinitionError(
                f"The {what} '{name}' differs only in case from the {what} '{other}', and some disks take both for "
                "one folder. Rename it."
            )
