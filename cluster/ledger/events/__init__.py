"""Event types of the ledger: one frozen dataclass per type, with JSON values only.

The class name is the event's `type` in the ledger. Fields are part of a permanent record: a new field needs a default,
and no field is ever renamed or removed.

Two releases can share one ledger. A reader ignores unknown event types and unknown fields. Events of a `Subject` are
the exception: a reader that acts on the subject stops at an unknown event. So if a new event type changes serving, a
key or a limit, its name must start with one of the prefixes of that subject.
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
from cluster.ledger.events.jobs import JobFinished, JobRefused, JobStarted, JobStopped, JobSubmitted
from cluster.ledger.events.models import (
    AliasMoved,
    ArtifactRefused,
    DeploymentRemoved,
    GuardrailBreached,
    ModelDeployed,
    ModelEvaluated,
    ModelExported,
    ModelMonitored,
    ModelRegistered,
    ModelReinstated,
    ModelReproduced,
    ModelRetired,
    OutcomesCompacted,
    OutcomesReceived,
    OutcomesSummed,
    PredictionsCompacted,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutStarted,
    RolloutWeightChanged,
    RunFailed,
    RunFinished,
    RunStarted,
    ScoringFinished,
    ScoringStarted,
    ShadowStarted,
    ShadowStopped,
)
from cluster.ledger.events.pipelines import (
    PipelineCancelled,
    PipelineFinished,
    PipelineStarted,
    StageFinished,
    StageStarted,
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
    NodeCertificateRenewed,
    NodeJoined,
    NodeLeft,
    ProcessRestarted,
    ServingRestored,
    StrangersRefused,
)
from cluster.ledger.events.rollouts import (
    PolicyDecided,
    PolicyEnded,
    PolicyPaused,
    PolicyResumed,
    PolicyStarted,
    ReplicasRequested,
    RollbackJournaled,
)
from cluster.ledger.events.schedules import (
    ScheduleApplied,
    ScheduledRunDue,
    ScheduledRunFinished,
    ScheduledRunSkipped,
    ScheduledRunStarted,
    ScheduleStateChanged,
)
from cluster.ledger.events.sweeps import (
    SweepFinished,
    SweepStarted,
    TrialFinished,
    TrialReported,
    TrialStarted,
)
from cluster.ledger.events.watches import (
    ApplicationEnded,
    PolicySummarised,
    QualityJudged,
    VersionKeptWarm,
    WatchDecided,
    WatchEnded,
    WatchStarted,
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
    "ModelExported",
    "ModelMonitored",
    "ModelRegistered",
    "ModelReinstated",
    "ModelReproduced",
    "ModelRetired",
    "OutcomesCompacted",
    "OutcomesReceived",
    "OutcomesSummed",
    "PredictionsCompacted",
    "PolicyDecided",
    "PolicyEnded",
    "PolicyPaused",
    "PolicyResumed",
    "PolicyStarted",
    "ReplicasRequested",
    "RollbackJournaled",
    "RolloutPromoted",
    "RolloutRolledBack",
    "RolloutStarted",
    "RolloutWeightChanged",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "ScoringFinished",
    "ScoringStarted",
    "ShadowStarted",
    "ShadowStopped",
    "PipelineCancelled",
    "PipelineFinished",
    "PipelineStarted",
    "StageFinished",
    "StageStarted",
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
    "NodeCertificateRenewed",
    "NodeJoined",
    "NodeLeft",
    "ProcessRestarted",
    "ServingRestored",
    "StrangersRefused",
    "JobFinished",
    "JobRefused",
    "JobStarted",
    "JobStopped",
    "JobSubmitted",
    "ScheduleApplied",
    "ScheduleStateChanged",
    "ScheduledRunDue",
    "ScheduledRunFinished",
    "ScheduledRunSkipped",
    "ScheduledRunStarted",
    "SweepFinished",
    "SweepStarted",
    "TrialFinished",
    "TrialReported",
    "TrialStarted",
    "ApplicationEnded",
    "PolicySummarised",
    "QualityJudged",
    "VersionKeptWarm",
    "WatchDecided",
    "WatchEnded",
    "WatchStarted",
]

_TYPES: dict[str, type[LedgerEvent]] = {
    cls.__name__: cls for cls in LedgerEvent.__subclasses__() if cls is not UnknownEvent
}


class Subject(enum.Enum):
    """A kind of state. A reader that acts on it must know all its events. The values are prefixes of event types."""

    serving = ("Rollout", "Shadow", "Alias", "Deployment", "ModelDeployed")
    key = ("Key",)
    limit = ("EdgeLimit",)

    def includes(self, type_name: str) -> bool:
        """Return whether an event type changes this subject."""
        return type_name.startswith(self.value)


def parse(type_name: str, payload: dict[str, Json], *, seq: int) -> LedgerEvent:
    """Return the typed event of a stored payload, or `UnknownEvent` if only a newer release knows the type.

    Unknown fields are dropped. But an event of a `Subject` with unknown fields becomes an `UnknownEvent`, because the
    unknown fields could change the meaning of the known fields.

    Raises:
        LedgerCorrupt: Fields are missing.
    """
    cls = _TYPES.get(type_name)
    if cls is None:
        return UnknownEvent(stored_type=type_name, content=payload)
    known = cls.__dataclass_fields__
    if not payload.keys() <= known.keys():
        if any(subject.includes(type_name) for subject in Subject):
            return UnknownEvent(stored_type=type_name, content=payload)
        payload = {name: value for name, value in payload.items() if name in known}
    try:
        return cls(**payload)
    except TypeError as error:
        raise LedgerCorrupt(f"Event {seq} is not a valid {type_name}: {error}.", seq=seq) from error


def is_known(type_name: str) -> bool:
    """Return whether this release knows an event type."""
    return type_name in _TYPES


def require_known(event: LedgerEvent, subject: Subject) -> None:
    """Require that an event is known if it changes the subject that the reader acts on.

    Raises:
        ReleaseTooOld: The event is unknown and changes the subject. The message names the event's type.
    """
    if isinstance(event, UnknownEvent) and subject.includes(event.type):
        raise ReleaseTooOld(
            f"The ledger has an event {event.type}, which changes {subject.name}, and this release does not "
            "understand it. Update this installation to the newest release that writes to the ledger."
        )
