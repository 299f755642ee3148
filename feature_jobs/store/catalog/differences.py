"""What changed between two definitions of a view or a service, and what that does to whoever reads it.

All versions of a view share one feature table and one place in the online store, so a change is judged by what it does
to the readers of earlier versions:

    safe          They go on as before. A new column is null in older rows; time-to-live, longer or shorter, is applied
                  by each reader as its own version states it; checks, owner and descriptions say nothing about values;
                  where rows come from is not what they mean.
    restricts     They may lose access or old rows: purposes, region, a shorter retention. Never refused, because
                  governance must be able to take effect at once.
    breaking      They would read something else under the same name: a column is gone, so that new rows are null there;
                  the transform's code, the query, or the columns that say when a row was true or known have changed.
    incompatible  Rows of both versions cannot lie in one table: join keys, a column's type, or the class that decides
                  the key its old files are under.

Definitions are compared as the JSON that the ledger holds, so a view can be compared without its module. What this
release does not know counts as breaking.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from feature_jobs.store.catalog.specifications import declared_key_types

Definition = Mapping[str, Any]

_SAFE = {"ttl_s": "time-to-live", "owner": "owner", "subject_key": "subject key"}
_RESTRICTING = {"purposes": "purposes", "region": "region"}
_MEANING = ("event_timestamp", "created_timestamp", "deleted", "query", "columns", "nulls", "zone")
"""Of a source: what its rows say and when, as opposed to where they are."""
_HANDLED = frozenset(
    {
        "name",
        "entities",
        "join_keys",
        "schema",
        "source",
        "checks",
        "transform",
        "created_lag_s",
        "retention_s",
    }
    | _SAFE.keys()
    | _RESTRICTING.keys()
)


class Impact(enum.StrEnum):
    """What a change does to readers of earlier versions, ascending."""

    safe = "safe"
    restricts = "restricts"
    breaking = "breaking"
    incompatible = "incompatible"

    @property
    def breaks(self) -> bool:
        """Whether a reader of an earlier version would no longer get what it was made for."""
        return self in (Impact.breaking, Impact.incompatible)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One difference."""

    what: str
    before: str | None
    """None where there was nothing."""
    after: str | None
    """None where there is nothing any more."""
    impact: Impact = Impact.safe
    why: str = ""
    """Of an impact that is not safe."""

    @property
    def text(self) -> str:
        """As a plan prints it."""
        match self.before, self.after:
            case None, after:
                said = f"+ {self.what} {after}"
            case before, None:
                said = f"- {self.what} {before}"
            case before, after:
                said = f"~ {self.what} {before} -> {after}"
        return said if self.impact is Impact.safe else f"{said}  [{self.impact.value}: {self.why}]"


def view_changes(before: Definition, after: Definition) -> list[Change]:
    """The differences between two definitions of a view, the gravest kinds first."""
    return [
        *_key_changes(before, after),
        *_column_changes(before, after),
        *_code_changes(before, after),
        *_source_changes(before.get("source") or {}, after.get("source") or {}),
        *_check_changes(before, after),
        *_governance_changes(before, after),
        *_unknown_changes(before, after),
    ]


def _key_changes(before: Definition, after: Definition) -> Iterator[Change]:
    old, new = list(before["join_keys"]), list(after["join_keys"])
    if old != new:
        yield Change(
            what="join keys",
            before=", ".join(old),
            after=", ".join(new),
            impact=Impact.incompatible,
            why="stored rows are filed under the old keys",
        )
        return
    names = [", ".join(entity["name"] for entity in one["entities"]) for one in (before, after)]
    if names[0] != names[1] or _keys_by_entity(before) != _keys_by_entity(after):
        yield Change(what="entities", before=names[0], after=names[1])
    types = [declared_key_types(one) for one in (before, after)]
    for key in new:
        was, now = types[0].get(key), types[1].get(key)
        if was != now:
            # What an undeclared key is stored as is not known here; applying looks at the table.
            impact = Impact.safe if was is None or now is None else Impact.incompatible
            why = "stored rows have keys of the old type" if impact is Impact.incompatible else ""
            yield Change(what=f"join key {key} type", before=was, after=now, impact=impact, why=why)


def _keys_by_entity(definition: Definition) -> list[list[str]]:
    return [list(entity["join_keys"]) for entity in definition["entities"]]


def _column_changes(before: Definition, after: Definition) -> Iterator[Change]:
    old, new = ({field["name"]: field for field in one["schema"]} for one in (before, after))
    for name in [*old, *(name for name in new if name not in old)]:
        what = f"column {name}"
        if name not in new:
            why = "rows ingested from now on are null there"
            yield Change(what=what, before=_column(old[name]), after=None, impact=Impact.breaking, why=why)
        elif name not in old:
            yield Change(what=what, before=None, after=_column(new[name]))
        else:
            yield from _field_changes(what, old[name], new[name])
    kept = [[name for name in one if name in old and name in new] for one in (old, new)]
    if kept[0] != kept[1]:
        yield Change(what="column order", before=", ".join(kept[0]), after=", ".join(kept[1]))


