"""Numbers of HAProxy's sticky counters (`track-sc0` and so on).

The numbers are shared by all rules of a frontend. If two rules used the same number, only the first would count.
"""

from __future__ import annotations

import enum


class Counter(enum.IntEnum):
    """What each sticky counter counts."""

    principal = 0
    tenant = 1
    refusals = 2
    verified_tokens = 3
    connections = 4
    logins = 5
