"""What becomes of a feature of which nothing is known, or nothing fresh: null, a default, or no answer at all.

A feature service says it, for all its features or for some. Only `missing` and `expired` values are meant: a null that
the source said is a value, and stays. A default is put in after all views were read, so a join key never comes from
one, and before on-demand transforms, which see what the model sees. Serving does it value by value and training column
by column, and a property test holds that both give the same.

A refusal has no counterpart in training: such rows stay null there, and whoever builds the set sees how many they are.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError, FeatureAbsent, did_you_mean
from feature_jobs.store.types.columns import with_replaced
from feature_jobs.store.types.dtypes import from_json, is_rich, online_value, to_json

Value: TypeAlias = Any
"""Of a default: bool, number or text; of a date, a decimal, bytes or a list its JSON form."""
ABSENT = frozenset({"missing", "expired", "newer"})
"""Statuses of values that a policy is about."""
_SAID = {"newer": "stored only as it was known after as_of"}


class Missing(enum.StrEnum):
    """What becomes of a value that is missing or expired, where it has no default."""

    NULL = "null"
    """The model gets null."""
    REFUSE = "refuse"
    """The request is refused, and the answer says why."""


@dataclass(frozen=True, slots=True)
class Default:
    """The value that stands in for one that is missing or expired, online and in training sets."""

    value: Value


Choice: TypeAlias = Missing | Default


@dataclass(frozen=True, kw_only=True, slots=True)
class MissingPolicy:
    """What a service says, as whoever reads it needs it: by `<view>__<feature>`, nothing for null."""

    defaults: dict[str, Value] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.defaults or self.refused)


NO_POLICY = MissingPolicy()


def definition(
    service: str, given: Missing | Mapping[str, Choice], views: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """A service's policy as JSON: `<view>__<feature>` to what is done, without those that are null.

    Args:
        service: its name.
        given: one for all features, or by view or `<view>__<feature>`, of which the latter counts before the former.
        views: name to feature to dtype.

    Raises:
        DefinitionError: naming what is unknown, or the default that does not fit.
    """
    if given is Missing.NULL:
        return {}
    chosen: dict[str, tuple[Choice, str]] = {}
    for view, fields in views.items():
        for name, dtype in fields.items():
            column = f"{view}__{name}"
            choice = given if isinstance(given, Missing) else given.get(column, given.get(view, Missing.NULL))
            if isinstance(choice, Default) and not isinstance(given, Missing) and column not in given:
                raise DefinitionError(
                    f"Feature service '{service}': a default stands in for one feature, not for the view '{view}'. "
                    f"Name the feature, as '{column}'."
                )
            chosen[column] = choice, dtype
    if not isinstance(given, Missing):
        known = [*views, *chosen]
        for name in given:
            if name not in known:
                raise DefinitionError(
                    f"Feature service '{service}' says what to do where '{name}' is missing, but has no such feature."
                    f"{did_you_mean(name, known)}"
                )
    return {
        column: _stated(f"Feature service '{service}', '{column}'", choice, dtype)
        for column, (choice, dtype) in chosen.items()
        if choice is not Missing.NULL
    }


def parse(stated: Mapping[str, Mapping[str, Any]], dtypes: Mapping[str, str]) -> MissingPolicy:
    """The policy in a definition's JSON; `dtypes` by `<view>__<feature>`."""
    return MissingPolicy(
        defaults={
            column: _typed(one["value"], dtypes[column])
            for column, one in stated.items()
            if one["then"] == "default"
        },
        refused=tuple(column for column, one in stated.items() if one["then"] == Missing.REFUSE),
    )


def settle(
    policy: MissingPolicy,
    columns: dict[str, list[Any]],
    status: Mapping[str, Sequence[str]],
    *,
    service: str,
    needed: Collection[str],
) -> dict[str, list[int]]:
    """Put defaults into columns that were read online; gives the rows of each where one was put in.

    Args:
        policy: the service's.
        columns: `<view>__<feature>` to one value an entity, changed in place.
        status: of each value.
        service: its name, for the refusal.
        needed: the columns that the answer rests on; of the others it does not matter.

    Raises:
        FeatureAbsent: a needed value is missing or expired that may not be.
    """
    refused = {
        name: list(map(str, status[name]))
        for name in policy.refused
        if name in needed and not ABSENT.isdisjoint(status[name])
    }
    if refused:
        raise _refusal(service, refused)
    put_in = {}
    for name, default in policy.defaults.items():
        if name in needed and not ABSENT.isdisjoint(status[name]):
            rows = [row for row, one in enumerate(status[name]) if one in ABSENT]
            for row in rows:
                columns[name][row] = default
            put_in[name] = rows
    return put_in


