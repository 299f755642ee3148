"""What the edge knows of each model: one map entry with the whole split, and the replicas behind each version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_apps.replica.targets import Target, Waker, addresses_of
from serve_apps.rollout.assignment import BUCKETS, CHAMPION_VARIANT, bounds
from serve_apps.rollout.state import ModelState, States

NO_ROLLOUT = "none"


@dataclass(frozen=True, slots=True)
class Backend:
    """One Serve application and its replicas' addresses."""

    name: str
    servers: tuple[str, ...]
    """`host:port`, sorted."""
    asleep: bool = False
    """Without replicas, and well: the address is that of who starts one."""


@dataclass(frozen=True, slots=True)
class Routes:
    """All the edge routes to."""

    entries: dict[str, str] = field(default_factory=dict)
    """Model to its map entry."""
    backends: tuple[Backend, ...] = ()
    champions: tuple[str, ...] = ()
    """Backends that must be healthy for the edge to be ready."""


def entry(state: ModelState) -> str | None:
    """A model's map entry: champion backend, treatment backend and variant, rollout, salt, the two bounds.

    None while the model has no deployed champion. Bounds and names stand in one value, so that one `set map` moves all.
    """
    champion = state.apps.get(state.champion_version or 0)
    if champion is None:
        return None
    rollout = state.rollout
    treatment = state.apps.get(rollout.treatment_version) if rollout else None
    if rollout is None or treatment is None:
        return "|".join((champion, champion, CHAMPION_VARIANT, NO_ROLLOUT, "-", "0", str(BUCKETS)))
    limits = bounds(rollout.weight)
    fields = (champion, treatment, rollout.treatment_variant, rollout.id, rollout.salt)
    return "|".join((*fields, str(limits.treatment_below), str(limits.control_from)))


def routes(states: States, targets: Mapping[str, Target]) -> Routes:
    """What the ledger says, over the replicas that Serve has.

    Args:
        states: by model.
        targets: Serve application to its replicas' addresses, or to who wakes it.
    """
    entries = {model: text for model, state in sorted(states.items()) if (text := entry(state))}
    backends = tuple(
        Backend(name, tuple(sorted(addresses_of(target))), asleep=isinstance(target, Waker))
        for name, target in sorted(targets.items())
    )
    return Routes(entries, backends, tuple(sorted(text.split("|", 1)[0] for text in entries.values())))
