"""Certificates of the local authority, used in real TLS handshakes."""

from __future__ import annotations

import datetime as dt
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.errors import ConfigError
from cluster.security.tls import certificates as tls
from cluster.security.tls.__main__ import main
from cluster.security.tls.certificates import ensure_tls, write_node_certificate
from cluster.session import tls_environment
from cluster.storage import Layout
from tests.processes.commands import run_main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tls folder of a new storage root."""
    ensure_tls(Layout(str(tmp_path)))
    return tmp_path / "tls"


def connect(server_pem: Path, ca: Path, name: str) -> str | None:
    """Return the TLS version of a handshake in memory, None if it fails to complete."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(server_pem)
    return shake_hands(server, ssl.create_default_context(cafile=str(ca)), name)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str | None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = client.wrap_bio(to_client, to_server, server_hostname=name)
    answerer = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(5):
        for side in (caller, answerer):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return caller.version()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "::1"])
def test_client_that_trusts_the_authority_connects(folder: Path, name: str) -> None:
    """By address and by name, with strict verification."""
    assert connect(folder / "edge.pem", folder / "ca.pem", name) == "TLSv1.3"


@pytest.mark.parametrize("name", ["10.0.0.1", "api.example.com", "a.b.example.com", "127.0.0.1"])
def test_edge_is_reached_by_the_names_it_was_given(folder: Path, name: str) -> None:
    """A certificate without one of them is created again, and keeps the names that it had."""
    places = Layout(str(folder.parent))
    ensure_tls(places, edge_names=["10.0.0.1", "api.example.com"])
    before = (folder / "edge.pem").read_bytes()
    ensure_tls(places, edge_names=["api.example.com"])
    assert (folder / "edge.pem").read_bytes() == before
    ensure_tls(places, edge_names=["*.b.example.com"])
    assert connect(folder / "edge.pem", folder / "ca.pem", name) == "TLSv1.3"


def test_another_host_name_or_authority_is_refused(folder: Path, tmp_path: Path) -> None:
    """The certificate is valid for loopback only, and every storage root has its own authority."""
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        connect(folder / "edge.pem", folder / "ca.pem", "example.org")
    ensure_tls(Layout(str(tmp_path / "other")))
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(folder / "edge.pem", tmp_path / "other" / "tls" / "ca.pem", "localhost")


def test_only_the_authority_may_sign(folder: Path) -> None:
    """The edge certificate is for servers only (basic constraints and key usages)."""
    ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    edge = x509.load_pem_x509_certificate((folder / "edge.pem").read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not edge.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = list(edge.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usages == [x509.ExtendedKeyUsageOID.SERVER_AUTH]


def test_second_start_keeps_the_private_keys(folder: Path) -> None:
    """Clients that trust the authority keep working. Only the owner can read the keys."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("edge.pem", "ca.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in files["ca.pem"]
    ensure_tls(Layout(str(folder.parent)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("missing", ["edge.pem", "ca.pem", "ca.key", "node.pem", "node.key"])
def test_missing_file_is_created_again(folder: Path, missing: str) -> None:
    """The new file fits the others."""
    (folder / missing).unlink()
    ensure_tls(Layout(str(folder.parent)))
    assert connect(folder / "edge.pem", folder / "ca.pem", "localhost") == "TLSv1.3"
    assert mutual(folder, folder) == "TLSv1.3"


def mutual(server: Path, client: Path) -> str | None:
    """Return the TLS version of a handshake in which both nodes verify each other."""
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(client / "ca.pem"))
    for context, folder in ((listening, server), (calling, client)):
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
    listening.load_verify_locations(server / "ca.pem")
    return shake_hands(listening, calling, "127.0.0.1")


def test_nodes_of_one_authority_accept_each_other(folder: Path, tmp_path: Path) -> None:
    """This includes nodes of other machines. Nodes of another authority are refused by both sides.

    The address is in the certificate as an address, and as a name for the edge's HAProxy.
    """
    write_node_certificate(tmp_path / "worker", authority=folder, name="worker-1", addresses=["10.0.0.7"])
    assert mutual(folder, tmp_path / "worker") == "TLSv1.3"
    certificate = x509.load_pem_x509_certificate((tmp_path / "worker" / "node.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["worker-1", "localhost", "10.0.0.7"]
    assert tls.certificate_addresses(tmp_path / "worker" / "node.pem") == {"10.0.0.7", "127.0.0.1", "::1"}
    assert (tmp_path / "worker" / "node.key").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "worker" / "ca.key").exists(), "the authority's key stays where it is"
    ensure_tls(Layout(str(tmp_path / "other")))
    for server, client in ((folder, tmp_path / "other" / "tls"), (tmp_path / "other" / "tls", folder)):
        with pytest.raises(ssl.SSLError):
            mutual(server, client)


def test_certificate_gets_an_address_and_keeps_it(folder: Path) -> None:
    """A later start without the address, and a renewal, keep it: other nodes still use it."""
    places = Layout(str(folder.parent))
    ensure_tls(places, addresses=["10.0.0.1"])
    before = (folder / "node.pem").read_bytes()
    ensure_tls(places)
    assert (folder / "node.pem").read_bytes() == before
    ensure_tls(places, addresses=["10.0.0.2"], renew=True)
    addresses = {"10.0.0.1", "10.0.0.2", "127.0.0.1", "::1"}
    assert tls.certificate_addresses(folder / "node.pem") == addresses


def test_foreign_certificate_without_the_nodes_address_is_refused(folder: Path) -> None:
    """With it, Ray would hang."""
    company(folder)
    with pytest.raises(ConfigError, match=r"lacks the address 10\.0\.0\.1"):
        ensure_tls(Layout(str(folder.parent)), addresses=["10.0.0.1", "127.0.0.1"])


def test_ray_variables_name_existing_files(folder: Path) -> None:
    """They also switch TLS off explicitly, because the shell's variables may differ."""
    variables = tls_environment(Layout(str(folder.parent)), on=True)
    assert variables.pop("RAY_USE_TLS") == "1"
    assert all(Path(path).exists() for path in variables.values())
    assert tls_environment(Layout(str(folder.parent)), on=False) == {"RAY_USE_TLS": "0"}


@pytest.mark.parametrize(("share", "renewed"), [(0.6, False), (0.7, True)])
def test_certificate_is_renewed_in_its_last_third(folder: Path, share: float, renewed: bool) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=tls.LEAF_DAYS * share)
    ensure_tls(Layout(str(folder.parent)), now=later)
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == ({"edge.pem", "node.pem"} if renewed else set())


@pytest.mark.parametrize("content", ["a company's", "no certificate"])
def test_foreign_certificate_is_not_replaced(folder: Path, tmp_path: Path, content: str) -> None:
    """A company's certificate stays. An invalid file stays too, and the edge reports it."""
    edge = folder / "edge.pem"
    edge.write_text("no certificate")
    if content == "a company's":
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "company.example")])
        edge.write_bytes(
            tls._pem(tls._builder(name, name, key.public_key(), days=1).sign(key, hashes.SHA256()))
        )
    before = edge.read_bytes()
    ensure_tls(Layout(str(folder.parent)), now=dt.datetime.now(dt.UTC) + dt.timedelta(days=300))
    assert edge.read_bytes() == before


