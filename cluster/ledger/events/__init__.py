"""What can happen on the platform: one frozen dataclass an event type, JSON values only.

The class name is the event's `type` in the ledger. Fields are part of a permanent record: add with a default,
never rename or remove.
"""

from __future__ import annotations

from cluster.errors import LedgerCorrupt
from cluster.ledger.events.base import Json, LedgerEvent
from cluster.ledger.events.features import (
    BatchIngested,
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
    StrangersRefused,
)

__all__ = [
    "Json",
    "LedgerEvent",
    "parse",
    "BatchIngested",
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
    "StrangersRefused",
]

_TYPES: dict[str, type[LedgerEvent]] = {cls.__name__: cls for cls in LedgerEvent.__subclasses__()}


def parse(type_name: str, payload: dict[str, Json], *, seq: int) -> LedgerEvent:
    """The typed event of a stored payload.

    Raises:
        LedgerCorrupt: an unknown type, or fields that do not fit it.
    """
    cls = _TYPES.get(type_name)
    if cls is None:
        raise LedgerCorrupt(
            f"Event {seq} has the unknown type '{type_name}'; this release is older than the ledger.", seq=seq
        )
    try:
        return cls(**payload)
    except TypeError as error:
        raise LedgerCorrupt(f"Event {seq} is no valid {type_name}: {error}.", seq=seq) from error
