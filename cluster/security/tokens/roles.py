"""The roles that a token can give."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    """What a principal works as."""

    data_engineer = "data_engineer"
    data_scientist = "data_scientist"
    ml_engineer = "ml_engineer"
    approver = "approver"
    auditor = "auditor"
    service = "service"
    admin = "admin"
    supervisor = "supervisor"
    """The cluster's own process of that name; no person's."""
