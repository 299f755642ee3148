"""Principals and resources for tests of the policies."""

from __future__ import annotations

from typing import Any

from cluster.security.authorization.policy import Resource
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role


def who(
    role: Role, purpose: str = "", *, subject: str = "alice", tenant: str = "default", entrypoint: str = ""
) -> Principal:
    return Principal(
        subject=subject, role=role, purpose=purpose, expires_at=0, tenant=tenant, entrypoint=entrypoint
    )


def columns(column_class: str = "public", purposes: tuple[str, ...] = (), **changes: Any) -> Resource:
    return Resource(
        kind="feature view", name="income", column_class=column_class, purposes=purposes, **changes
    )
