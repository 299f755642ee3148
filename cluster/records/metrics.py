"""Metrics of the log uploader."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class UploadMetrics:
    """Uploaded segments, failures, and what waits on this machine's disk."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._segments = Counter(
            "falaj_uploader_segments",
            "Segments that a round tried to upload; result is ok or failed.",
            ["result"],
            registry=registry,
        )
        self.failed_rounds = Counter(
            "falaj_uploader_failed_rounds",
            "Rounds that ended early, because the ledger's database did not answer.",
            registry=registry,
        )
        self.seconds = Histogram(
            "falaj_uploader_round_seconds",
            "How long a look at all logs took, with the uploads.",
            buckets=(0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0),
            registry=registry,
        )
        self._waiting = Gauge(
            "falaj_uploader_waiting_logs", "Logs with records on this machine only.", registry=registry
        )
        self._oldest = Gauge(
            "falaj_uploader_oldest_waiting_timestamp_seconds",
            "Unix time from which on records may be on this machine only; the time of the round if there are none.",
            registry=registry,
        )
        self._last_success = Gauge(
            "falaj_uploader_last_success_timestamp_seconds",
            "Unix time of the last round without a failure; 0 if there was none.",
            registry=registry,
        )

    def count(self, *, uploaded: int, failed: int, behind: Collection[dt.datetime]) -> None:
        """Count what a round did.

        Args:
            uploaded: Number of uploaded segments.
            failed: Number of failures.
            behind: For each log with records on this machine only, the time from which on.
        """
        self._segments.labels("ok").inc(uploaded)
        self._segments.labels("failed").inc(failed)
        self._waiting.set(len(behind))
        self._oldest.set(min(behind, default=dt.datetime.now(dt.UTC)).timestamp())
        if not failed:
            self._last_success.set_to_current_time()
