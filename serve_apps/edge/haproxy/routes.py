"""Routes of the edge: one map entry with the whole split of each model, and the replicas of each version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_apps.replica.targets import ScaledToZero, Target, addresses_of
from serve_apps.rollout.assignment import BUCKETS, CHAMPION_VARIANT, bounds
from serve_apps.rollout.serving_state import ModelState, States

NO_ROLLOUT = "none"
"""A map entry's rollout id, while no rollout runs."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One Serve application and the addresses of its replicas."""

    name: str
    servers: tuple[str, ...]
    """`host:port`, sorted."""
    scaled_to_zero: bool = False
    """The application is healthy without replicas; `servers` is then Serve's proxy, which starts one."""


@dataclass(frozen=True, slots=True)
class Routes:
    """Everything that the edge routes to."""

    entries: dict[str, str] = field(default_factory=dict)
    """Model to its map entry."""
    backends: tuple[Backend, ...] = ()
    champions: tuple[str, ...] = ()
    """Backends that must be healthy for the edge to be ready."""


def entry(state: ModelState) -> str | None:
    """Return a model's map entry, or None while the model has no deployed champion.

    Fields, separated by `|`: champion backend, treatment backend, treatment variant, rollout id, salt, and the two
    bounds in buckets. All are in one value, so that one `set map` changes all of them together.
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
    """Build the routes from the ledger's state and the replicas that Serve reports.

    Args:
        states: state by model.
        targets: Serve application to its replicas, or to the proxy that starts one.
    """
    entries = {model: text for model, state in sorted(states.items()) if (text := entry(state))}
    backends = tuple(
        Backend(name, tuple(sorted(addresses_of(target))), scaled_to_zero=isinstance(target, ScaledToZero))
        for name, target in sorted(targets.items())
    )
    return Routes(entries, backends, tuple(sorted(text.split("|", 1)[0] for text in entries.values())))
