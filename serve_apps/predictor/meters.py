"""What a replica tells of its answers: how many by status, and how long they took.

A call of Ray's metrics costs as much as reading an entity's features, so answers are counted here, and Ray is told
once a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve import metrics

TELL_EVERY_S = 1.0
_TAGS: Any = ("model", "version")  # Ray annotates a tuple of one


class Meters:
    """Of one model version; to be used in a running event loop alone."""

    def __init__(self, tags: Mapping[str, str]) -> None:
        self._answered = metrics.Counter("falaj_predictions", "answers", tag_keys=(*_TAGS, "status"))
        self._seconds = metrics.Histogram(
            "falaj_prediction_seconds",
            "time in the replica",
            boundaries=[0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5],
            tag_keys=_TAGS,
        )
        self._without_score = metrics.Counter(
            "falaj_predictions_without_score",
            "requests for which the model gave no finite score",
            tag_keys=_TAGS,
        )
        for meter in (self._answered, self._seconds, self._without_score):
            meter.set_default_tags(dict(tags))  # Serve writes its own tags into what it is given
        self._untold: Counter[int] = Counter()

    def answer(self, status: int, *, took_s: float) -> None:
        """Count an answer."""
        if not self._untold:
            asyncio.get_running_loop().call_later(TELL_EVERY_S, self._tell)
        self._untold[status] += 1
        self._seconds.observe(took_s)

    def without_score(self) -> None:
        """Count a request that the model gave no usable score for."""
        self._without_score.inc()

    def _tell(self) -> None:
        for status, count in self._untold.items():
            self._answered.inc(count, tags={"status": str(status)})
        self._untold.clear()
