"""A node counts in the age of the logs before it writes its first record."""

from __future__ import annotations

import datetime as dt

from cluster.records.progress import BEGINNING, log_age
from tests.samples.record_log import prediction
from tests.servers.shared_logs import SharedLogs


def test_new_node_counts_from_its_announcement_on(logs: SharedLogs) -> None:
    """Its first records are on its disk only. A reader on another node knows that it may not see them."""
    node, other = logs.node("node"), logs.node("other")
    node.uploader().announce()
    announced = dt.datetime.now(dt.UTC)
    assert log_age(other.log).until <= announced
    assert log_age(other.log).last == node.uploader().node


def test_announcement_keeps_an_earlier_report(logs: SharedLogs) -> None:
    """The node was killed with a segment on its disk, and starts again."""
    node, other = logs.node("node"), logs.node("other")
    node.writer().append(prediction(0))
    node.uploader().run_once()
    before = log_age(other.log).until
    node.uploader().announce()
    assert log_age(other.log).until == before


def test_first_announcement_counts_what_is_on_the_disk(logs: SharedLogs) -> None:
    """The node wrote its log before the storage root was remote, or its report was removed."""
    node, other = logs.node("node"), logs.node("other")
    node.write(0, 1)
    node.uploader().announce()
    assert log_age(other.log).until == BEGINNING
    node.uploader().run_once()
    assert log_age(other.log).until > BEGINNING
