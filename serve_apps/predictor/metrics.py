"""Metrics of a replica's answers: their number by status, and their duration.

A call of Ray's metrics takes as long as reading the features of an entity. So this module counts the answers, and
passes the counts to Ray once a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve import metrics

FLUSH_INTERVAL_S = 1.0
_TAGS: Any = ("model", "version")  # Ray's annotation allows only tuples of one element


class PredictionMetrics:
    """Metrics of one model version. Needs a running event loop."""

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
        for metric in (self._answered, self._seconds, self._without_score):
            metric.set_default_tags(dict(tags))  # a copy, because Serve adds its own tags to the dict
        self._unflushed: Counter[int] = Counter()

    def answer(self, status: int, *, took_s: float) -> None:
        """Count an answer."""
        if not self._unflushed:
            asyncio.get_running_loop().call_later(FLUSH_INTERVAL_S, self._flush)
        self._unflushed[status] += 1
        self._seconds.observe(took_s)

    def without_score(self) -> None:
        """Count a request for which the model gave no finite score."""
        self._without_score.inc()

    def _flush(self) -> None:
        for status, count in self._unflushed.items():
            self._answered.inc(count, tags={"status": str(status)})
        self._unflushed.clear()
