"""The development issuer: its keys, their rotation, and its command line."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from joserfc.jwk import ECKey

from cluster.errors import ConfigError, Unauthenticated
from cluster.security import identity
from cluster.security.tokens.intent import IntentVerifier, read_intent
from cluster.security.tokens.issuer import ensure_issuer, mint_token, rotate_issuer
from cluster.security.tokens.principal import TokenVerifier, local_keys
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import MAX_LIFETIME_S
from cluster.settings import Tier
from cluster.storage import Layout
from tests.processes.commands import run_main


def test_second_start_keeps_the_issuer(places: Layout) -> None:
    """A second start keeps the keys. Only the owner can read the private key."""
    files = {path.name: path.read_bytes() for path in Path(places.keys).iterdir()}
    ensure_issuer(places)
    assert {path.name: path.read_bytes() for path in Path(places.keys).iterdir()} == files
    assert (Path(places.keys) / "issuer.pem").stat().st_mode & 0o777 == 0o600
    assert "d" not in json.loads(files["jwks.json"])["keys"][0]


def test_kid_is_the_thumbprint_of_the_key(places: Layout, kid: str) -> None:
    """The `kid` is the RFC 7638 thumbprint, so a new key has a new `kid`."""
    key = ECKey.import_key((Path(places.keys) / "issuer.pub.pem").read_bytes())
    required = {name: key.as_dict(private=False)[name] for name in ("crv", "kty", "x", "y")}
    digest = hashlib.sha256(json.dumps(required, sort_keys=True, separators=(",", ":")).encode()).digest()
    assert kid == base64.urlsafe_b64encode(digest).decode().rstrip("=")


def test_missing_issuer_error_names_the_command(tmp_path: Path) -> None:
    """Minting never creates keys."""
    places = Layout(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cluster\.up"):
        mint_token(places, subject="a", role=Role.service, purpose="")
    with pytest.raises(ConfigError, match=r"cluster\.up"):
        TokenVerifier.of(places)
    assert list(tmp_path.iterdir()) == []


def mint(places: Layout) -> str:
    return mint_token(places, subject="alice", role=Role.service, purpose="test")


def test_rotation_keeps_old_tokens_valid_until_they_expire(fresh: Layout) -> None:
    """A running verifier sees the rotation without a restart."""
    verifier, old = TokenVerifier.of(fresh), mint(fresh)
    assert verifier.verify(old).subject == "alice"
    kid = rotate_issuer(fresh, keep_s=100, now=1000.0)
    new = mint(fresh)
    assert json.loads(base64.urlsafe_b64decode(new.split(".")[0] + "=="))["kid"] == kid
    assert verifier.verify(old).subject == "alice"
    assert verifier.verify(new).subject == "alice"
    assert next(iter(local_keys(fresh).all())) == kid
    rotate_issuer(fresh, keep_s=100, now=1101.0)
    assert len(local_keys(fresh).all()) == 2
    verifier.verify(new)
    with pytest.raises(Unauthenticated, match="key"):
        verifier.verify(old)


def test_rotation_with_keep_s_0_ends_all_tokens(fresh: Layout) -> None:
    """Tokens of earlier keys are refused at once, too."""
    verifier, tokens = TokenVerifier.of(fresh), [mint(fresh)]
    rotate_issuer(fresh)
    tokens.append(mint(fresh))
    rotate_issuer(fresh, keep_s=0)
    for token in tokens:
        with pytest.raises(Unauthenticated, match="key"):
            verifier.verify(token)
    assert verifier.verify(mint(fresh)).subject == "alice"


def test_interrupted_rotation_loses_no_token(fresh: Layout) -> None:
    """After an interruption before the private key is written, minting and the next rotation work."""
    folder, old = Path(fresh.keys), mint(fresh)
    private, public = (folder / "issuer.pem").read_bytes(), (folder / "issuer.pub.pem").read_bytes()
    rotate_issuer(fresh)
    (folder / "issuer.pem").write_bytes(private)
    (folder / "issuer.pub.pem").write_bytes(public)
    verifier = TokenVerifier.of(fresh)
    assert verifier.verify(old)
    assert verifier.verify(mint(fresh))
    rotate_issuer(fresh)
    assert verifier.verify(old)
    assert verifier.verify(mint(fresh))


def test_private_key_stays_private_after_a_rotation(fresh: Layout) -> None:
    """The private key has mode 0600, no temporary file is left, and the JWKS has no private member."""
    rotate_issuer(fresh)
    folder = Path(fresh.keys)
    assert sorted(path.name for path in folder.iterdir()) == ["issuer.pem", "issuer.pub.pem", "jwks.json"]
    assert (folder / "issuer.pem").stat().st_mode & 0o777 == 0o600
    assert all("d" not in entry for entry in json.loads((folder / "jwks.json").read_text())["keys"])
    assert (
        local_keys(fresh)
        .all()[str(ECKey.import_key((folder / "issuer.pem").read_bytes()).thumbprint())]
        .as_pem(private=False)
        == (folder / "issuer.pub.pem").read_bytes()
    )


def test_command_mints_an_intent_for_one_job(fresh: Layout, tmp_path: Path) -> None:
    """The intent is not valid as an access token."""
    path = tmp_path / "intent.jwt"
    flags = ("--sub", "ann", "--role", "data_engineer", "--entrypoint", "feature_jobs.ingest")
    done = run_main(identity.main, "intent", *flags, "--root", fresh.root, "--output", str(path))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    intent = read_intent(path, IntentVerifier.of(fresh), entrypoint="feature_jobs.ingest")
    assert (intent.principal.subject, intent.principal.role) == ("ann", Role.data_engineer)
    with pytest.raises(Unauthenticated):
        TokenVerifier.of(fresh).verify(path.read_text())


def test_production_tier_refuses_the_dev_issuer(fresh: Layout, tmp_path: Path) -> None:
    """The development issuer is neither created nor rotated."""
    with pytest.raises(ConfigError, match="OIDC"):
        ensure_issuer(Layout(str(tmp_path / "other")), tier=Tier.enterprise_gpu)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="OIDC"):
        rotate_issuer(fresh, tier=Tier.enterprise_gpu)


def test_missing_or_broken_key_file_refuses_all_tokens(fresh: Layout) -> None:
    """Tokens are refused without another error. They are valid again when the file is restored."""
    verifier, token, path = TokenVerifier.of(fresh), mint(fresh), Path(fresh.keys) / "jwks.json"
    good = path.read_bytes()
    secret_key = b'{"keys": [{"kty": "oct", "k": "AA"}]}'
    for bad in (None, b"", b"{", b"[]", b'{"keys": 7}', b'{"keys": []}', secret_key):
        path.unlink(missing_ok=True)
        if bad is not None:
            path.write_bytes(bad)
        with pytest.raises(Unauthenticated):
            verifier.verify(token)
    path.write_bytes(good)
    assert verifier.verify(token).subject == "alice"


def test_lifetime_beyond_the_maximum_is_refused(fresh: Layout) -> None:
    """A longer lifetime would need old keys for longer than a rotation keeps them."""
    with pytest.raises(ConfigError, match="shorter"):
        mint_token(fresh, subject="a", role=Role.service, purpose="", ttl_s=MAX_LIFETIME_S + 1)


def run(*arguments: str, command: str = "token") -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return run_main(identity.main, command, *arguments)


def test_command_prints_or_writes_only_the_token(
    places: Layout, verifier: TokenVerifier, tmp_path: Path
) -> None:
    """The output file is readable for its owner only, also if an open file existed before."""
    flags = ["--root", places.root, "--sub", "alice", "--role", "auditor", "--purpose", "audit"]
    printed = run(*flags)
    assert printed.stdout.count("\n") == 1
    assert verifier.verify(printed.stdout.strip()).role is Role.auditor
    output = tmp_path / "token"
    output.write_text("old")
    output.chmod(0o644)
    written = run(*flags, "--output", str(output))
    assert written.stdout == written.stderr == ""
    assert verifier.verify(output.read_text().strip()).subject == "alice"
    assert output.stat().st_mode & 0o777 == 0o600


def test_command_exits_2_when_it_refuses(tmp_path: Path) -> None:
    """It refuses without an issuer, and for an unknown role."""
    missing = run("--root", str(tmp_path), "--sub", "a", "--role", "service")
    assert missing.returncode == 2
    assert missing.stderr.startswith("refused: ")
    assert run("--root", str(tmp_path), "--sub", "a", "--role", "king").returncode == 2


def test_command_verifies_and_rotates(fresh: Layout, tmp_path: Path) -> None:
    """`verify` prints the principal and never the token, or the reason of the refusal."""
    root, file = ("--root", fresh.root), tmp_path / "token"
    run(*root, "--sub", "alice", "--role", "service", "--tenant", "north", "--output", str(file))
    verified = run(*root, str(file), command="verify")
    assert {"subject": "alice", "role": "service", "tenant": "north"}.items() <= json.loads(
        verified.stdout
    ).items()
    assert file.read_text().split(".")[2] not in verified.stdout
    rotated = run(*root, "--keep-s", "0", command="rotate")
    assert (rotated.returncode, next(iter(local_keys(fresh).all())) in rotated.stdout) == (0, True)
    refused = run(*root, str(file), command="verify")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("refused: ")
    assert run(*root, str(tmp_path / "none"), command="verify").returncode == 2
