"""Validation of names in definitions.

Delta, SQL engines and some file systems treat two names that differ only in case as the same name. So names that share
a table or a folder must differ in more than case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from cluster.errors import DefinitionError
from feature_jobs.store.types.schema import BUCKET, CREATED, DELETED, EVENT, INGESTED, SEQ

RESERVED = frozenset({EVENT, CREATED, INGESTED, SEQ, BUCKET, DELETED})
"""Columns that the platform adds to a feature table."""
LONGEST_NAME = 200
"""Maximum length of a view's or a service's name. Requests contain it, and a view's name is also a folder's name."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class Named(NamedTuple):
    """A name and the kind of thing that has it."""

    kind: str
    """"join key", "field" and so on."""
    name: str


def validate_name(kind: str, name: str, *, longest: int | None = None) -> None:
    """Validate a name: letters, digits and underscores, a letter first.

    Args:
        kind: The kind of thing that has the name, for messages.
        name: The name to validate.
        longest: The maximum number of characters. None is no limit.

    Raises:
        DefinitionError: The name is invalid or too long.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DefinitionError(f"{kind} {name!r}: a name is letters, digits and underscores, a letter first.")
    if longest is not None and len(name) > longest:
        raise DefinitionError(
            f"{kind} '{name[:40]}…': a name has at most {longest} characters, got {len(name)}."
        )


def first_repeated_name(names: Iterable[str]) -> str | None:
    """Return the first name that occurs a second time, or None if all names differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def require_not_reserved(owner: str, column: Named) -> None:
    """Require that a column's name is not a name of the platform. Upper and lower case do not matter.

    Raises:
        DefinitionError: The name is reserved, or differs only in case from a reserved name.
    """
    kind, name = column
    if name in RESERVED:
        raise DefinitionError(f"{owner}: the {kind} name '{name}' is reserved for the platform.")
    if name.lower() in RESERVED:
        raise DefinitionError(
            f"{owner}: the {kind} '{name}' differs only in case from '{name.lower()}', which is reserved for the "
            "platform. Rename it."
        )


def require_distinct_names(owner: str, names: Iterable[Named]) -> None:
    """Require that names differ in more than case.

    Raises:
        DefinitionError: Two names are equal or differ only in case. The message has both.
    """
    seen: dict[str, Named] = {}
    for named in names:
        other = seen.setdefault(named.name.lower(), named)
        if other is named:
            continue
        if other.name == named.name:
            raise DefinitionError(f"{owner} names the {named.kind} '{named.name}' twice.")
        raise DefinitionError(
            f"{owner}: the {other.kind} '{other.name}' and the {named.kind} '{named.name}' differ only in case. "
            "Rename one."
        )


def require_distinct_new_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Require that new names differ in more than case from each other and from known names.

    Raises:
        DefinitionError: Two names differ only in case. The message has both.
    """
    known = set(known)
    by_lower_case = {name.lower(): name for name in known}
    for name in names:
        other = by_lower_case.setdefault(name.lower(), name)
        if other != name and name not in known:
            raise DefinitionError(
                f"The {kind} '{name}' differs only in case from the {kind} '{other}', and some file systems treat both "
                "as one folder. Rename it."
            )
