"""What can happen on the platform: one frozen dataclass an event type, JSON values only.

The class name is the event's `type` in the ledger. Fields are part of a permanent record: add with a default,
never rename or remove.

Two releases may share one ledger. A reader passes over an event that it does not know, and a field that it does not
know. The exception is an event of a `Subject`: whoever acts on that subject stops there. So a new event type that
changes what is served, a key or a limit must begin with one of its subject's prefixes.
"""

from __future__ import annotations

import enum

from cluster.errors import LedgerCorrupt, ReleaseTooOld
from cluster.ledger.events.base import Json, LedgerEvent, UnknownEvent
from cluster.ledger.events.features import (
    BatchIngested,
    BatchMended,
    BatchRefused,
    FeatureServiceApplied,
    FeatureTableRewritten,
    FeatureViewApplied,
    FeatureViewStateChanged,
    QuarantineReplayed,
    RowsRemoved,
    SkewChecked,
    TrainingSetBuilt,
    TrainingSetNotReproducible,
    ViewMaterialized,
)
from cluster.ledger.events.models import (
    AliasMoved,
    ArtifactRefused,
    DeploymentRemoved,
    GuardrailBreached,
    ModelDeployed,
    ModelEvaluated,
    ModelMonitored,
    ModelRegistered,
    OutcomesCompacted,
    OutcomesReceived,
    PredictionsCompacted,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutStarted,
    RolloutWeightChanged,
    ShadowStarted,
    ShadowStopped,
    SweepFinished,
)
from cluster.ledger.events.platform import (
    AccessDecided,
    CheckpointSigned,
    ClusterStarted,
    ClusterStopped,
    DenialsCounted,
    EdgeLimitSet,
    KeyEncryptionKeyRotated,
    KeyRelabelled,
    KeyRevocation,
    KeysRotated,
    ProcessRestarted,
    ServingRestored,
    StrangersRefused,
)

__all__ = [
    "Json",
    "LedgerEvent",
    "Subject",
    "UnknownEvent",
    "is_known",
    "parse",
    "require_known",
    "BatchIngested",
    "BatchMended",
    "BatchRefused",
    "FeatureServiceApplied",
    "FeatureTableRewritten",
    "FeatureViewApplied",
    "FeatureViewStateChanged",
    "QuarantineReplayed",
    "RowsRemoved",
    "SkewChecked",
    "TrainingSetBuilt",
    "TrainingSetNotReproducible",
    "ViewMaterialized",
    "AliasMoved",
    "ArtifactRefused",
    "DeploymentRemoved",
    "GuardrailBreached",
    "ModelDeployed",
    "ModelEvaluated",
    "ModelMonitored",
    "ModelRegistered",
    "OutcomesCompacted",
    "OutcomesReceived",
    "PredictionsCompacted",
    "RolloutPromoted",
    "RolloutRolledBack",
    "RolloutStarted",
    "RolloutWeightChanged",
    "ShadowStarted",
    "ShadowStopped",
    "SweepFinished",
    "AccessDecided",
    "CheckpointSigned",
    "ClusterStarted",
    "ClusterStopped",
    "DenialsCounted",
    "EdgeLimitSet",
    "KeyEncryptionKeyRotated",
    "KeyRelabelled",
    "KeyRevocation",
    "KeysRotated",
    "ProcessRestarted",
    "ServingRestored",
    "StrangersRefused",
]

_TYPES: dict[str, type[LedgerEvent]] = {
    cls.__name__: cls for cls in LedgerEvent.__subclasses__() if cls is not UnknownEvent
}


class Subject(enum.Enum):
    """What an event changes, where a reader that does not understand it must not go on; by prefix of its type."""

    serving = ("Rollout", "Shadow", "Alias", "Deployment", "ModelDeployed")
    key = ("Key",)
    limit = ("EdgeLimit",)

    def has(self, type_name: str) -> bool:
        """Whether an event type is of this subject."""
        return type_name.startswith(self.value)


def parse(type_name: str, payload: dict[str, Json], *, seq: int) -> LedgerEvent:
    """The typed event of a stored payload, or `UnknownEvent` where a newer release wrote it.

    Fields that this release does not know are left out, unless the event is of a `Subject`: there they could change
    what the others mean.

    Raises:
        LedgerCorrupt: fields are missing.
    """
    cls = _TYPES.get(type_name)
    if cls is None:
        return UnknownEvent(stored_type=type_name, content=payload)
    known = cls.__dataclass_fields__
    if not payload.keys() <= known.keys():
        if any(subject.has(type_name) for subject in Subject):
            return UnknownEvent(stored_type=type_name, content=payload)
        payload = {name: value for name, value in payload.items() if name in known}
    try:
        return cls(**payload)
    except TypeError as error:
        raise LedgerCorrupt(f"Event {seq} is no valid {type_name}: {error}.", seq=seq) from error


def is_known(type_name: str) -> bool:
    """Whether this release knows an event type."""
    return type_name in _TYPES


def require_known(event: LedgerEvent, subject: Subject) -> None:
    """Stop a reader that acts on a subject at an event of that subject that this release does not know.

    Raises:
        ReleaseTooOld: naming the event's type.
    """
    if isinstance(event, UnknownEvent) and subject.has(event.type):
        raise ReleaseTooOld(
            f"The ledger has an event {event.type} that changes {subject.name} and that this release does not "
            "understand. Update this installation to the newest release that writes to the ledger."
        )
