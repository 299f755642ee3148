"""Policies for missing and expired feature values: return null, use a default, or refuse the request.

A feature service declares a policy for all of its features, or for some. A policy applies to missing, expired and newer
values only. A null from the source is a value and stays. Defaults are filled in after all views were read, so a join
key never comes from a default. They are filled in before on-demand transforms run, so that transforms get the same
values as the model. Serving fills values one by one and training fills whole columns; a property test checks that both
give the same result.

A refusal applies to requests only. In a training set such values stay null, and the manifest has the share of nulls.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError, FeatureAbsent, did_you_mean
from feature_jobs.store.definitions.limits import EXACT
from feature_jobs.store.types.columns import replace_columns
from feature_jobs.store.types.dtypes import from_json, is_rich, online_value, to_json

Value: TypeAlias = Any
"""A default: a bool, number or text, or the JSON form of a date, a decimal, bytes or a list."""
ABSENT = frozenset({"missing", "expired", "newer"})
"""Statuses of the values that a policy applies to."""
_STATUS_TEXT = {"newer": "stored only as it was known after as_of"}


class Missing(enum.StrEnum):
    """Policies for a missing or expired value without a default."""

    NULL = "null"
    """The model gets null."""
    REFUSE = "refuse"
    """The request is refused, and the response gives the reason."""


@dataclass(frozen=True, slots=True)
class Default:
    """A value that replaces missing and expired values, online and in training sets."""

    value: Value


Choice: TypeAlias = Missing | Default


@dataclass(frozen=True, kw_only=True, slots=True)
class MissingPolicy:
    """The policy of a service, by `<view>__<feature>`. Features that become null are not listed."""

    defaults: dict[str, Value] = field(default_factory=dict)
    """Feature to its default."""
    refused: tuple[str, ...] = ()
    """If one of these features is absent, the request is refused."""

    def __bool__(self) -> bool:
        return bool(self.defaults or self.refused)


NO_POLICY = MissingPolicy()


def policy_definition(
    service: str, choices: Missing | Mapping[str, Choice], views: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Return a service's policy as JSON, by `<view>__<feature>`. Features that become null are left out.

    Args:
        service: The service's name, for messages.
        choices: One choice for all features, or choices by view or `<view>__<feature>`. A feature's own choice takes
            precedence over its view's.
        views: View to feature to dtype.

    Raises:
        DefinitionError: A name is unknown, or a default does not fit its feature.
    """
    if choices is Missing.NULL:
        return {}
    dtypes = {f"{view}__{name}": dtype for view, fields in views.items() for name, dtype in fields.items()}
    if isinstance(choices, Missing):
        chosen: dict[str, Choice] = dict.fromkeys(dtypes, choices)
    else:
        chosen = _choices_by_feature(service, choices, views)
    return {
        column: _choice_definition(f"Feature service '{service}', '{column}'", choice, dtypes[column])
        for column, choice in chosen.items()
        if choice is not Missing.NULL
    }


def _choices_by_feature(
    service: str, choices: Mapping[str, Choice], views: Mapping[str, Mapping[str, str]]
) -> dict[str, Choice]:
    """Resolve choices by view and by feature to one choice per `<view>__<feature>`.

    Raises:
        DefinitionError: A name is unknown, or a view has a default.
    """
    chosen: dict[str, Choice] = {}
    for view, fields in views.items():
        for name in fields:
            column = f"{view}__{name}"
            choice = choices.get(column, choices.get(view, Missing.NULL))
            if isinstance(choice, Default) and column not in choices:
                raise DefinitionError(
                    f"Feature service '{service}': a default is for one feature, not for the view '{view}'. "
                    f"Name the feature, as '{column}'."
                )
            chosen[column] = choice
    known = [*views, *chosen]
    for name in choices:
        if name not in known:
            raise DefinitionError(
                f"Feature service '{service}' has a policy for '{name}', but no such view or feature."
                f"{did_you_mean(name, known)}"
            )
    return chosen


def parse_policy(stated: Mapping[str, Mapping[str, Any]], dtypes: Mapping[str, str]) -> MissingPolicy:
    """Parse the JSON of `policy_definition`.

    Args:
        stated: The JSON, by `<view>__<feature>`.
        dtypes: Dtypes by `<view>__<feature>`.
    """
    return MissingPolicy(
        defaults={
            column: _typed(entry["value"], dtypes[column])
            for column, entry in stated.items()
            if entry["then"] == "default"
        },
        refused=tuple(column for column, entry in stated.items() if entry["then"] == Missing.REFUSE),
    )


