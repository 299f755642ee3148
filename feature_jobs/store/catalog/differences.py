"""Compare two definitions of a view, and classify each change by its impact on readers of earlier versions.

All versions of a view share one feature table and the same online rows. So a change has one of four impacts on readers
of earlier versions:

    safe          Readers are not affected. A new column is null in older rows. Each reader applies the TTL of its own
                  version. Checks, owner and descriptions do not affect values, and neither does the location of the
                  source.
    restricts     Readers may lose access or old rows: fewer purposes, another region, a shorter retention. Such a
                  change is never refused, because governance must be able to take effect at once.
    breaking      Readers would get other values under the same name. For example, a column was removed, so it is null
                  in new rows. Or the transform's code, the query, or the column of event or created time has changed.
    incompatible  Rows of both versions cannot be in one table: a change of join keys, of a column's type, or of a
                  column's sensitivity, which selects the encryption key of its files.

Definitions are compared as the JSON in the ledger, so no module is needed. A change in a part of the definition that
this release does not know is breaking.
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
"""Fields of a source that decide its rows' values and times. The other fields only say where the rows are."""
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
    """Impact of a change on readers of earlier versions, in ascending order."""

    safe = "safe"
    restricts = "restricts"
    breaking = "breaking"
    incompatible = "incompatible"

    @property
    def breaks(self) -> bool:
        """Whether readers of an earlier version would no longer get the values they expect."""
        return self in (Impact.breaking, Impact.incompatible)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change between two definitions."""

    subject: str
    """The part of the definition that changed."""
    before: str | None
    """None if the part was added."""
    after: str | None
    """None if the part was removed."""
    impact: Impact = Impact.safe
    reason: str = ""
    """Reason for an impact that is not safe."""

    @property
    def text(self) -> str:
        """The change as a plan prints it."""
        match self.before, self.after:
            case None, after:
                line = f"+ {self.subject} {after}"
            case before, None:
                line = f"- {self.subject} {before}"
            case before, after:
                line = f"~ {self.subject} {before} -> {after}"
        return line if self.impact is Impact.safe else f"{line}  [{self.impact.value}: {self.reason}]"


def view_changes(before: Definition, after: Definition) -> list[Change]:
    """Return the changes between two definitions of a view, with the most severe kinds first."""
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
            subject="join keys",
            before=", ".join(old),
            after=", ".join(new),
            impact=Impact.incompatible,
            reason="stored rows have the old keys",
        )
        return
    old_names, new_names = _entity_names(before), _entity_names(after)
    if old_names != new_names or _keys_by_entity(before) != _keys_by_entity(after):
        yield Change(subject="entities", before=old_names, after=new_names)
    old_types, new_types = declared_key_types(before), declared_key_types(after)
    for key in new:
        old_type, new_type = old_types.get(key), new_types.get(key)
        if old_type == new_type:
            continue
        subject = f"join key {key} type"
        if old_type is None or new_type is None:
            # The stored type of an undeclared key is not known here. `feature_jobs.apply` compares with the table.
            yield Change(subject=subject, before=old_type, after=new_type)
        else:
            yield Change(
                subject=subject,
                before=old_type,
                after=new_type,
                impact=Impact.incompatible,
                reason="stored rows have keys of the old type",
            )


def _entity_names(definition: Definition) -> str:
    return ", ".join(entity["name"] for entity in definition["entities"])


def _keys_by_entity(definition: Definition) -> list[list[str]]:
    return [list(entity["join_keys"]) for entity in definition["entities"]]


def _column_changes(before: Definition, after: Definition) -> Iterator[Change]:
    old, new = ({field["name"]: field for field in definition["schema"]} for definition in (before, after))
    for name in _merged_keys(old, new):
        subject = f"column {name}"
        if name not in new:
            yield Change(
                subject=subject,
                before=_column(old[name]),
                after=None,
                impact=Impact.breaking,
                reason="rows ingested from now on are null there",
            )
        elif name not in old:
            yield Change(subject=subject, before=None, after=_column(new[name]))
        else:
            yield from _field_changes(subject, old[name], new[name])
    old_order, new_order = (
        ", ".join(name for name in fields if name in old and name in new) for fields in (old, new)
    )
    if old_order != new_order:
        yield Change(subject="column order", before=old_order, after=new_order)


def _field_changes(subject: str, before: Definition, after: Definition) -> Iterator[Change]:
    for key, impact, reason in (
        ("dtype", Impact.incompatible, "a stored column has one type; give the new one another name"),
        ("sensitivity", Impact.incompatible, "older files are encrypted with the key of the old class"),
        ("categorical", Impact.safe, ""),
        ("description", Impact.safe, ""),
    ):
        old, new = before.get(key), after.get(key)
        if old != new:
            yield Change(
                subject=f"{subject} {key}",
                before=_short(old),
                after=_short(new),
                impact=impact,
                reason=reason,
            )


def _code_changes(before: Definition, after: Definition) -> Iterator[Change]:
    old, new = (definition.get("transform") or {} for definition in (before, after))
    if old.get("sha256") != new.get("sha256"):
        yield Change(
            subject="transform",
            before=_code(old),
            after=_code(new),
            impact=Impact.breaking,
            reason="rows ingested from now on are computed by other code",
        )
    elif old.get("name") != new.get("name"):
        yield Change(subject="transform name", before=_short(old.get("name")), after=_short(new.get("name")))
    if before.get("created_lag_s") != after.get("created_lag_s"):
        yield Change(
            subject="created_lag",
            before=_span(before.get("created_lag_s")),
            after=_span(after.get("created_lag_s")),
            impact=Impact.breaking,
            reason="rows count as known at other times",
        )


def _source_changes(before: Definition, after: Definition) -> Iterator[Change]:
    for key in _merged_keys(before, after):
        old, new = before.get(key), after.get(key)
        if old != new:
            changes_values = key in _MEANING
            yield Change(
                subject=f"source.{key}",
                before=_short_or_none(old),
                after=_short_or_none(new),
                impact=Impact.breaking if changes_values else Impact.safe,
                reason="rows have other values or other times" if changes_values else "",
            )


def _check_changes(before: Definition, after: Definition) -> Iterator[Change]:
    old, new = ([_check(check) for check in definition.get("checks", [])] for definition in (before, after))
    removed, added = set(old) - set(new), set(new) - set(old)
    yield from (Change(subject="check", before=check, after=None) for check in old if check in removed)
    yield from (Change(subject="check", before=None, after=check) for check in new if check in added)


def _governance_changes(before: Definition, after: Definition) -> Iterator[Change]:
    for key, subject in (_SAFE | _RESTRICTING).items():
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        restricts = key == "region" or (key == "purposes" and _removes_purpose(old or [], new or []))
        text = _span if key == "ttl_s" else _short
        yield Change(
            subject=subject,
            before=text(old),
            after=text(new),
            impact=Impact.restricts if restricts else Impact.safe,
            reason="readers may lose access" if restricts else "",
        )
    old, new = before.get("retention_s"), after.get("retention_s")
    if old != new:
        is_shorter = new is not None and (old is None or new < old)
        yield Change(
            subject="retention",
            before=_span(old),
            after=_span(new),
            impact=Impact.restricts if is_shorter else Impact.safe,
            reason="older rows will be removed" if is_shorter else "",
        )


def _removes_purpose(old: list[str], new: list[str]) -> bool:
    """Return whether a purpose that was allowed is not allowed any more. An empty list allows every purpose."""
    return bool(new) and (not old or not set(old) <= set(new))


def _unknown_changes(before: Definition, after: Definition) -> Iterator[Change]:
    """Yield changes of the parts that have no rule above. Lists of named entries are compared by name."""
    for key in _merged_keys(before, after):
        old, new = before.get(key), after.get(key)
        if key in _HANDLED or old == new:
            continue
        old_entries, new_entries = _by_name(old), _by_name(new)
        if old_entries is None or new_entries is None:
            yield _unknown(key, old, new)
            continue
        for name in _merged_keys(old_entries, new_entries):
            old_entry, new_entry = old_entries.get(name), new_entries.get(name)
            if old_entry is None:
                yield Change(subject=f"{key} {name}", before=None, after="")
            elif old_entry != new_entry:
                yield _unknown(f"{key} {name}", old_entry, new_entry)


def _unknown(subject: str, before: Any, after: Any) -> Change:
    return Change(
        subject=subject,
        before=_short_or_none(before),
        after=_short_or_none(after),
        impact=Impact.breaking,
        reason="values may have another meaning",
    )


def _by_name(value: Any) -> dict[str, Any] | None:
    """Index a list of named entries by name. Return None if the value is something else."""
    if value is None:
        return {}
    if not isinstance(value, list) or not all(isinstance(entry, dict) and "name" in entry for entry in value):
        return None
    return {entry["name"]: entry for entry in value}


def _merged_keys(before: Definition, after: Definition) -> list[str]:
    """Return the keys of both definitions without repetition, the old keys first."""
    return list(dict.fromkeys([*before, *after]))


def _column(field: Definition) -> str:
    return f"{field['dtype']}, {field['sensitivity']}"


def _check(check: Definition) -> str:
    column = [check["column"]] if "column" in check else []
    arguments = [f"{key}={value}" for key, value in check.items() if key not in ("check", "column")]
    return f"{check.get('check')}({', '.join([*column, *arguments])})"


def _code(transform: Definition) -> str:
    return f"{transform['name']} {transform['sha256'][:8]}" if transform else "none"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return f"{seconds / 86400:g} days" if seconds >= 86400 else f"{seconds:g} s"


def _short_or_none(value: Any) -> str | None:
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
