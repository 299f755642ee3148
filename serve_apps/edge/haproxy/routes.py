"""Routes of the edge: for each model one map entry with the whole split, and for each version its replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.records.unit_hash import NO_ROLLOUT
from serve_apps.replica.targets import ScaledToZero, Target, addresses_of
from serve_apps.rollout.assignment import (
    BUCKETS,
    CHAMPION_VARIANT,
    HOLDBACK_WEIGHT,
    PREDECESSOR_VARIANT,
    Bounds,
    UnitKind,
    bounds,
    watch_id,
)
from serve_apps.rollout.serving_state import ModelState, States, Watch

BY_SUBJECT = f"unit={UnitKind.subject}"
"""Field of a map entry. Without it, the header `X-Unit-ID` names the unit, also in an entry of an older release."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One Serve application and the addresses of its replicas."""

    name: str
    servers: tuple[str, ...]
    """`host:port`, sorted."""
    scaled_to_zero: bool = False
    """Whether the application is healthy without replicas. Then `servers` has Serve's proxy, which starts a replica."""


@dataclass(frozen=True, slots=True)
class Routes:
    """All models and applications that the edge sends requests to."""

    entries: dict[str, str] = field(default_factory=dict)
    """From the name of a model to its map entry."""
    backends: tuple[Backend, ...] = ()
    champions: tuple[str, ...] = ()
    """Applications of the champions. The edge is ready if all of them are healthy."""


def entry(state: ModelState) -> str | None:
    """Return a model's map entry, or None while the model has no deployed champion.

    The entry has these fields, separated by `|`: champion backend, the other version's backend and variant, rollout id,
    salt, and the two bounds in buckets. If the token's subject is the unit, the last field is `BY_SUBJECT`; it has no
    fixed position. All fields are in one value, so that one `set map` changes them together.
    The other version gets the treatment. With the variant `predecessor` it gets control: that is a holdback.
    """
    champion = state.apps.get(state.champion_version or 0)
    if champion is None:
        return None
    rollout = state.rollout
    treatment = state.apps.get(rollout.treatment_version) if rollout else None
    if rollout is None and state.watch is not None:
        return _watch_entry(state.watch, state, champion)
    if rollout is None or treatment is None:
        return _champion_entry(champion)
    limits = bounds(rollout.weight)
    fields = (champion, treatment, rollout.treatment_variant, rollout.id, rollout.salt)
    return _split_entry(fields, limits, unit=rollout.unit)


def rollout_of(entry: str) -> str:
    """Return the id of the rollout in a map entry."""
    return entry.split("|")[3]


def without_rollout(entry: str) -> str:
    """Return the entry with which the champion of a map entry answers all units."""
    return _champion_entry(entry.split("|", 1)[0])


def _champion_entry(champion: str) -> str:
    return "|".join((champion, champion, CHAMPION_VARIANT, NO_ROLLOUT, "-", "0", str(BUCKETS)))


def _watch_entry(watch: Watch, state: ModelState, champion: str) -> str:
    """Return the entry after a promotion. Without a holdback, all units are treated, and the champion answers them."""
    predecessor = state.apps.get(watch.predecessor) if watch.holdback else None
    if predecessor is None:
        other, variant, limits = champion, CHAMPION_VARIANT, bounds(100)
    else:
        other, variant, limits = predecessor, PREDECESSOR_VARIANT, bounds(HOLDBACK_WEIGHT)
    fields = (champion, other, variant, watch_id(watch.rollout), watch.salt)
    return _split_entry(fields, limits, unit=watch.unit)


def _split_entry(fields: tuple[str, ...], limits: Bounds, *, unit: str) -> str:
    split = (*fields, str(limits.treatment_below), str(limits.control_from))
    return "|".join((*split, BY_SUBJECT) if unit == UnitKind.subject else split)


def routes(states: States, targets: Mapping[str, Target]) -> Routes:
    """Build the routes from the ledger's state and the replicas that Serve reports.

    Args:
        states: serving state by model.
        targets: from the name of a Serve application to its replicas, or to Serve's proxy, which starts a replica.
    """
    entries = {model: text for model, state in sorted(states.items()) if (text := entry(state))}
    backends = tuple(
        Backend(name, tuple(sorted(addresses_of(target))), scaled_to_zero=isinstance(target, ScaledToZero))
        for name, target in sorted(targets.items())
    )
    return Routes(entries, backends, tuple(sorted(text.split("|", 1)[0] for text in entries.values())))
