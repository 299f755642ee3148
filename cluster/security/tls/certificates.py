"""Certificates of the local authority, the edge and Ray's nodes.

`cluster.up` creates the certificates of authority, edge and head at first use. `cluster.up` and the supervisor renew
the certificates of edge and head when less than a third of their lifetime is left. A renewed certificate of a node has
the same key, so only one file changes. Nothing replaces the authority, nor a certificate that another authority issued.

In production the authority is a PKI, such as Vault's (`keys/vault_session.py`). The edge
needs one PEM file with certificate and key. Ray needs one file each for certificate, key and authority.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.errors import ConfigError
from cluster.host.names import is_address
from cluster.security.tokens.issuer import replace_private_file
from cluster.storage import Layout, local

CA_DAYS = 3650
LEAF_DAYS = 397
"""Lifetime of the edge's and the nodes' certificates, in days. Browsers reject longer lifetimes."""
CLOCK_SKEW = dt.timedelta(minutes=5)
"""A new certificate is valid from this time before now, for machines whose clocks are slow."""
CA_NAME, CA_KEY_NAME = "ca.pem", "ca.key"
EDGE_NAME = "edge.pem"
NODE_CERTIFICATE_NAME, NODE_KEY_NAME = "node.pem", "node.key"
AUTHORITY_SUBJECT = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Falaj local CA")])
COMMON_NAME_PREFIX, MAX_COMMON_NAME = "falaj-node-", 64
LOOPBACK = ("127.0.0.1", "::1")
_BOTH_SIDES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def ensure_tls(
    places: Layout,
    *,
    addresses: Collection[str] = (),
    edge_names: Collection[str] = (),
    renew: bool = False,
    now: dt.datetime | None = None,
) -> None:
    """Ensure that this machine has an authority, and valid certificates for the edge and for Ray.

    Args:
        places: paths below the storage root.
        addresses: addresses that the node's certificate needs besides loopback. It keeps those that it has already.
        edge_names: names and addresses that the edge's certificate needs besides loopback; it keeps others, too.
        renew: create the certificates again, even if they are still valid.
        now: the time for the check of the lifetime; the current time by default.

    Raises:
        ConfigError: the folder has another authority's certificate, and one of the other files is missing, an address
            is missing in it, or `renew` is set; or `renew` is set on a node that joined.
    """
    at = now or dt.datetime.now(dt.UTC)
    folder = local(places.tls)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if is_foreign_authority(folder / CA_NAME):
        _require_foreign_files(folder, renew=renew)
        require_addresses(folder / NODE_CERTIFICATE_NAME, addresses)
        return
    if renew and (folder / CA_NAME).exists() and not (folder / CA_KEY_NAME).exists():
        raise ConfigError(
            f"{folder / CA_NAME} has no {CA_KEY_NAME} here: the head's authority issued these certificates. Run "
            "`python -m cluster.leave`, then join again. On a head, `python -m cluster.up` makes a new authority."
        )
    authority = _authority(folder)
    if renew or _is_due(folder / EDGE_NAME, authority, at, names=edge_names):
        names = certificate_names(folder / EDGE_NAME).union(edge_names).difference(LOOPBACK)
        _write_edge_certificate(folder, authority, names=sorted(names))
    node_is_due = _is_due(folder / NODE_CERTIFICATE_NAME, authority, at, key=folder / NODE_KEY_NAME)
    present = certificate_addresses(folder / NODE_CERTIFICATE_NAME)
    if renew or node_is_due or not present.issuperset(addresses):
        all_addresses = sorted(present.union(addresses).difference(LOOPBACK))
        write_node_certificate(
            folder, authority=folder, name=socket.gethostname(), addresses=all_addresses, keep_key=not renew
        )


def _write_edge_certificate(folder: Path, authority: _Authority, *, names: Collection[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _leaf(
        key.public_key(),
        authority,
        common_name="localhost",
        hosts=[name for name in names if not is_address(name)],
        addresses=(*filter(is_address, names), *LOOPBACK),
        usages=(ExtendedKeyUsageOID.SERVER_AUTH,),
    )
    replace_private_file(folder / EDGE_NAME, _pem(certificate) + _key_pem(key))


def certificate_names(path: Path) -> set[str]:
    """Return the names and IP addresses in a certificate; empty if the file is missing or damaged."""
    return {str(name.value) for name in _alternative_names(path)}


def certificate_addresses(path: Path) -> set[str]:
    """Return the IP addresses in a certificate; empty if the file is missing or damaged."""
    return {str(name.value) for name in _alternative_names(path) if isinstance(name, x509.IPAddress)}


def _alternative_names(path: Path) -> list[x509.GeneralName]:
    try:
        return alternative_names(x509.load_pem_x509_certificate(path.read_bytes()))
    except (FileNotFoundError, ValueError):
        return []


def alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """Return the names and addresses in a certificate."""
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def require_addresses(path: Path, addresses: Iterable[str]) -> None:
    """Require that a certificate of another authority has the addresses.

    Raises:
        ConfigError: one is missing.
    """
    missing = set(addresses).difference(LOOPBACK, certificate_addresses(path))
    if missing:  # Ray would hang instead of failing
        raise ConfigError(
            f"{path} of another authority lacks the address {', '.join(sorted(missing))}. Get a certificate with it."
        )


def is_foreign_authority(authority: Path) -> bool:
    """Return whether a file is the certificate of an authority that this module did not create.

    The certificate's subject and issuer decide this.
    """
    if not authority.exists():
        return False
    try:
        certificate = x509.load_pem_x509_certificate(authority.read_bytes())
    except ValueError:
        return True
    return not certificate.subject == certificate.issuer == AUTHORITY_SUBJECT


def require_authority(folder: Path) -> None:
    """Require the authority of a running cluster. No node would trust certificates of a new one.

    Raises:
        ConfigError: the local authority's key or certificate is missing.
    """
    if is_foreign_authority(folder / CA_NAME):
        return
    missing = [name for name in (CA_NAME, CA_KEY_NAME) if not (folder / name).exists()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)} of the authority. Put it back from a backup.")


def _require_foreign_files(folder: Path, *, renew: bool) -> None:
    """Require that the folder has all files of another authority, and that `renew` is not set."""
    names = (EDGE_NAME, NODE_CERTIFICATE_NAME, NODE_KEY_NAME)
    missing = [name for name in names if not (folder / name).exists()]
    if missing or renew:
        problem = f"{', '.join(missing)} missing" if missing else "only it can renew what it issued"
        raise ConfigError(
            f"{folder / CA_NAME} is another authority's certificate: {problem}. Put its {', '.join(names)} there, or "
            f"remove {CA_NAME} to use a local authority."
        )


def write_node_certificate(
    folder: Path, *, authority: Path, name: str, addresses: Iterable[str], keep_key: bool = False
) -> None:
    """Write a node's certificate and key, and the authority's certificate, to a folder.

    Args:
        folder: the folder to write to.
        authority: folder of the authority's certificate and key.
        name: host name of the machine.
        addresses: addresses under which other nodes reach the machine. If one is missing, Ray waits without an error.
        keep_key: use the key in the folder, if there is one. Then processes never read a key and a certificate that do
            not match.

    Raises:
        ConfigError: there is no local authority, or an address is invalid.
    """
    present = private_key(folder / NODE_KEY_NAME) if keep_key else None
    key = present or ec.generate_private_key(ec.SECP256R1())
    certificate = sign_node_key(
        key.public_key(), authority=authority, name=name, addresses=addresses, other_names=(name,)
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_private_file(folder / NODE_KEY_NAME, _key_pem(key))
    replace_private_file(folder / NODE_CERTIFICATE_NAME, certificate, mode=0o644)
    if folder != authority:
        replace_private_file(folder / CA_NAME, (authority / CA_NAME).read_bytes(), mode=0o644)


def sign_node_key(
    key: ec.EllipticCurvePublicKey,
    *,
    authority: Path,
    name: str,
    addresses: Iterable[str],
    other_names: Collection[str] = (),
) -> bytes:
    """Return a certificate for a node's key, as PEM.

    Args:
        key: the node's public key.
        authority: folder of the authority's certificate and key.
        name: name of the machine. It is in the subject only, because a machine that joins chooses it itself.
        addresses: addresses under which other nodes reach it.
        other_names: other names and addresses for which the certificate is valid.

    Raises:
        ConfigError: there is no local authority, or an address is invalid.
    """
    if is_foreign_authority(authority / CA_NAME):
        raise ConfigError(
            f"{authority / CA_NAME} is another authority's certificate. Get the node's certificate from that authority."
        )
    if not (authority / CA_KEY_NAME).exists():
        raise ConfigError(f"No certificate authority at {authority}. Run `python -m cluster.up` first.")
    signer = _authority(authority)
    hosts = [host for host in other_names if not is_address(host)]
    all_addresses = (*addresses, *filter(is_address, other_names), *LOOPBACK)
    # HAProxy also compares addresses with the common name, so it must never be an address.
    common_name = f"{COMMON_NAME_PREFIX}{name}"[:MAX_COMMON_NAME]
    return _pem(
        _leaf(key, signer, common_name=common_name, hosts=hosts, addresses=all_addresses, usages=_BOTH_SIDES)
    )


def _authority(folder: Path) -> _Authority:
    """Return the folder's authority. If its key or certificate is missing, create both, the key first."""
    if not (folder / CA_NAME).exists() or not (folder / CA_KEY_NAME).exists():
        new_key = ec.generate_private_key(ec.SECP256R1())
        replace_private_file(folder / CA_KEY_NAME, _key_pem(new_key))
        replace_private_file(folder / CA_NAME, _pem(_self_signed(new_key)), mode=0o644)
    key = serialization.load_pem_private_key((folder / CA_KEY_NAME).read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / CA_KEY_NAME} is not a key of an elliptic curve. Remove the folder.")
    return _Authority(x509.load_pem_x509_certificate((folder / CA_NAME).read_bytes()), key)