def fill(policy: MissingPolicy, table: pa.Table, absent: Mapping[str, pa.Array]) -> pa.Table:
    """Put defaults into columns that were joined offline.

    Args:
        policy: the service's.
        table: has the columns, nulls where nothing is known.
        absent: view to whether a row found nothing there, or nothing fresh.
    """
    filled = {}
    for name, default in policy.defaults.items():
        column = table[name]
        stands_in = pa.scalar(Decimal(default) if pa.types.is_decimal(column.type) else default, column.type)
        filled[name] = pc.if_else(absent[view_of(name)], stands_in, column)
    return with_replaced(table, filled)


def view_of(column: str) -> str:
    """The view of a column. A view's name has no "__", but may end with "_"; a feature's begins with a letter."""
    name, _, rest = column.partition("__")
    return name + "_" * (len(rest) - len(rest.lstrip("_")))


def _stated(what: str, choice: Choice, dtype: str) -> dict[str, Any]:
    match choice:
        case Missing.REFUSE:
            return {"then": Missing.REFUSE.value}
        case Default(value=value) if _fits(value, dtype):
            typed = _typed(value, dtype)
            # As the ledger writes whole numbers that not every reader of JSON holds exactly.
            is_large = isinstance(typed, int) and abs(typed) > 2**53
            [shown] = to_json([str(typed) if is_large else typed], dtype)
            return {"then": "default", "value": shown}
        case Default():
            like = "none fits a time" if dtype == "timestamp" else f"give one of type {dtype}"
            like = f"{like}, as JSON has it" if is_rich(dtype) else like
            raise DefinitionError(f"{what}: the default {_shown(choice.value)} does not fit {dtype}; {like}.")
        case _:
            raise DefinitionError(
                f"{what}: {choice!r} is no policy. Use Missing.NULL, Missing.REFUSE or Default(…)."
            )


def _fits(value: Any, dtype: str) -> bool:
    match dtype:
        case "bool":
            return isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "int32" | "int64":
            limits = np.iinfo(dtype)
            return (
                isinstance(value, int) and not isinstance(value, bool) and limits.min <= value <= limits.max
            )
        case "float32" | "float64":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return number and abs(value) <= float(np.finfo(dtype).max)  # which neither NaN nor infinity is
        case _ if is_rich(dtype):
            try:
                from_json(value, dtype)
            except ValueError:
                return False
            return True
        case _:
            return False


def _shown(value: Any) -> str:
    """Python refuses to write very large whole numbers."""
    is_large = isinstance(value, int) and abs(value) > 10**99
    return "of more than 99 digits" if is_large else repr(value)


def _typed(value: Any, dtype: str) -> Value:
    """A default as the stores give its feature; the ledger has large whole numbers as text."""
    match dtype:
        case "int32" | "int64":
            return int(value)
        case "float32":
            return float(np.float32(value))
        case "float64":
            return float(value)
        case _ if is_rich(dtype):
            return online_value(value, dtype)
        case _:
            kept: Value = value
            return kept


def _refusal(service: str, refused: dict[str, list[str]]) -> FeatureAbsent:
    name, found = next(iter(refused.items()))
    row, status = next(_absent_rows(found))
    more = sum(len(list(_absent_rows(one))) for one in refused.values()) - 1
    view = view_of(name)
    feature = name[len(view) + 2 :]
    return FeatureAbsent(
        f"Feature '{feature}' of view '{view}' is {_SAID.get(status, status)} for entities[{row}]"
        f"{f', and {more} more values are not there' if more else ''}; feature service '{service}' refuses to go on "
        f"without. Give '{name}' in \"features\", or ask again when the view has a newer value.",
        status=refused,
    )


def _absent_rows(status: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((row, one) for row, one in enumerate(status) if one in ABSENT)
