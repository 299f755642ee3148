"""The head's decision about a machine that asks to join, and what the machine then gets."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.errors import ConfigError, InvalidRequest, Unauthenticated
from cluster.host.names import is_address
from cluster.ledger import Ledger
from cluster.ledger.events import NodeJoined, NodeLeft
from cluster.membership import join_token
from cluster.membership.members import HEAD, Member, current_members
from cluster.membership.shared_state import require_shared_state
from cluster.membership.transport import Peer
from cluster.security.tls.certificates import CA_NAME, is_foreign_authority, sign_node_key
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from cluster.storage import local, write_bytes

ACTOR = "system:head"
SHARED_FILES = ("ray_token", "edge_proof", "issuer.pub.pem", "jwks.json")
"""Files below `keys/` that every node gets. The keyring and the private keys of the issuer and the ledger stay here."""
_REGION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""Value of a label of a Ray node."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Application:
    """A machine's request to join."""

    token: str
    release: str
    name: str
    address: str
    region: str
    num_cpus: int
    num_gpus: int
    edge: bool
    """Whether the machine runs an edge, and its certificate needs the names of the cluster's edges."""
    signing_request: str
    """Certificate signing request, as PEM. The machine keeps the key."""

    @classmethod
    def from_plain(cls, message: dict[str, object]) -> Application:
        """Read a message.

        Raises:
            InvalidRequest: a field is missing or has a wrong type.
        """
        values = {field: message.get(field) for field in cls.__slots__}
        kinds = {"num_cpus": int, "num_gpus": int, "edge": bool}
        for field, value in values.items():
            if not isinstance(value, kinds.get(field, str)):
                raise InvalidRequest(f"A request to join needs '{field}'.")
        return cls(**values)  # type: ignore[arg-type]


def new_key_and_request(name: str) -> tuple[bytes, str]:
    """Return a new private key and a signing request for it, both as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, signing_request(key, name)


def signing_request(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """Return a signing request for a key, as PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def admit(
    application: Application,
    peer: Peer,
    *,
    config: PlatformConfig,
    record: ClusterRecord,
    ledger: Ledger,
    alive: Collection[str],
    own_release: str,
) -> dict[str, object]:
    """Admit a machine: sign its certificate, record the event, and return what it needs.

    Args:
        application: its request.
        peer: the connection's other end.
        config: the head's configuration.
        record: the head's record.
        ledger: where the event is recorded.
        alive: ids of the nodes that reported within the last seconds.
        own_release: the head's release.

    Raises:
        Unauthenticated: the token is wrong or has expired.
        ConfigError: another release, state that is not shared, or another node has the address.
        InvalidRequest: the request is damaged.
    """
    members = current_members(ledger, record.cluster_id).values()
    _check(application, peer, config=config, record=record, members=members, own_release=own_release)
    certificate, shown = _certificate(
        application, peer, tls=local(record.layout.tls), edge_names=config.cluster.edge_names
    )
    replaced = _dead_members(application.address, record=record, members=members, alive=alive)
    node_id = secrets.token_hex(3)
    write_bytes(proof_path(record, node_id), b"")
    for member in replaced:
        gone = NodeLeft(cluster_id=record.cluster_id, node_id=member.node_id, reason="replaced")
        ledger.append(gone, actor=ACTOR)
    event = NodeJoined(
        cluster_id=record.cluster_id,
        node_id=node_id,
        name=application.name,
        address=application.address,
        region=application.region,
        num_cpus=application.num_cpus,
        num_gpus=application.num_gpus,
        certificate=shown,
    )
    ledger.append(event, actor=ACTOR)
    return _answer(record, node_id, certificate)


def _check(
    application: Application,
    peer: Peer,
    *,
    config: PlatformConfig,
    record: ClusterRecord,
    members: Iterable[Member],
    own_release: str,
) -> None:
    """Require a valid token first, then everything else that a node of this cluster needs.

    Raises:
        Unauthenticated, ConfigError, InvalidRequest: as for `admit`.
    """
    join_token.check(record.layout, application.token)
    if application.release != own_release:
        raise ConfigError(
            f"This machine has another release than the head. Here: {application.release}. Head: {own_release}. "
            "Install the head's release here."
        )
    require_shared_state(config)
    if application.address != peer.address:
        raise ConfigError(
            f"cluster.address={application.address} is not the address that the head sees ({peer.address}). Set "
            "cluster.address to it; nodes behind address translation cannot join."
        )
    if not _REGION.fullmatch(application.region):
        raise InvalidRequest("A region has at most 63 letters, digits, '.', '_' and '-'. Set cluster.region.")
    _check_name(application, members)


