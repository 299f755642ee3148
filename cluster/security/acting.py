"""As whom a job acts, and what it may do: its point of policy enforcement.

A job's principal is an intent (`tokens/intent.py`). With `identity.token_file` (or FALAJ_INTENT_FILE) it is
the one in that file or, named `vault:<path>#<field>`, in Vault; an access token there is exchanged for one by the dev
issuer. Without a file the dev issuer gives one to the user of this machine, with the configured role and purpose.
Intents of the dev issuer are short-lived and renewed as long as the job lives, so that a long training does not outlive
its identity, and a killed one leaves nothing that holds for long. Those in Vault are fetched again, and others are kept
fresh by whoever wrote the file.

The process asks the policy here before it does something, workers show the same file, and the key broker asks again
for every key: a job that was changed to skip its own check still gets no key. Every denial is an event.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError, FalajError, RefusedError, Unauthenticated, did_you_mean
from cluster.ledger import Ledger
from cluster.security.authorization.audit import Decisions
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.installation import hold_to
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.intent import (
    FILE_VARIABLE,
    INTENT_AUDIENCE,
    intent_file,
    is_intent,
    mint_intent,
    read_private,
    write_intent,
)
from cluster.security.tokens.principal import Principal, current_actor
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import TokenSource
from cluster.security.tokens.trust import Trust
from cluster.session import ClusterRecord, find_record
from cluster.settings import IssuerConfig, PlatformConfig, StorageConfig
from cluster.storage import Layout, local, resolve

TTL_S = 900
RENEW_S = 300
LOG_FORMAT = "%(asctime)s %(levelname)s PRINCIPAL %(name)s: %(message)s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """Who a job acts as."""

    principal: Principal
    access: KeyAccess
    """The same identity for the key broker; plain data, for workers."""
    policy: Policy
    environment: str
    decisions: Decisions

    @property
    def name(self) -> str:
        """As events name it."""
        return self.principal.subject

    def check(self, action: Action, *resources: Resource) -> None:
        """Go on only if the policies permit the action to every resource.

        Raises:
            AccessDenied: naming the policies; an event says so.
        """
        for resource in resources:
            decision = self.policy.decide(self.principal, action, resource, environment=self.environment)
            self.decisions.decided(self.principal, action, resource, decision, at=time.time())
            if not decision.allowed:
                self.decisions.flush()  # a job that is denied something mostly ends
                self.policy.check(self.principal, action, resource, environment=self.environment)


def act(config: PlatformConfig, record: ClusterRecord, ledger: Ledger, *, entrypoint: str) -> Actor:
    """The actor of this process, a job; its name stands in the process's log lines from now on.

    Args:
        config: says as whom; held to what the running cluster is, see `cluster/security/installation.py`.
        record: of the running cluster.
        ledger: where decisions are recorded.
        entrypoint: the module that is run, "feature_jobs.ingest" for one.

    Raises:
        ConfigError: a role that does not exist, a token file that cannot be read or is open to others, or a
            configuration that contradicts the running cluster.
        Unauthenticated: the token does not hold, or is an intent for another entrypoint; an event counts it.
    """
    hold_to(record, config)
    places = Layout(record.storage_root)
    decisions = Decisions(ledger.append)
    with _counting_strangers(decisions):
        principal, path = _identify(config, places, entrypoint)
    _name_in_logs(principal.subject)
    return Actor(
        principal=principal,
        access=KeyAccess(
            socket=record.key_socket,
            token=TokenSource(file=str(path)),
            entrypoint=entrypoint,
            owner=record.owner_uid,
            root=places.root,
            issuer=config.identity.issuer,
        ),
        policy=Policy.load(region=config.cluster.region),
        environment=config.identity.environment,
        decisions=decisions,
    )


def check_reader(ledger: Ledger, places: Layout, token_file: Path) -> None:
    """Go on only if the holder of a token may read the ledger.

    The token is held against the issuer that the storage root's cluster was started with, else the dev issuer.

    Raises:
        Unauthenticated, AccessDenied: an event says so.
        ConfigError: the file cannot be read, or there is no issuer.
    """
    policy, decisions = Policy.load(), Decisions(ledger.append)
    trust, token = Trust.of(_issuer_of(places), places), read_private(token_file)
    with _counting_strangers(decisions):
        reader = trust.tokens.verify(token)
    whole = Resource(kind="ledger", name="ledger")
    decisions.decided(
        reader, Action.read_ledger, whole, policy.decide(reader, Action.read_ledger, whole), at=time.time()
    )
    policy.check(reader, Action.read_ledger, whole)


@contextlib.contextmanager
def _counting_strangers(decisions: Decisions) -> Iterator[None]:
    """Have an event of a token that does not hold, before the error goes on."""
    try:
        yield
    except Unauthenticated as error:
        decisions.unauthenticated(str(error), at=time.time())
        decisions.flush()
        raise


def _issuer_of(places: Layout) -> IssuerConfig:
    record = find_record(StorageConfig(root=places.root))
    own = record is not None and record.storage_root == places.root
    return IssuerConfig(**record.issuer) if own and record and record.issuer else IssuerConfig()


def _identify(config: PlatformConfig, places: Layout, entrypoint: str) -> tuple[Principal, Path]:
    """The principal, and the file that its intent lies in."""
    trust = Trust.of(config.identity.issuer, places)
    named = config.identity.token_file or os.environ.get(FILE_VARIABLE, "")
    given = intent_file(config.identity.token_file, os.environ)
    if given is None:
        granted = _user_of_this_machine(config)
    elif named.startswith("vault:"):
        # Vault's client is slow to import, and few jobs want it.
        from cluster.security.keys.vault_token import token_in_vault

        token = token_in_vault(named, config.secrets.vault)
        if is_intent(token):
            principal = trust.intents.verify(token, entrypoint=entrypoint).principal
            return principal, _kept(places, entrypoint, lambda: token_in_vault(named, config.secrets.vault))
        granted = trust.tokens.verify(token)
    else:
        given = Path(resolve(str(given)))
        token = read_private(given)
        if is_intent(token):
            return trust.intents.verify(token, entrypoint=entrypoint).principal, given
        granted = trust.tokens.verify(token)
    if config.identity.issuer.url is not None:
        raise ConfigError(
            f"A job needs an intent of {config.identity.issuer.url}: a token for the audience {INTENT_AUDIENCE} with "
            f"the claim entrypoint '{entrypoint}'. Name its file with identity.token_file=…"
        )
    path = _kept(places, entrypoint, lambda: mint_intent(places, granted, entrypoint=entrypoint, ttl_s=TTL_S))
    return trust.intents.verify(read_private(path), entrypoint=entrypoint).principal, path


def _user_of_this_machine(config: PlatformConfig) -> Principal:
    role = config.identity.role
    known = [one for one in Role.__members__ if one != Role.supervisor]  # no person's
    if role not in known:
        raise ConfigError(f"identity.role={role} does not exist.{did_you_mean(role, known)}")
    return Principal(
        subject=current_actor(), role=Role(role), purpose=config.identity.purpose, expires_at=int(time.time())
    )


def _kept(places: Layout, entrypoint: str, fresh: Callable[[], str]) -> Path:
    """A file with an intent for this process and its workers, fresh while this process lives."""
    folder = local(places.keys) / "intents"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_expired(folder)
    path = folder / f"{entrypoint}-{uuid.uuid4().hex}.jwt"

    def renew() -> None:
        write_intent(path, fresh())

    def keep() -> None:
        while not ended.wait(RENEW_S):
            try:
                renew()
            except (OSError, FalajError, RefusedError) as error:
                logging.getLogger(__name__).warning("The job's intent could not be renewed: %s", error)

    def end() -> None:
        ended.set()
        keeper.join()
        path.unlink(missing_ok=True)

    renew()
    ended, keeper = threading.Event(), threading.Thread(target=keep, daemon=True, name="intent")
    keeper.start()
    atexit.register(end)
    return path


def _remove_expired(folder: Path) -> None:
    """What killed jobs left behind."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - TTL_S:
                path.unlink()


def _name_in_logs(subject: str) -> None:
    """In the format itself: Hydra lets no configuration name a formatter that has a default for the field."""
    formatter = logging.Formatter(LOG_FORMAT.replace("PRINCIPAL", subject.replace("%", "%%")))
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
