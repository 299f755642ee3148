"""Events of model `m`: two versions are deployed, the first as champion, and a rollout of the second has started."""

from __future__ import annotations

from cluster.ledger.events import AliasMoved, LedgerEvent, ModelDeployed, RolloutRolledBack, RolloutStarted


def deployed(version: int, variant: str = "challenger") -> ModelDeployed:
    app = f"m-v{version}"
    return ModelDeployed(name="m", version=version, variant=variant, app=app, route_prefix=f"/{app}")


DEPLOYED: tuple[LedgerEvent, ...] = (
    deployed(1, "champion"),
    AliasMoved(name="m", alias="champion", version=1, previous=None, reason="first"),
    deployed(2),
)
STARTED = RolloutStarted(
    model="m",
    rollout="r",
    salt="s",
    treatment_version=2,
    treatment_variant="challenger",
    champion_version=1,
    weight=20,
)
ROLLED_BACK = RolloutRolledBack(model="m", rollout="r", reason="worse")