def _dead_members(
    address: str, *, record: ClusterRecord, members: Iterable[Member], alive: Collection[str]
) -> list[Member]:
    """Return the dead nodes with an address. A new node may take it.

    Raises:
        ConfigError: the head or a node that is alive has the address.
    """
    found = [member for member in members if member.address == address]
    if address == record.address or any(member.node_id in alive for member in found):
        raise ConfigError(
            f"Another node of the cluster has the address {address} and is alive. Run "
            "`python -m cluster.leave` there first, or choose another cluster.address."
        )
    return found


def _answer(record: ClusterRecord, node_id: str, certificate: str | None) -> dict[str, object]:
    """Return what a new node needs."""
    tls, keys = local(record.layout.tls), local(record.layout.keys)
    return {
        "node_id": node_id,
        "cluster_id": record.cluster_id,
        "certificate": certificate,
        "authority": (tls / CA_NAME).read_text(),
        "files": {name: text for name in SHARED_FILES if (text := _text(keys / name)) is not None},
        "overrides": list(record.overrides or ()),
        "ray_address": record.ray_address,
        "ports": record.ports,
        "head_region": record.region,
        "time": time.time(),
    }


def _check_name(application: Application, members: Iterable[Member]) -> None:
    """Require a name that can be no address, and that means no other node to an operator.

    Raises:
        InvalidRequest: it is an address, or has other characters.
        ConfigError: another node has the name.
    """
    name = application.name
    if not _NAME.fullmatch(name) or is_address(name):
        raise InvalidRequest("A node's name has letters, digits, '.' and '-', and is not an address.")
    taken = {HEAD}
    for member in members:
        if member.address != application.address:
            taken.update((member.name.lower(), member.node_id))
    if name.lower() in taken:
        raise ConfigError(
            f"Another node of the cluster is named '{name}'. Choose another name with name=…; if that node is dead, "
            "run `python -m cluster.leave node=…` on the head first."
        )


def _certificate(
    application: Application, peer: Peer, *, tls: Path, edge_names: Collection[str]
) -> tuple[str | None, str]:
    """Return the node's new certificate as PEM, and its SHA-256 in hex.

    If another authority issued the cluster's certificates, the machine must have one of it already, and has shown it.

    Raises:
        ConfigError: it has shown none.
    """
    if is_foreign_authority(tls / CA_NAME):
        if peer.certificate is None:
            raise ConfigError(
                "The cluster's certificates come from another authority than the head. Put ca.pem, node.pem and "
                "node.key of this machine into <storage.local>/tls, then join again."
            )
        return None, peer.certificate
    certificate = sign_node_key(
        requested_key(application.signing_request),
        authority=tls,
        name=application.name,
        addresses=[application.address],
        other_names=edge_names if application.edge else (),
    )
    return certificate.decode(), fingerprint(certificate)


def proof_path(record: ClusterRecord, node_id: str) -> str:
    """Return the file that the head writes and a new node must find: both see the same storage root."""
    return f"{record.storage_root}/.falaj-nodes/{node_id}"


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a PEM certificate, in hex."""
    der = x509.load_pem_x509_certificate(certificate).public_bytes(serialization.Encoding.DER)
    return hashlib.sha256(der).hexdigest()


def requested_key(signing_request: str) -> ec.EllipticCurvePublicKey:
    """Return the public key in a signing request.

    Raises:
        InvalidRequest: the request is damaged.
        Unauthenticated: it is not signed with its own key.
    """
    try:
        request = x509.load_pem_x509_csr(signing_request.encode())
    except ValueError:
        raise InvalidRequest("The signing request is damaged.") from None
    key = request.public_key()
    if not request.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
        raise Unauthenticated("The signing request is not signed with its own key.")
    return key


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