def test_command_shows_renews_and_issues(folder: Path, tmp_path: Path) -> None:
    """An invalid address and a missing authority exit with 2."""
    root = ("--root", str(folder.parent))
    shown = run_main(main, *root, "show").stdout
    assert [line.split()[0] for line in shown.splitlines()] == ["ca.pem", "edge.pem", "node.pem"]
    before = (folder / "edge.pem").read_bytes()
    assert run_main(main, *root, "renew").returncode == 0
    assert (folder / "edge.pem").read_bytes() != before
    node = ("node", "--name", "w", "--output", str(tmp_path / "w"), "--ip")
    assert run_main(main, *root, *node, "10.0.0.7").returncode == 0
    assert mutual(folder, tmp_path / "w") == "TLSv1.3"
    wrong = run_main(main, *root, *node, "ten")
    assert (wrong.returncode, "address is invalid" in wrong.stderr) == (2, True)
    missing = run_main(main, "--root", str(tmp_path / "none"), "show")
    assert (missing.returncode, "cluster.up" in missing.stderr) == (2, True)


def company(folder: Path) -> dict[str, bytes]:
    """Put a company's authority and certificates into a tls folder, without the authority's key; return the files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Company CA")])
    certificate = tls._builder(name, name, key.public_key(), days=30).sign(key, hashes.SHA256())
    usages = tls._BOTH_SIDES
    leaf = tls._leaf(
        key.public_key(),
        tls._Authority(certificate, key),
        common_name="company.example",
        hosts=["company.example"],
        addresses=["127.0.0.1"],
        usages=usages,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "ca.pem").write_bytes(tls._pem(certificate))
    (folder / "node.pem").write_bytes(tls._pem(leaf))
    (folder / "node.key").write_bytes(tls._key_pem(key))
    (folder / "edge.pem").write_bytes(tls._pem(leaf) + tls._key_pem(key))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("removed", [None, "edge.pem", "node.pem", "node.key"])
def test_foreign_authority_is_not_replaced(folder: Path, removed: str | None) -> None:
    """Its key is elsewhere. If one of its files is missing, the error names it."""
    files = company(folder)
    if removed is None:
        ensure_tls(Layout(str(folder.parent)), now=dt.datetime.now(dt.UTC) + dt.timedelta(days=25))
    else:
        (folder / removed).unlink()
        del files[removed]
        with pytest.raises(ConfigError, match=f"another authority's certificate: {removed} missing"):
            ensure_tls(Layout(str(folder.parent)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_foreign_authority_cannot_be_renewed_here(folder: Path, tmp_path: Path) -> None:
    """This is true even if the key of an earlier local authority still exists."""
    old = (folder / "ca.key").read_bytes()
    files = company(folder)
    (folder / "ca.key").write_bytes(old)
    with pytest.raises(ConfigError, match="another authority's"):
        ensure_tls(Layout(str(folder.parent)), renew=True)
    with pytest.raises(ConfigError, match="another authority's"):
        write_node_certificate(tmp_path / "w", authority=folder, name="w", addresses=[])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files | {"ca.key": old}


def test_interrupted_renewal_is_completed_by_the_next_start(folder: Path, tmp_path: Path) -> None:
    """A key that does not fit its certificate would stop all connections between nodes."""
    write_node_certificate(tmp_path / "w", authority=folder, name="w", addresses=[])
    (folder / "node.key").write_bytes((tmp_path / "w" / "node.key").read_bytes())
    ensure_tls(Layout(str(folder.parent)))
    assert mutual(folder, folder) == "TLSv1.3"


def test_a_joined_node_makes_no_authority_of_its_own(tmp_path: Path) -> None:
    """A new one would replace the head's certificate in ca.pem, and the node would trust no other node any more."""
    places = Layout(str(tmp_path))
    ensure_tls(places)
    folder = tmp_path / "tls"
    (folder / "ca.key").unlink()
    authority = (folder / "ca.pem").read_bytes()
    with pytest.raises(ConfigError, match=r"head's authority issued.*cluster\.leave"):
        ensure_tls(places, renew=True)
    assert (folder / "ca.pem").read_bytes() == authority
