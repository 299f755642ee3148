"""The key-encryption key of a keyring: from a private file, or derived from a passphrase.

Python cannot overwrite memory after use: bytes are immutable, and Python copies them. So a key stays in the process
until its memory is reused, and may reach swap or a core dump. Run the broker with `ulimit -c 0` and encrypted swap, and
give the key to no other process.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from cluster.errors import ConfigError
from cluster.host.fsync import sync_folder
from cluster.security.keys.store import KeyFileRefused

KEK_BYTES = 32
SALT_BYTES = 16
MIN_PASSPHRASE_CHARS = 12
MAX_SCRYPT_N = 2**20
"""Largest n: with r=8, it needs 1 GiB of memory. Without a limit, an altered file could demand more memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Derivation:
    """Parameters of scrypt, which derives a key from a passphrase (RFC 7914).

    They are stored in the keyring's header, and are not secret.

    Raises:
        ConfigError: a parameter is out of range.
    """

    salt: bytes
    n: int = 2**17
    r: int = 8
    p: int = 1

    def __post_init__(self) -> None:
        if len(self.salt) < SALT_BYTES:
            raise ConfigError(f"scrypt's salt must have at least {SALT_BYTES} bytes, got {len(self.salt)}.")
        if not 2**14 <= self.n <= MAX_SCRYPT_N or self.n & (self.n - 1):
            raise ConfigError(f"scrypt's n must be a power of two from 2^14 to 2^20, got {self.n}.")
        if not (1 <= self.r <= 16 and 1 <= self.p <= 4):
            raise ConfigError(f"scrypt's r must be 1-16 and p 1-4, got r={self.r}, p={self.p}.")

    @classmethod
    def new(cls) -> Derivation:
        """Return a derivation with a random salt."""
        return cls(salt=secrets.token_bytes(SALT_BYTES))

    def key(self, passphrase: str) -> bytes:
        """Return the 32-byte key. With the default parameters, this takes about half a second and 128 MiB.

        Raises:
            ConfigError: the passphrase is too short to be secure.
        """
        text = unicodedata.normalize("NFC", passphrase)
        if len(text) < MIN_PASSPHRASE_CHARS:
            raise ConfigError(
                f"The keyring's passphrase must have at least {MIN_PASSPHRASE_CHARS} characters."
            )
        return Scrypt(salt=self.salt, length=KEK_BYTES, n=self.n, r=self.r, p=self.p).derive(text.encode())


def kek_from_passphrase(passphrase: str, salt: bytes) -> bytes:
    """Derive the key of a passphrase with scrypt's default cost.

    Raises:
        ConfigError: the passphrase or the salt is too short.
    """
    return Derivation(salt=salt).key(passphrase)


def create_kek_file(path: Path) -> bytes:
    """Create a random key in a new 0600 file, completely or not at all, and return the key.

    Raises:
        KeyFileRefused: the file already exists. Overwriting it would lose every key of its keyring.
    """
    kek = secrets.token_bytes(KEK_BYTES)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(kek)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        raise KeyFileRefused(
            f"A key-encryption key already exists at {path}, and it is never overwritten."
        ) from None
    finally:
        os.unlink(temporary)
    sync_folder(path.parent)
    return kek


def kek_from_file(path: Path) -> bytes:
    """Return the key in a file.

    Raises:
        KeyFileRefused: the file is missing, a link, owned by another user, readable by others, or not 32 bytes long.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeyFileRefused(
            f"No key-encryption key at {path}. Restore it from a backup: without it nothing can be decrypted."
        ) from None
    except OSError as error:
        raise KeyFileRefused(f"The key-encryption key {path} cannot be opened: {error.strerror}.") from None
    try:
        _check_owned(path, os.fstat(descriptor))
        kek = os.read(descriptor, KEK_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(kek) != KEK_BYTES:
        raise KeyFileRefused(
            f"{path} does not hold a key-encryption key of {KEK_BYTES} bytes. Restore it from a backup."
        )
    return kek


def _check_owned(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileRefused(f"The key-encryption key {path} is not a plain file.")
    if status.st_uid != os.geteuid():
        raise KeyFileRefused(
            f"The key-encryption key {path} belongs to user {status.st_uid}, not to {os.geteuid()}, who reads it. "
            "Give it to the user who runs the broker."
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode != 0o600:
        raise KeyFileRefused(
            f"The key-encryption key {path} has mode {mode:04o}, not 0600. Other users may have read it: create a new "
            "key and rotate to it. If you know that they have not, run `chmod 600` on it."
        )
