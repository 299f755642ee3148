"""Falaj's exceptions. They form one tree.

    FalajError
    ├── RefusedError (ValueError)     the caller's mistake or a failed gate: exit code 2, one line, no traceback
    │   ├── ConfigError               an invalid configuration key or value
    │   │   └── RunClaimed            another job has the run (`jobs/train/run/identity.py`)
    │   ├── ClusterNotRunning         a job needs a cluster, and no cluster runs
    │   ├── ClusterAlreadyUp
    │   ├── PortInUse
    │   ├── CompilerMissing
    │   ├── DefinitionError           an invalid feature definition
    │   │   ├── BreakingChange        a change that would break a registered model
    │   │   ├── ViewRetired
    │   │   ├── FeatureViewNotFound
    │   │   └── FeatureServiceNotFound
    │   ├── SourceError               a source that is missing, empty or unreadable
    │   │   ├── SchemaMismatch        a column is missing or has the wrong type
    │   │   └── CommitConflict        another job committed to the table at the same time; nothing was stored
    │   ├── BatchRejected             too many bad rows, or a failed batch rule: nothing was stored
    │   ├── TrainingSetError
    │   ├── TooManyBadRows            a scoring set aside more rows than allowed (`jobs/score/set_aside.py`)
    │   ├── NoScoreForMissingValues   an ONNX graph gives none (`runtime/model.py`)
    │   ├── SkewFound                 a served feature differs from the offline value
    │   ├── ModelNotFound
    │   ├── ArtifactTampered          a file differs from the registered one
    │   ├── ProtectedFileCorrupt      a Parquet file was changed or swapped (`security/encryption/parquet`)
    │   ├── RecordLogCorrupt          a log of predictions or outcomes was changed, or a part of it is missing
    │   ├── KeyNotFound, KeyRevoked … errors of a key store; the tree continues in `security/keys/store.py`
    │   ├── LedgerCorrupt             the hash chain, an event or a checkpoint is invalid
    │   ├── ReleaseTooOld             an event of a newer release changes the state that this release must act on
    │   ├── RolloutError
    │   ├── InvalidRequest            HTTP 400
    │   │   └── FeatureAbsent         a required feature is missing or expired
    │   ├── Unauthenticated           HTTP 401
    │   │   └── KeysUnknown           the issuer has never answered, so its keys are unknown
    │   └── AccessDenied              HTTP 403
    ├── TrainingFailed                training gave no usable model: the loss is NaN, memory was too small, or no trial
    │                                 of a sweep finished: exit code 1, one line
    ├── ModelFailed                   a model gave no usable score: HTTP 503
    ├── KeyStoreUnavailable           the broker is down: exit code 1
    ├── OnlineStoreUnavailable        the store is unreachable or full: exit code 1, HTTP 503
    │   └── OnlineStoreOutdated       another release wrote a view's rows in another format
    └── Inconsistent                  an internal consistency check failed: exit code 1

A message says what happened, to which thing, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FalajError(Exception):
    """Base class of every error that Falaj raises on purpose."""


class RefusedError(FalajError, ValueError):
    """The caller made a mistake, or a gate failed.

    Args:
        message: What happened, to which thing, and what to do. `public` is this text alone, for HTTP clients.
        hint: Text after `message` that lists existing names. Only commands show it, because an HTTP client of one team
            must not see the names of another team's views.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}{hint}")
        self.public = message


class ConfigError(RefusedError):
    """A configuration key or value is invalid."""


class ClusterNotRunning(RefusedError):
    """A job needs a running cluster."""


class ClusterAlreadyUp(RefusedError):
    """`cluster.up` found a cluster of this project running."""


class PortInUse(RefusedError):
    """Another process uses a port that the cluster needs."""


class CompilerMissing(RefusedError):
    """No C++ compiler is installed. DeepSpeed compiles an operator when it starts."""


class DefinitionError(RefusedError):
    """A feature definition is invalid."""


class BreakingChange(DefinitionError):
    """A change of a feature view would break a registered model."""


class ViewRetired(DefinitionError):
    """The feature view is retired: it takes no new rows, and no new training set may use it."""


class FeatureViewNotFound(DefinitionError):
    """No feature view has this name."""


