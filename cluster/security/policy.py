"""Who may do what at the edge and in a replica: one table that both read."""

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


class Action(enum.StrEnum):
    """What a request does."""

    predict = "predict"
    write_outcome = "write_outcome"
    read_metadata = "read_metadata"


ALLOWED: dict[Action, frozenset[Role]] = {
    Action.predict: frozenset({Role.service, Role.ml_engineer, Role.data_scientist, Role.admin}),
    Action.write_outcome: frozenset({Role.service, Role.ml_engineer, Role.admin}),
    Action.read_metadata: frozenset(Role),
}


def allowed(role: Role, action: Action) -> bool:
    """Whether a role may do an action; what is not in the table is denied."""
    return role in ALLOWED.get(action, frozenset())
