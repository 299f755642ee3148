"""The principal of a job, and the permission checks that a job does itself.

A job acts under an intent (`tokens/intent.py`). The intent comes from one of these places:

- the file in `identity.token_file` or FALAJ_INTENT_FILE,
- Vault, if this setting is `vault:<path>#<field>`,
- the development issuer, if no file is configured. The principal is then the user of this machine, with the configured
role and purpose.

If the file contains an access token, the development issuer exchanges the token for an intent. Its intents are valid
for a short time, and are renewed while the job runs. So a long training does not lose its identity, and a killed job
does not leave a valid token for long. Intents in Vault are fetched again at the same interval. Other intent files must
be renewed by the process that writes them.

The job checks the policies before each action. Its workers use the same intent, and the key broker checks the policies
again for every key. So a job cannot get a forbidden key by skipping its own check. Every denial is an event.
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

from cluster.errors import AccessDenied, ConfigError, FalajError, RefusedError, Unauthenticated, did_you_mean
from cluster.ledger import Ledger
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.keys.access import KeyAccess
from cluster.security.keys.client import ask_broker
from cluster.security.recorded_settings import apply_cluster_record
from cluster.security.tokens.intent import (
    FILE_VARIABLE,
    INTENT_AUDIENCE,
    VAULT_SCHEME,
    intent_file,
    is_intent,
    mint_intent,
    read_token_file,
    remove_expired,
    write_intent,
)
from cluster.security.tokens.issuer import TOKEN_TTL_S
from cluster.security.tokens.principal import Principal, current_actor
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import INTENTS, RENEW_S, TokenSource
from cluster.security.tokens.trust import Trust
from cluster.session import ClusterRecord, find_record
from cluster.settings import IssuerConfig, PlatformConfig, StorageConfig
from cluster.storage import Layout, local, resolve

LOG_FORMAT = "%(asctime)s %(levelname)s PRINCIPAL %(name)s: %(message)s"
WITHDRAW_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """The identity that a job acts under."""

    principal: Principal
    access: KeyAccess
    """The same identity for requests to the key broker, as plain data that can be sent to workers."""
    policy: Policy
    environment: str
    decisions: DecisionRecorder

    @property
    def name(self) -> str:
        """The subject, as events name it."""
        return self.principal.subject

    def check(self, action: Action, *resources: Resource) -> None:
        """Require that the policies permit the action on every resource.

        Raises:
            AccessDenied: the message names the policies. The denial is also an event.
        """
        try:
            self.decisions.check(
                self.policy, self.principal, action, *resources, environment=self.environment, at=time.time()
            )
        except AccessDenied:
            self.decisions.flush()  # a job usually ends after a denial
            raise


def create_actor(config: PlatformConfig, record: ClusterRecord, ledger: Ledger, *, entrypoint: str) -> Actor:
    """Return the identity of the job that this process runs, and add the principal's name to the log lines.

    Args:
        config: names the token and the issuer; updated with the running cluster's settings, see
            `cluster/security/recorded_settings.py`.
        record: record of the running cluster.
        ledger: where decisions are recorded.
        entrypoint: the module that runs, such as "feature_jobs.ingest".

    Raises:
        ConfigError: the role does not exist, the token file cannot be read or is readable by other users, or the
            configuration contradicts the running cluster.
        Unauthenticated: the token is invalid, or is an intent for another entry point. An event records this.
    """
    apply_cluster_record(record, config)
    places = record.layout
    decisions = DecisionRecorder(ledger.append)
    with _recording_unauthenticated(decisions):
        principal, token = _identify(config, record, entrypoint)
    _name_in_logs(principal.subject)
    return Actor(
        principal=principal,
        access=KeyAccess(
            socket=record.key_socket,
            token=token,
            entrypoint=entrypoint,
            owner=record.owner_uid,
            root=places.disk,
            issuer=config.identity.issuer,
            cluster_id=record.cluster_id,
        ),
        policy=Policy.load(region=config.cluster.region),
        environment=config.identity.environment,
        decisions=decisions,
    )


def check_reader(ledger: Ledger, places: Layout, token_file: Path) -> None:
    """Require that the holder of a token may read the ledger.

    The token must come from the issuer of the cluster at this storage root or, if no such cluster is recorded, from the
    development issuer.

    Raises:
        Unauthenticated, AccessDenied: the token is invalid or lacks the right. An event records this.
        ConfigError: the file cannot be read, or there is no issuer.
    """
    policy, decisions = Policy.load(), DecisionRecorder(ledger.append)
    trust, token = Trust.of(_issuer_of(places), places), read_token_file(token_file)
    with _recording_unauthenticated(decisions):
        reader = trust.tokens.verify(token)
    whole_ledger = Resource(kind="ledger", name="ledger")
    decisions.check(policy, reader, Action.read_ledger, whole_ledger, at=time.time())


@contextlib.contextmanager
def _recording_unauthenticated(decisions: DecisionRecorder) -> Iterator[None]:
    """Record an `Unauthenticated` error as an event, then raise it again."""
    try:
        yield
    except Unauthenticated as error:
        decisions.count_unauthenticated(str(error), at=time.time())
        decisions.flush()
        raise


def _issuer_of(places: Layout) -> IssuerConfig:
    record = find_record(StorageConfig(root=places.root, local=places.local or None))
    is_own_record = record is not None and record.layout.disk == places.disk
    return IssuerConfig(**record.issuer) if is_own_record and record and record.issuer else IssuerConfig()


def _identify(
    config: PlatformConfig, record: ClusterRecord, entrypoint: str
) -> tuple[Principal, TokenSource]:
    """Return the job's principal and the place of its intent."""
    places = record.layout
    trust = Trust.of(config.identity.issuer, places)
    reference = config.identity.token_file or os.environ.get(FILE_VARIABLE, "")
    file = intent_file(config.identity.token_file, os.environ)
    if file is None:
        principal = _local_user(config)
    elif reference.startswith(VAULT_SCHEME):
        # Vault's client is slow to import, and few jobs need it.
        from cluster.security.keys.vault_token import token_in_vault

        token = token_in_vault(reference, config.secrets.vault)
        if is_intent(token):
            intent = trust.intents.verify(token, entrypoint=entrypoint)
            return intent.principal, _renewed_intent(
                record, entrypoint, lambda: token_in_vault(reference, config.secrets.vault)
            )
        principal = trust.tokens.verify(token)
    else:
        file = Path(resolve(str(file)))
        token = read_token_file(file)
        if is_intent(token):
            principal = trust.intents.verify(token, entrypoint=entrypoint).principal
            if not record.has_nodes:
                return principal, TokenSource(file=str(file))
            path = file  # workers on other nodes get a copy
            return principal, _renewed_intent(record, entrypoint, lambda: read_token_file(path))
        principal = trust.tokens.verify(token)
    if config.identity.issuer.url is not None:
        raise ConfigError(
            f"A job needs an intent of {config.identity.issuer.url}: a token for the audience {INTENT_AUDIENCE} with "
            f"the claim entrypoint '{entrypoint}'. Name its file with identity.token_file=…"
        )
    if record.node_id is not None:
        raise ConfigError(
            "The development issuer is on the head. Run the command there, or make an intent there with `python -m "
            f"cluster.security.identity intent --entrypoint {entrypoint} …` and name its file with "
            "identity.token_file=…"
        )
    source = _renewed_intent(
        record,
        entrypoint,
        lambda: mint_intent(places, principal, entrypoint=entrypoint, ttl_s=TOKEN_TTL_S),
    )
    return trust.intents.verify(source.token(), entrypoint=entrypoint).principal, source


