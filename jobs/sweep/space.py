"""The search space of a sweep: which values each hyper-parameter of a family may have."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import ConfigError, did_you_mean
from jobs.train.families import ResolvedFamily, resolve_family

Scalar = bool | int | float | str | None
_FORMS = "`{from: 0.001, to: 0.01, log: true}` or `{choices: [64, 128]}`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """A value of a list."""

    values: tuple[Scalar, ...]

    @property
    def limits(self) -> tuple[Scalar, ...]:
        """Values that the family must accept."""
        return self.values

    def draw(self, generator: np.random.Generator) -> Scalar:
        return self.values[int(generator.integers(len(self.values)))]

    def distribution(self) -> Any:
        """Return the domain as Optuna's distribution."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A number between two bounds, both included."""

    low: float
    high: float
    is_log: bool
    is_whole: bool

    @property
    def limits(self) -> tuple[Scalar, ...]:
        """Values that the family must accept."""
        return (self.low, self.high)

    def draw(self, generator: np.random.Generator) -> Scalar:
        low, high = (self.low - 0.5, self.high + 0.5) if self.is_whole else (self.low, self.high)
        if self.is_log:
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
        else:
            value = float(generator.uniform(low, high))
        value = min(max(value, self.low), self.high)
        return min(max(round(value), int(self.low)), int(self.high)) if self.is_whole else value

    def distribution(self) -> Any:
        """Return the domain as Optuna's distribution."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high), log=self.is_log)
        return FloatDistribution(self.low, self.high, log=self.is_log)


Space = dict[str, Choices | Range]


def parse_space(space: Mapping[str, Any], model: Mapping[str, Any], family: ResolvedFamily) -> Space:
    """Return the validated search space of a family.

    Args:
        space: The configured space, see `SearchConfig.space`.
        model: Family and hyper-parameters of the trials that are not searched.
        family: The resolved family.

    Raises:
        ConfigError: The space is empty, a name is not a hyper-parameter of the family, or a value is out of range.
    """
    if not space:
        raise ConfigError(
            "sweep.space is empty, so there is nothing to search. Set a hyper-parameter of "
            f"'{family.name}' with `+sweep.space.<name>=…` and {_FORMS}."
        )
    known = {field.name for field in dataclasses.fields(family.parameters)}
    hints = typing.get_type_hints(type(family.parameters))
    parsed: Space = {}
    for name, entry in space.items():
        if name not in known:
            raise ConfigError(
                f"sweep.space.{name}: family '{family.name}' has no hyper-parameter '{name}'."
                f"{did_you_mean(name, known)} Known: {', '.join(sorted(known))}."
            )
        parsed[name] = _parse_entry(name, entry, is_whole=_is_whole(hints[name]))
        for value in parsed[name].limits:
            _require_accepted(name, value, model)
    return parsed


def draw(space: Space, *, seed: int, trial: int) -> dict[str, Any]:
    """Return random parameters. They depend on the seed and the number of the trial only."""
    generator = np.random.default_rng([seed, trial])
    return {name: domain.draw(generator) for name, domain in space.items()}


def _is_whole(hint: Any) -> bool:
    """Return whether a hyper-parameter has the type `int` or `int | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return int in options and float not in options


def _parse_entry(name: str, entry: Any, *, is_whole: bool) -> Choices | Range:
    where = f"sweep.space.{name}"
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} must be {_FORMS}, got {entry!r}.")
    if entry.keys() == {"choices"}:
        values = entry["choices"]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.choices must be a list with at least one value, got {values!r}.")
        if not all(isinstance(value, Scalar) for value in values) or len(set(values)) < len(values):
            raise ConfigError(f"{where}.choices must be different numbers or texts, got {values!r}.")
        return Choices(values=tuple(values))
    if not {"from", "to"} <= entry.keys() <= {"from", "to", "log"}:
        raise ConfigError(f"{where} must be {_FORMS}, got the keys {', '.join(map(str, entry))}.")
    low, high, is_log = entry["from"], entry["to"], entry.get("log", False)
    for side, value in (("from", low), ("to", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{where}.{side} must be a number, got {value!r}.")
        if is_whole and value != int(value):
            raise ConfigError(f"{where}.{side} must be a whole number, got {value!r}.")
    if low > high:
        raise ConfigError(f"{where}.from must not be above {where}.to, got {low} and {high}.")
    if not isinstance(is_log, bool):
        raise ConfigError(f"{where}.log must be true or false, got {is_log!r}.")
    if is_log and low <= 0:
        raise ConfigError(f"{where}.log=true needs a positive {where}.from, got {low}.")
    number = int if is_whole else float
    return Range(low=number(low), high=number(high), is_log=is_log, is_whole=is_whole)


def _require_accepted(name: str, value: Scalar, model: Mapping[str, Any]) -> None:
    try:
        resolve_family({**model, name: value})
    except ConfigError as error:
        raise ConfigError(f"sweep.space.{name}: {value} is refused: {error}") from error
