"""What can go wrong, as one tree.

    FalajError
    ├── RefusedError (ValueError)     the caller's mistake or a closed gate: exit code 2, one line, no traceback
    │   ├── ConfigError               a configuration key or value
    │   ├── ClusterNotRunning         a job needs a cluster and finds none
    │   ├── ClusterAlreadyUp
    │   ├── PortInUse
    │   ├── CompilerMissing
    │   ├── DefinitionError           a feature definition that cannot work
    │   │   ├── BreakingChange        a change that would break a registered model
    │   │   ├── ViewRetired
    │   │   ├── FeatureViewNotFound
    │   │   └── FeatureServiceNotFound
    │   ├── SourceError               a source that is missing, empty or unreadable
    │   │   ├── SchemaMismatch        a column is missing or has the wrong type
    │   │   └── CommitConflict        another job committed to the table meanwhile; nothing was stored
    │   ├── BatchRefused              too many bad rows, or a batch rule: nothing was stored
    │   ├── TrainingSetError
    │   ├── TrainingFailed            fitting came to no usable model: the loss is NaN, or no trial of a sweep ended
    │   ├── SkewFound                 a served feature is not what offline data gives
    │   ├── ModelNotFound
    │   ├── ArtifactTampered          a file is not the one that was registered
    │   ├── ProtectedFileCorrupt      a Parquet file that was altered or exchanged (`security/parquet`)
    │   ├── RecordLogCorrupt          a log of predictions or outcomes that was altered, or is there in part
    │   ├── KeyNotFound, KeyRevoked … what a key store refuses; `security/keys/store.py` draws them
    │   ├── LedgerCorrupt             the hash chain is broken
    │   ├── ReleaseTooOld             an event of a newer release changes what this one acts on
    │   ├── RolloutError
    │   ├── InvalidRequest            HTTP 400
    │   │   └── FeatureAbsent         a feature is missing or expired, and may not be
    │   ├── Unauthenticated           HTTP 401
    │   │   └── KeysUnknown           the issuer has never answered, so nobody knows its keys
    │   └── AccessDenied              HTTP 403
    ├── ModelFailed                   a model gave no usable score: HTTP 503
    ├── KeyStoreUnavailable           the broker is down: exit code 1
    ├── OnlineStoreUnavailable        it cannot be reached, or is full: exit code 1, HTTP 503
    │   └── OnlineStoreOutdated       a view's rows lie there as another release wrote them
    └── Inconsistent                  our own books do not add up: exit code 1

A message says what happened, to which thing, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FalajError(Exception):
    """Anything the platform raises on purpose."""


class RefusedError(FalajError, ValueError):
    """The caller's mistake or a closed gate.

    Args:
        message: what happened, to which thing, and what to do.
        hint: the end of the message that lists names. It is for people at a command; a client over HTTP gets `public`
            alone, because a name of one team's view is no other team's business.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}{hint}")
        self.public = message


class ConfigError(RefusedError):
    """A configuration key or value that cannot be used."""


class ClusterNotRunning(RefusedError):
    """A job needs a running cluster."""


class ClusterAlreadyUp(RefusedError):
    """`cluster.up` found a cluster of this project running."""


class PortInUse(RefusedError):
    """A port the cluster needs is taken."""


class CompilerMissing(RefusedError):
    """DeepSpeed compiles an operator at start and finds no C++ compiler."""


class DefinitionError(RefusedError):
    """A feature definition that cannot work."""


class BreakingChange(DefinitionError):
    """A change of a feature view that would break a registered model."""


class ViewRetired(DefinitionError):
    """A feature view that takes no new rows and goes into no new training set."""


class FeatureViewNotFound(DefinitionError):
    """No feature view of that name."""


class FeatureServiceNotFound(DefinitionError):
    """No feature service of that name."""


class SourceError(RefusedError):
    """A source that is missing, empty or unreadable."""


class SchemaMismatch(SourceError):
    """A source column is missing or has the wrong type."""


class CommitConflict(SourceError):
    """Another job committed to the table meanwhile; nothing was stored."""


class BatchRefused(RefusedError):
    """Too many bad rows, or a rule for the whole batch does not hold: nothing of it was stored."""


class TrainingSetError(RefusedError):
    """A training set that cannot be built or used."""


class TrainingFailed(RefusedError):
    """Fitting came to no usable model."""


class SkewFound(RefusedError):
    """A served feature is not what offline data gives for the same request."""


class ModelNotFound(RefusedError):
    """No such model, version or alias."""


class ArtifactTampered(RefusedError):
    """A model file is not the one that was registered."""


class LedgerCorrupt(RefusedError):
    """The hash chain is broken at `seq`."""

    def __init__(self, message: str, *, seq: int) -> None:
        super().__init__(message)
        self.seq = seq


class ReleaseTooOld(RefusedError):
    """The ledger has an event of a newer release that this release would have to act on."""


class RecordLogCorrupt(RefusedError):
    """A log of predictions or outcomes that was altered, or of which a part is lost."""


class RolloutError(RefusedError):
    """A rollout command that does not fit the rollout's state."""


class InvalidRequest(RefusedError):
    """A request that cannot be answered as it stands (HTTP 400)."""


class FeatureAbsent(InvalidRequest):
    """A feature is missing or expired that the feature service does not let be (HTTP 400)."""

    def __init__(self, message: str, *, status: dict[str, list[str]]) -> None:
        super().__init__(message)
        self.status = status
        """`<view>__<feature>` to what is known of its value, for each entity."""


class Unauthenticated(RefusedError):
    """No valid identity (HTTP 401)."""


class KeysUnknown(Unauthenticated):
    """An issuer has not answered since we began to ask, so nobody knows which keys it has."""


class AccessDenied(RefusedError):
    """A known identity without the right (HTTP 403)."""


class ModelFailed(FalajError):
    """A model gave no usable score for a request (HTTP 503). The message says what it did, without its name."""


class OnlineStoreUnavailable(FalajError):
    """The online store cannot be reached, or is full."""


class OnlineStoreOutdated(OnlineStoreUnavailable):
    """A view's online rows were written by a release that laid them out otherwise."""


class Inconsistent(FalajError):
    """Our own books do not add up; nothing was committed."""


def refusal_behind(error: BaseException) -> BaseException:
    """The refusal that a worker raised, if one is behind a Ray error; else the error itself."""
    waiting: list[BaseException] = [error]
    while waiting:
        seen = waiting.pop(0)
        # Ray's own error is of the kind that it carries, too, with a traceback for a message.
        carried = getattr(seen, "cause", None)
        if isinstance(seen, RefusedError) and carried is None:
            return seen
        failures = getattr(seen, "worker_failures", None)  # of Ray Train, by rank
        behind = [carried, seen.__cause__, *(failures.values() if isinstance(failures, dict) else ())]
        waiting += [one for one in behind if isinstance(one, BaseException)]
    return error


MAX_GUESSED = 200
"""Characters of a name for which a near one is looked for: of a longer one, sent to do harm, it would take seconds."""
MAX_NAMED = 50
"""Known names that a message lists."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of a not-found message: the nearest name, then the known ones, or the first of many."""
    names = sorted(known)
    if not names:
        return " None is known yet."
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return f"{nearest(name, names)} Known: {', '.join(names[:MAX_NAMED])}{more}."


def nearest(name: str, known: Iterable[str]) -> str:
    """The nearest name as a guess, for a client who should not get all of them; empty where none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1) if len(name) <= MAX_GUESSED else []
    return f" Did you mean '{near[0]}'?" if near else ""