def _local_user(config: PlatformConfig) -> Principal:
    role = config.identity.role
    roles = [name for name in Role.__members__ if name != Role.supervisor]  # for the cluster itself only
    if role not in roles:
        raise ConfigError(f"identity.role={role} does not exist.{did_you_mean(role, roles)}")
    return Principal(
        subject=current_actor(), role=Role(role), purpose=config.identity.purpose, expires_at=int(time.time())
    )


def _renewed_intent(record: ClusterRecord, entrypoint: str, new_token: Callable[[], str]) -> TokenSource:
    """Keep an intent for this process and its workers in a file. A thread renews it until the process ends.

    A node that joined also sends it to the head, where workers on other nodes get it.
    """
    folder = local(record.layout.keys) / INTENTS
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_expired(folder)
    path = folder / f"{entrypoint}-{uuid.uuid4().hex}.jwt"

    def renew() -> None:
        token = new_token()
        write_intent(path, token)
        if record.node_id is not None:
            ask_broker(Path(record.key_socket), {"op": "deposit", "name": path.name, "intent": token})

    def renew_until_ended() -> None:
        while not ended.wait(RENEW_S):
            try:
                renew()
            except (OSError, FalajError, RefusedError) as error:
                logging.getLogger(__name__).warning("The job's intent could not be renewed: %s", error)

    def stop() -> None:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)
        if record.node_id is not None:
            with contextlib.suppress(OSError, FalajError):  # the head removes it later
                withdrawal: dict[str, object] = {"op": "withdraw", "name": path.name}
                ask_broker(Path(record.key_socket), withdrawal, timeout_s=WITHDRAW_S)

    renew()
    ended, thread = threading.Event(), threading.Thread(target=renew_until_ended, daemon=True, name="intent")
    thread.start()
    atexit.register(stop)
    return TokenSource(intent=path.name, root=record.layout.disk)


def _name_in_logs(subject: str) -> None:
    """Add the principal's name to the log format.

    The name is part of the format text, because Hydra cannot configure a default for a field of a formatter.
    """
    formatter = logging.Formatter(LOG_FORMAT.replace("PRINCIPAL", subject.replace("%", "%%")))
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