def _is_due(
    path: Path,
    authority: _Authority,
    at: dt.datetime,
    *,
    key: Path | None = None,
    names: Collection[str] = (),
) -> bool:
    """Return whether a certificate must be created.

    It must be created if the certificate or its key is missing. A local certificate must be created again if an earlier
    authority issued it, if it does not fit the key in `key`, if one of the names is missing, or if less than a third of
    its lifetime is left. Certificates of other authorities, such as a company's PKI, are never replaced.
    """
    if not path.exists() or not (key is None or key.exists()):
        return True
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        return False
    if certificate.issuer != authority.certificate.subject:
        return False
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except InvalidSignature:
        return True
    if key is not None and not _has_key(certificate, key):
        return True
    return in_last_third(certificate, at) or not certificate_names(path).issuperset(names)


def in_last_third(certificate: x509.Certificate, at: dt.datetime) -> bool:
    """Return whether less than a third of a certificate's lifetime is left."""
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_after_utc - at < lifetime / 3


def _has_key(certificate: x509.Certificate, key: Path) -> bool:
    """Return whether a key fits a certificate. If a process was killed between writing both, it does not fit."""
    present = private_key(key)
    return present is not None and present.public_key() == certificate.public_key()


def private_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    """Return the key in a file; None if the file is missing or damaged, or has a key of another kind."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = AUTHORITY_SUBJECT
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(name, name, key.public_key(), days=CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _leaf(
    key: ec.EllipticCurvePublicKey,
    authority: _Authority,
    *,
    common_name: str,
    addresses: Iterable[str],
    usages: Iterable[x509.ObjectIdentifier],
    hosts: Iterable[str] = (),
) -> x509.Certificate:
    try:
        parsed = [ipaddress.ip_address(address) for address in dict.fromkeys(addresses)]
    except ValueError as error:
        raise ConfigError(
            f"A node's address is invalid: {error}. Use --ip with an address such as 10.0.0.7."
        ) from error
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    # The edge's HAProxy compares the address that it connects to with DNS names only.
    remote = [str(address) for address in parsed if not address.is_loopback]
    names = [x509.DNSName(host) for host in dict.fromkeys((*hosts, "localhost", *remote))]
    return (
        _builder(subject, authority.certificate.subject, key, days=LEAF_DAYS)
        .add_extension(
            x509.SubjectAlternativeName([*names, *(x509.IPAddress(address) for address in parsed)]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
        )
        .sign(authority.key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
