"""What both versions say to the same logged requests.

A shadow has logged its answer to the copy. In a rollout whose version answers clients, one version answered, and the
other one scores the logged features now.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cluster.errors import ModelFailed, RefusedError
from cluster.runtime import Model
from serve_apps.rollout.evidence.cohorts import Answer, UnitRows

Models = Callable[[int], Model]
"""Function that returns a version of the model, loaded."""


class Predicted(NamedTuple):
    """What one version says to the rows of one request."""

    version: int
    rows: Sequence[dict[str, Any]]
    """[] if the version gave no answer."""


class Pair(NamedTuple):
    """What both versions say to one request."""

    answer: Answer
    """What the client got. Outcomes have its prediction id."""
    treatment: Predicted
    champion: Predicted


def pairs_of_copies(unit: UnitRows) -> list[Pair]:
    """Return the champion's answers with the shadow's."""
    return [Pair(answer, _logged(unit.copies[answer.request_id]), _logged(answer)) for answer in unit.answers]


def _logged(answer: Answer) -> Predicted:
    return Predicted(answer.version, answer.predictions)


class Rescorer:
    """Lets the version that did not answer score the logged features.

    Args:
        models: Returns a version, loaded.
        treatment: Number of the version that is tried.
        champion: Number of the champion.
        since: Start of the rollout. Both versions were registered before it, so their training data are older. A
            request whose features are those of an earlier time (`as_of`) is left out.
    """

    def __init__(self, models: Models, *, treatment: int, champion: int, since: dt.datetime) -> None:
        self._models = models
        self._treatment = treatment
        self._champion = champion
        self._since = since

    def pairs(self, unit: UnitRows) -> list[Pair]:
        """Return the unit's requests with the predictions of both versions."""
        found = []
        for answer in unit.answers:
            if answer.as_of is None or answer.as_of < self._since:
                continue
            if answer.version == self._treatment:
                found.append(Pair(answer, _logged(answer), self._scored(self._champion, answer)))
            elif answer.version == self._champion:
                found.append(Pair(answer, self._scored(self._treatment, answer), _logged(answer)))
        return found

    def _scored(self, version: int, answer: Answer) -> Predicted:
        """Let a version score a request's features."""
        model, features = self._models(version), answer.features
        try:
            columns = {spec.name: features[spec.name] for spec in model.signature.inputs}
            return Predicted(version, model.predict(columns).require_finite().rows())
        except (RefusedError, ModelFailed, KeyError):
            return Predicted(version, [])
