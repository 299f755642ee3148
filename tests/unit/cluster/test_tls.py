"""The local CA and the edge's certificate, used by real TLS connections."""

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
from cluster.security.tls.certificates import ensure_tls, write_node_certificate
from cluster.session import tls_environment
from cluster.storage import Layout
from tests.commands import run_main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tls folder of a new storage root."""
    ensure_tls(Layout(str(tmp_path)))
    return tmp_path / "tls"


def connect(server_pem: Path, ca: Path, name: str) -> str | None:
    """The TLS version that a client and a server in memory agree on."""
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
def test_a_client_that_trusts_the_ca_connects(folder: Path, name: str) -> None:
    """By address and by name, with strict verification."""
    assert connect(folder / "edge.pem", folder / "ca.pem", name) == "TLSv1.3"


def test_another_host_name_is_refused(folder: Path) -> None:
    """The certificate speaks for this machine's loopback only."""
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        connect(folder / "edge.pem", folder / "ca.pem", "example.org")


def test_another_ca_is_refused(folder: Path, tmp_path: Path) -> None:
    """Every storage root has a CA of its own."""
    ensure_tls(Layout(str(tmp_path / "other")))
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(folder / "edge.pem", tmp_path / "other" / "tls" / "ca.pem", "localhost")


def test_only_the_ca_may_sign_and_the_edge_may_only_serve(folder: Path) -> None:
    """Basic constraints and key usages."""
    ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    edge = x509.load_pem_x509_certificate((folder / "edge.pem").read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not edge.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = list(edge.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usages == [x509.ExtendedKeyUsageOID.SERVER_AUTH]


def test_keys_are_for_their_owner_and_a_second_start_keeps_them(folder: Path) -> None:
    """Clients that trust the CA go on working."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("edge.pem", "ca.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in files["ca.pem"]
    ensure_tls(Layout(str(folder.parent)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("missing", ["edge.pem", "ca.pem", "ca.key", "node.pem", "node.key"])
def test_a_start_that_was_cut_short_is_made_up_for(folder: Path, missing: str) -> None:
    """What is missing is made anew, and fits together."""
    (folder / missing).unlink()
    ensure_tls(Layout(str(folder.parent)))
    assert connect(folder / "edge.pem", folder / "ca.pem", "localhost") == "TLSv1.3"
    assert mutual(folder, folder) == "TLSv1.3"


def mutual(server: Path, client: Path) -> str | None:
    """The version that two nodes agree on, each asking for the other's certificate."""
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(client / "ca.pem"))
    for context, folder in ((listening, server), (calling, client)):
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
    listening.load_verify_locations(server / "ca.pem")
    return shake_hands(listening, calling, "127.0.0.1")


def test_nodes_show_each_other_certificates_of_one_authority(folder: Path, tmp_path: Path) -> None:
    """Of another machine too; one of another authority is refused by both."""
    write_node_certificate(tmp_path / "worker", authority=folder, name="worker-1", addresses=["10.0.0.7"])
    assert mutual(folder, tmp_path / "worker") == "TLSv1.3"
    made = x509.load_pem_x509_certificate((tmp_path / "worker" / "node.pem").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["worker-1", "localhost", "10.0.0.7", "127.0.0.1", "::1"]
    assert (tmp_path / "worker" / "node.key").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "worker" / "ca.key").exists(), "the authority's key stays where it is"
    ensure_tls(Layout(str(tmp_path / "other")))
    for server, client in ((folder, tmp_path / "other" / "tls"), (tmp_path / "other" / "tls", folder)):
        with pytest.raises(ssl.SSLError):
            mutual(server, client)


def test_rays_variables_name_the_files_there_are(folder: Path) -> None:
    """And say so where there is no TLS, because the shell's own could say otherwise."""
    named = tls_environment(str(folder.parent), on=True)
    assert named.pop("RAY_USE_TLS") == "1"
    assert all(Path(path).exists() for path in named.values())
    assert tls_environment(str(folder.parent), on=False) == {"RAY_USE_TLS": "0"}


@pytest.mark.parametrize(("share", "renewed"), [(0.6, False), (0.7, True)])
def test_a_certificate_is_renewed_in_its_last_third(folder: Path, share: float, renewed: bool) -> None:
    """By the same authority, so that clients go on; before that it stays."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=tls.LEAF_DAYS * share)
    ensure_tls(Layout(str(folder.parent)), now=later)
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == ({"edge.pem", "node.pem", "node.key"} if renewed else set())


@pytest.mark.parametrize("content", ["a company's", "no certificate"])
def test_what_somebody_else_put_there_is_not_touched(folder: Path, tmp_path: Path, content: str) -> None:
    """A company's own certificate stays, and a broken file is for the edge to complain of."""
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


def test_the_command_shows_renews_and_issues(folder: Path, tmp_path: Path) -> None:
    """For whoever runs the cluster."""
    root = ("--root", str(folder.parent))
    shown = run_main(tls.main, *root, "show").stdout
    assert [line.split()[0] for line in shown.splitlines()] == ["ca.pem", "edge.pem", "node.pem"]
    before = (folder / "edge.pem").read_bytes()
    assert run_main(tls.main, *root, "renew").returncode == 0
    assert (folder / "edge.pem").read_bytes() != before
    node = ("node", "--name", "w", "--output", str(tmp_path / "w"), "--ip")
    assert run_main(tls.main, *root, *node, "10.0.0.7").returncode == 0
    assert mutual(folder, tmp_path / "w") == "TLSv1.3"
    wrong = run_main(tls.main, *root, *node, "ten")
    assert (wrong.returncode, "address is invalid" in wrong.stderr) == (2, True)
    nowhere = run_main(tls.main, "--root", str(tmp_path / "none"), "show")
    assert (nowhere.returncode, "cluster.up" in nowhere.stderr) == (2, True)


def company(folder: Path) -> dict[str, bytes]:
    """Lay a company's authority and certificates into a tls folder, without the authority's key; gives the files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Company CA")])
    certificate = tls._builder(name, name, key.public_key(), days=30).sign(key, hashes.SHA256())
    usages = tls._BOTH_SIDES
    leaf = tls._leaf(
        key, tls._Authority(certificate, key), name="company.example", addresses=["127.0.0.1"], usages=usages
    )
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "ca.pem").write_bytes(tls._pem(certificate))
    (folder / "node.pem").write_bytes(tls._pem(leaf))
    (folder / "node.key").write_bytes(tls._key_pem(key))
    (folder / "edge.pem").write_bytes(tls._pem(leaf) + tls._key_pem(key))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("taken", [None, "edge.pem", "node.pem", "node.key"])
def test_a_companys_authority_is_not_replaced(folder: Path, taken: str | None) -> None:
    """Its key lies elsewhere. Where a certificate of it is missing, it is said that the company has to issue it."""
    files = company(folder)
    if taken is None:
        ensure_tls(Layout(str(folder.parent)), now=dt.datetime.now(dt.UTC) + dt.timedelta(days=25))
    else:
        (folder / taken).unlink()
        del files[taken]
        with pytest.raises(ConfigError, match=f"another authority's certificate: {taken} missing"):
            ensure_tls(Layout(str(folder.parent)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_companys_authority_renews_and_issues_by_itself(folder: Path, tmp_path: Path) -> None:
    """Also where the key of an earlier authority of our own lies beside it still."""
    old = (folder / "ca.key").read_bytes()
    files = company(folder)
    (folder / "ca.key").write_bytes(old)
    with pytest.raises(ConfigError, match="another authority's"):
        ensure_tls(Layout(str(folder.parent)), renew=True)
    with pytest.raises(ConfigError, match="another authority's"):
        write_node_certificate(tmp_path / "w", authority=folder, name="w", addresses=[])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files | {"ca.key": old}


def test_a_renewal_that_was_killed_between_key_and_certificate_is_finished(
    folder: Path, tmp_path: Path
) -> None:
    """By the next start; a pair that does not fit would let no node speak with another."""
    write_node_certificate(tmp_path / "w", authority=folder, name="w", addresses=[])
    (folder / "node.key").write_bytes((tmp_path / "w" / "node.key").read_bytes())
    ensure_tls(Layout(str(folder.parent)))
    assert mutual(folder, folder) == "TLSv1.3"
