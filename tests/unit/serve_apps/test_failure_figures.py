"""The figures of `make chaos-nodes` from recorded requests."""

from __future__ import annotations

from tests.clients.balanced_load import Sent
from tests.nodes.outcomes import recovery_s, summarize

PER_S = 10


def requests(*, seconds: int, bad: range = range(0), server: str = "second") -> list[Sent]:
    """Return requests at a constant rate, answered after 10 ms. Those sent in the seconds `bad` fail."""
    return [
        Sent(
            kind="predict",
            number=number,
            server=server,
            at=100 + number / PER_S,
            took_s=0.01,
            status=503 if number // PER_S in bad else 200,
            content="",
        )
        for number in range(seconds * PER_S)
    ]


def test_recovery_is_the_end_of_the_last_second_with_too_few_good_answers() -> None:
    assert recovery_s(requests(seconds=20, bad=range(3, 7)), at=102, per_s=PER_S) == 5
    assert recovery_s(requests(seconds=20), at=102, per_s=PER_S) == 0
    assert recovery_s([], at=102, per_s=PER_S) == 0


def test_failed_requests_are_counted_by_edge_and_by_time() -> None:
    """The edge of the lost node counts only for all failed requests."""
    sent = requests(seconds=20, bad=range(3, 7)) + requests(seconds=20, bad=range(3, 4), server="third")
    outcome = summarize(sent, at=102, per_s=2 * PER_S, lost_edge="third")
    assert (outcome.failed, outcome.failed_elsewhere, outcome.failed_later) == (50, 40, 19)
    assert outcome.reasons == {"predict at second: 503": 40, "predict at third: 503": 10}
