"""Routes of the edge: for each model one map entry with the whole split, and for each version its replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.records.unit_hash import NO_ROLLOUT
from serve_apps.replica.targets import ScaledToZero, Target, addresses_of
from serve_apps.rollout.assignment import BUCKETS, CHAMPION_VARIANT, UnitKind, bounds
from serve_apps.rollout.serving_state import ModelState, States

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

    The entry has these fields, separated by `|`: champion backend, treatment backend, treatment variant, rollout id,
    salt, and the two bounds in buckets. If the token's subject is the unit, the last field is `BY_SUBJECT`; it has no
    fixed position. All fields are in one value, so that one `set map` changes them together.
    """
    champion = state.apps.get(state.champion_version or 0)
    if champion is None:
        return None
    rollout = state.rollout
    treatment = state.apps.get(rollout.treatment_version) if rollout else None
    if rollout is None or treatment is None:
        return _champion_entry(champion)
    limits = bounds(rollout.weight)
    fields = (champion, treatment, rollout.treatment_variant, rollout.id, rollout.salt)
    split = (*fields, str(limits.treatment_below), str(limits.control_from))
    return "|".join((*split, BY_SUBJECT) if rollout.unit == UnitKind.subject else split)


def rollout_of(entry: str) -> str:
    """Return the id of the rollout in a map entry."""
    return entry.split("|")[3]


def without_rollout(entry: str) -> str:
    """Return the entry with which the champion of a map entry answers all units."""
    return _champion_entry(entry.split("|", 1)[0])


def _champion_entry(champion: str) -> str:
    return "|".join((champion, champion, CHAMPION_VARIANT, NO_ROLLOUT, "-", "0", str(BUCKETS)))


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