class FeatureServiceNotFound(DefinitionError):
    """No feature service has this name."""


class SourceError(RefusedError):
    """A source is missing, empty or unreadable."""


class SchemaMismatch(SourceError):
    """A source column is missing or has the wrong type."""


class CommitConflict(SourceError):
    """Another job committed to the table at the same time; nothing was stored."""


class BatchRejected(RefusedError):
    """The batch has too many bad rows or fails a batch rule; none of its rows were stored."""


class TrainingSetError(RefusedError):
    """A training set cannot be built or used."""


class TrainingFailed(FalajError):
    """Training gave no usable model."""


class SkewFound(RefusedError):
    """A served feature differs from the offline value for the same request."""


class ModelNotFound(RefusedError):
    """The model, version or alias does not exist."""


class ArtifactTampered(RefusedError):
    """A model file differs from the registered one."""


class LedgerCorrupt(RefusedError):
    """The hash chain, an event or a checkpoint is invalid at `seq`."""

    def __init__(self, message: str, *, seq: int) -> None:
        super().__init__(message)
        self.seq = seq


class ReleaseTooOld(RefusedError):
    """The ledger has an event of a newer release, and this release would have to act on it."""


class RecordLogCorrupt(RefusedError):
    """A log of predictions or outcomes was changed, or a part of it is missing."""


class RolloutError(RefusedError):
    """The rollout's state does not allow the command."""


class InvalidRequest(RefusedError):
    """The request is invalid (HTTP 400)."""


class FeatureAbsent(InvalidRequest):
    """A feature that the feature service requires is missing or expired (HTTP 400)."""

    def __init__(self, message: str, *, status: dict[str, list[str]]) -> None:
        super().__init__(message)
        self.status = status
        """Maps `<view>__<feature>` to the status of its value for each entity."""


class Unauthenticated(RefusedError):
    """The request has no valid identity (HTTP 401)."""


class KeysUnknown(Unauthenticated):
    """The issuer has not answered since this process started, so its keys are unknown."""


class AccessDenied(RefusedError):
    """The identity is valid but has no permission (HTTP 403)."""


class ModelFailed(FalajError):
    """A model gave no usable score for a request (HTTP 503).

    The message says what the model did. It does not contain the model's name.
    """


class OnlineStoreUnavailable(FalajError):
    """The online store is unreachable or full."""


class OnlineStoreOutdated(OnlineStoreUnavailable):
    """A release with another row format wrote the view's online rows."""


class Inconsistent(FalajError):
    """An internal consistency check failed; nothing was committed."""


def refusal_behind(error: BaseException) -> BaseException:
    """Return the `RefusedError` or `TrainingFailed` of a worker that a Ray error contains, or the error itself."""
    queue: list[BaseException] = [error]
    while queue:
        current = queue.pop(0)
        # Ray's wrapper is also an instance of the class that it wraps; its message is a traceback.
        wrapped = getattr(current, "cause", None)
        if isinstance(current, RefusedError | TrainingFailed) and wrapped is None:
            return current
        failures = getattr(current, "worker_failures", None)  # Ray Train: maps rank to error
        callback = getattr(current, "controller_failure", None)  # Ray Train: error of a callback
        causes = [
            wrapped,
            callback,
            current.__cause__,
            *(failures.values() if isinstance(failures, dict) else ()),
        ]
        queue += [cause for cause in causes if isinstance(cause, BaseException)]
    return error


MAX_SUGGESTED_LENGTH = 200
"""Longest name, in characters, for which similar names are suggested. Comparing a longer name could take seconds."""
MAX_LISTED = 50
"""Largest number of names that a message lists."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a not-found message: the most similar name, then the known names (at most `MAX_LISTED`)."""
    names = sorted(known)
    if not names:
        return " No names are known yet."
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return f"{suggest_name(name, names)} Known: {', '.join(names[:MAX_LISTED])}{more}."


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return the most similar name as a suggestion, or "" if no name is similar.

    Use it for clients that must not see all names.
    """
    similar = difflib.get_close_matches(name, sorted(known), n=1) if len(name) <= MAX_SUGGESTED_LENGTH else []
    return f" Did you mean '{similar[0]}'?" if similar else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none. SQLAlchemy's have many lines."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
