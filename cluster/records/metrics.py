"""Metrics of the log uploader."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.metrics import success_gauge


class UploadMetrics:
    """Uploaded segments, failures, and logs that are not uploaded yet."""

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
            "Duration of a round: listing all logs, and the uploads.",
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
        self._last_success = success_gauge(registry, prefix="falaj_uploader", of="round without a failure")

    def count(self, *, uploaded: int, failed: int, behind: Collection[dt.datetime]) -> None:
        """Count what a round did.

        Args:
            uploaded: Number of uploaded segments.
            failed: Number of failures.
            behind: For each log with records on this machine only, the time of the first of these records or earlier.
        """
        self._segments.labels("ok").inc(uploaded)
        self._segments.labels("failed").inc(failed)
        self._waiting.set(len(behind))
        self._oldest.set(min(behind, default=dt.datetime.now(dt.UTC)).timestamp())
        if not failed:
            self._last_success.set_to_current_time()