def fill_online(
    policy: MissingPolicy,
    columns: dict[str, list[Any]],
    status: Mapping[str, Sequence[str]],
    *,
    service: str,
    needed: Collection[str],
) -> dict[str, list[int]]:
    """Fill defaults into columns that were read online.

    Args:
        policy: The service's policy.
        columns: `<view>__<feature>` to one value per entity. Changed in place.
        status: The status of each value.
        service: The service's name, for messages.
        needed: The columns that the answer depends on. The policy is applied to these only.

    Returns:
        The row numbers that were filled, by column.

    Raises:
        FeatureAbsent: A needed value is missing, expired or newer, and the policy is to refuse the request.
    """
    refused = {
        name: list(map(str, status[name]))
        for name in policy.refused
        if name in needed and not ABSENT.isdisjoint(status[name])
    }
    if refused:
        raise _refusal(service, refused)
    filled_rows = {}
    for name, default in policy.defaults.items():
        if name in needed and not ABSENT.isdisjoint(status[name]):
            rows = [row for row, value_status in enumerate(status[name]) if value_status in ABSENT]
            for row in rows:
                columns[name][row] = default
            filled_rows[name] = rows
    return filled_rows


def fill_offline(policy: MissingPolicy, table: pa.Table, absent: Mapping[str, pa.Array]) -> pa.Table:
    """Fill defaults into columns that were joined offline.

    Args:
        policy: The service's policy.
        table: The joined columns, with nulls for missing and expired values.
        absent: View to a mask of the rows whose values from that view are missing or expired.
    """
    filled = {}
    for name, default in policy.defaults.items():
        column = table[name]
        scalar = pa.scalar(Decimal(default) if pa.types.is_decimal(column.type) else default, column.type)
        filled[name] = pc.if_else(absent[view_of(name)], scalar, column)
    return replace_columns(table, filled)


def view_of(column: str) -> str:
    """Return the view's name in `<view>__<feature>`.

    A view's name contains no "__" but may end with "_". A feature's name begins with a letter.
    """
    name, _, rest = column.partition("__")
    return name + "_" * (len(rest) - len(rest.lstrip("_")))


def _choice_definition(owner: str, choice: Choice, dtype: str) -> dict[str, Any]:
    """Return one choice as JSON.

    Raises:
        DefinitionError: `choice` is not a policy, or its default does not fit the dtype.
    """
    match choice:
        case Missing.REFUSE:
            return {"then": Missing.REFUSE.value}
        case Default(value=value) if _fits(value, dtype):
            typed = _typed(value, dtype)
            # The ledger writes large whole numbers as text, because not every JSON reader reads them exactly.
            is_large = isinstance(typed, int) and abs(typed) > EXACT
            [json_value] = to_json([str(typed) if is_large else typed], dtype)
            return {"then": "default", "value": json_value}
        case Default():
            hint = (
                "timestamps cannot have a default"
                if dtype == "timestamp"
                else f"give a value of type {dtype}"
            )
            hint = f"{hint}, in its JSON form" if is_rich(dtype) else hint
            raise DefinitionError(
                f"{owner}: the default {_value_text(choice.value)} does not fit {dtype}; {hint}."
            )
        case _:
            raise DefinitionError(
                f"{owner}: {choice!r} is not a policy. Use Missing.NULL, Missing.REFUSE or Default(…)."
            )


def _fits(value: Any, dtype: str) -> bool:
    """Return whether a value is a valid default for a dtype."""
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
            return number and abs(value) <= float(np.finfo(dtype).max)  # False for NaN and infinity
        case _ if is_rich(dtype):
            try:
                from_json(value, dtype)
            except ValueError:
                return False
            return True
        case _:
            return False


def _value_text(value: Any) -> str:
    """Format a value for a message. Python cannot convert very large whole numbers to text."""
    is_large = isinstance(value, int) and abs(value) > 10**99
    return "of more than 99 digits" if is_large else repr(value)


def _typed(value: Any, dtype: str) -> Value:
    """Convert a default to the value that the stores return for its dtype. Large whole numbers may be text."""
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
            unchanged: Value = value
            return unchanged


def _refusal(service: str, refused: dict[str, list[str]]) -> FeatureAbsent:
    """Build the error that names the first refused value and counts the others."""
    name, statuses = next(iter(refused.items()))
    row = next(row for row, status in enumerate(statuses) if status in ABSENT)
    num_absent = sum(status in ABSENT for statuses in refused.values() for status in statuses)
    view = view_of(name)
    feature = name[len(view) + 2 :]
    return FeatureAbsent(
        f"Feature '{feature}' of view '{view}' is {_STATUS_TEXT.get(statuses[row], statuses[row])} for entities[{row}]"
        f"{f', and {num_absent - 1} more values are absent' if num_absent > 1 else ''}; feature service '{service}' "
        f"requires a value. Give '{name}' in \"features\", or retry when the view has a newer value.",
        status=refused,
    )
