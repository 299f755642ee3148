"""The roles of principals."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    """Role that a token gives to a principal."""

    data_engineer = "data_engineer"
    data_scientist = "data_scientist"
    ml_engineer = "ml_engineer"
    approver = "approver"
    auditor = "auditor"
    service = "service"
    admin = "admin"
    supervisor = "supervisor"
    """Role of the cluster's supervisor process. No person gets this role."""