def _field_changes(what: str, before: Definition, after: Definition) -> Iterator[Change]:
    for key, impact, why in (
        ("dtype", Impact.incompatible, "a stored column has one type; give the new one another name"),
        ("sensitivity", Impact.incompatible, "older files are under the other class's key"),
        ("categorical", Impact.safe, ""),
        ("description", Impact.safe, ""),
    ):
        old, new = before.get(key), after.get(key)
        if old != new:
            yield Change(what=f"{what} {key}", before=_short(old), after=_short(new), impact=impact, why=why)


def _code_changes(before: Definition, after: Definition) -> Iterator[Change]:
    old, new = (one.get("transform") or {} for one in (before, after))
    if old.get("sha256") != new.get("sha256"):
        yield Change(
            what="transform",
            before=_code(old),
            after=_code(new),
            impact=Impact.breaking,
            why="rows ingested from now on are made by other code",
        )
    elif old.get("name") != new.get("name"):
        yield Change(what="transform name", before=_short(old.get("name")), after=_short(new.get("name")))
    if before.get("created_lag_s") != after.get("created_lag_s"):
        yield Change(
            what="created_lag",
            before=_span(before.get("created_lag_s")),
            after=_span(after.get("created_lag_s")),
            impact=Impact.breaking,
            why="rows count as known at other times",
        )


def _source_changes(before: Definition, after: Definition) -> Iterator[Change]:
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if old != new:
            impact = Impact.breaking if key in _MEANING else Impact.safe
            why = "rows say something else, or at another time" if key in _MEANING else ""
            yield Change(
                what=f"source.{key}", before=_absent(old), after=_absent(new), impact=impact, why=why
            )


def _check_changes(before: Definition, after: Definition) -> Iterator[Change]:
    old, new = ([_check(check) for check in one.get("checks", [])] for one in (before, after))
    gone, come = set(old) - set(new), set(new) - set(old)
    yield from (Change(what="check", before=one, after=None) for one in old if one in gone)
    yield from (Change(what="check", before=None, after=one) for one in new if one in come)


def _governance_changes(before: Definition, after: Definition) -> Iterator[Change]:
    for key, what in (_SAFE | _RESTRICTING).items():
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        narrower = key == "region" or (key == "purposes" and _narrower(old or [], new or []))
        show = _span if key == "ttl_s" else _short
        yield Change(
            what=what,
            before=show(old),
            after=show(new),
            impact=Impact.restricts if narrower else Impact.safe,
            why="readers may lose access" if narrower else "",
        )
    old, new = before.get("retention_s"), after.get("retention_s")
    if old != new:
        shorter = new is not None and (old is None or new < old)
        yield Change(
            what="retention",
            before=_span(old),
            after=_span(new),
            impact=Impact.restricts if shorter else Impact.safe,
            why="older rows will go" if shorter else "",
        )


def _narrower(old: list[str], new: list[str]) -> bool:
    """Whether a purpose that was allowed no longer is; an empty list allows every purpose."""
    return bool(new) and (not old or not set(old) <= set(new))


def _unknown_changes(before: Definition, after: Definition) -> Iterator[Change]:
    """Of parts of a definition that have no rule of their own; a list of named things is compared by name."""
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if key in _HANDLED or old == new:
            continue
        named = [_by_name(one) for one in (old, new)]
        if named[0] is None or named[1] is None:
            yield _unknown(key, old, new)
            continue
        for name in dict.fromkeys([*named[0], *named[1]]):
            was, now = named[0].get(name), named[1].get(name)
            if was is None:
                yield Change(what=f"{key} {name}", before=None, after="")
            elif was != now:
                yield _unknown(f"{key} {name}", was, now)


def _unknown(what: str, before: Any, after: Any) -> Change:
    return Change(
        what=what,
        before=_absent(before),
        after=_absent(after),
        impact=Impact.breaking,
        why="values may mean something else",
    )


def _by_name(value: Any) -> dict[str, Any] | None:
    if value is None:
        return {}
    if not isinstance(value, list) or not all(isinstance(one, dict) and "name" in one for one in value):
        return None
    return {one["name"]: one for one in value}


def _column(field: Definition) -> str:
    return f"{field['dtype']}, {field['sensitivity']}"


def _check(check: Definition) -> str:
    rest = ", ".join(f"{key}={value}" for key, value in check.items() if key not in ("check", "column"))
    return f"{check.get('check')}({check.get('column', '')}{', ' if rest else ''}{rest})"


def _code(transform: Definition) -> str:
    return f"{transform['name']} {transform['sha256'][:8]}" if transform else "none"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return f"{seconds / 86400:g} days" if seconds >= 86400 else f"{seconds:g} s"


def _absent(value: Any) -> str | None:
    return None if value is None else _short(value)


def _short(value: Any) -> str:
    match value:
        case None | "":
            return "none"
        case list():
            return ", ".join(map(str, value)) or "all"
        case _:
            text = str(value)
            return text if len(text) <= 60 else f"{text[:57]}..."
