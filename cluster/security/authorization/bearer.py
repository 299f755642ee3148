"""Read the principal from the Authorization header of a request."""

from __future__ import annotations

from cluster.errors import Unauthenticated
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.trust import Trust

_SCHEME = "bearer "


def bearer_token(authorization: str | None) -> str:
    """Return the token of an Authorization header.

    Raises:
        Unauthenticated: there is no token.
    """
    if authorization is None or not authorization.lower().startswith(_SCHEME):
        raise Unauthenticated("Give a token: 'Authorization: Bearer ...'.")
    return authorization[len(_SCHEME) :].strip()


def authenticate(
    trust: Trust, decisions: DecisionRecorder, authorization: str | None, *, at: float
) -> Principal:
    """Return the principal of an Authorization header. Count a request without a valid token.

    Raises:
        Unauthenticated: the token is missing or not valid.
    """
    try:
        return trust.tokens.verify(bearer_token(authorization))
    except Unauthenticated as error:
        decisions.count_unauthenticated(str(error), at=at)
        raise
