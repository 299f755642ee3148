"""The replica's own check of tokens and permissions.

The edge has already checked a request. But a client could reach a replica's port without the edge.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from cluster.errors import Unauthenticated
from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent
from cluster.security.authorization.audit import Append, DecisionRecorder, start_flushing
from cluster.security.authorization.bearer import bearer_token
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.recorded_settings import apply_cluster_record
from cluster.security.tokens.principal import Principal, TokenVerifier
from cluster.security.tokens.trust import Trust
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout

FLUSH_S, CLOSE_S = 60.0, 5.0
MAX_CACHED = 10_000
MAX_CACHED_S = 60
"""A verified token is cached for at most this many seconds, so that tokens of a withdrawn key soon become invalid."""


class AccessCheck:
    """Verifies tokens and checks permissions. Verified tokens are cached, because ES256 is slower than a prediction.

    Args:
        verifier: verifier of the installation's tokens.
        policy: the policies that decide.
        resource: default resource of a check.
        environment: the installation's name in the policies.
        append: appends decisions to the ledger. It must not delay a request.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        *,
        policy: Policy,
        resource: Resource,
        environment: str,
        append: Append,
    ) -> None:
        self._verifier = verifier
        self._policy = policy
        self._resource = resource
        self._environment = environment
        self._decisions = DecisionRecorder(append)
        self._ended = threading.Event()
        self._keeper = start_flushing(self._decisions, every_s=FLUSH_S, stopped=self._ended)
        self._known: dict[str, tuple[Principal, float]] = {}

    @classmethod
    def of(cls, config: PlatformConfig, resource: Resource, ledger: Ledger) -> AccessCheck:
        """Build a check with the running cluster's identity settings. It appends decisions in the background.

        Raises:
            ConfigError: the configuration contradicts the cluster's record.
        """
        apply_cluster_record(require_running_cluster(config), config)
        return cls(
            Trust.of(config.identity.issuer, layout(config.storage)).tokens,
            policy=Policy.load(region=config.cluster.region),
            resource=resource,
            environment=config.identity.environment,
            append=append_in_background(ledger),
        )

    def close(self) -> None:
        """Record the last counts of unauthenticated requests. A killed replica loses the counts of at most a minute."""
        self._ended.set()
        self._keeper.join(CLOSE_S)

    def __call__(
        self, authorization: str | None, action: Action, resource: Resource | None = None
    ) -> Principal:
        """Return the token's principal, if the principal may do the action.

        Args:
            authorization: value of the Authorization header.
            action: the requested action.
            resource: resource of the action. None means this check's default.

        Raises:
            Unauthenticated: the token is missing or not valid.
            AccessDenied: the policies do not allow the action.
        """
        try:
            principal = self._principal(authorization)
        except Unauthenticated as error:
            self._decisions.count_unauthenticated(str(error), at=time.time())
            raise
        self.check(principal, action, self._resource if resource is None else resource)
        return principal

    def check(self, principal: Principal, action: Action, *resources: Resource) -> None:
        """Require that a principal may do the action on each resource.

        Raises:
            AccessDenied: the policies do not allow the action on one of the resources.
        """
        self._decisions.check(
            self._policy, principal, action, *resources, environment=self._environment, at=time.time()
        )

    def _principal(self, authorization: str | None) -> Principal:
        token = bearer_token(authorization)
        now = self._verifier.now()
        principal, until = self._known.get(token, (None, 0.0))
        if principal is not None and now < until:
            return principal
        self._known.pop(token, None)
        principal = self._verifier.verify(token)
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        expires_at = principal.expires_at + self._verifier.rules.leeway_s
        self._known[token] = (principal, min(expires_at, now + MAX_CACHED_S))
        return principal


def append_in_background(ledger: Ledger) -> Append:
    """Return a function that appends events to the ledger in a thread, in order. Errors are only logged."""
    writer = ThreadPoolExecutor(1, "decisions")

    def log_error(written: Future[object]) -> None:
        if (error := written.exception()) is not None:
            logging.getLogger("falaj.serve").error("An event could not be recorded: %s", error)

    def append(event: LedgerEvent, *, actor: str) -> object:
        written: Future[object] = writer.submit(ledger.append, event, actor=actor)
        written.add_done_callback(log_error)
        return written

    return append
