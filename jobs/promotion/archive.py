"""The file of a bundle: an uncompressed tar archive that begins with a signed statement about all other parts.

`tar -xf` can unpack it. Our own reader is much stricter than a tar library. The statement lists the parts that follow
in their order, with their sizes. Each header must be exactly the one that the writer makes for this part. So there are
no links, no other paths, no second part of the same name, no compression and no sizes but the signed ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tarfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from cluster.errors import ArtifactTampered, ConfigError

T = TypeVar("T")

ENVELOPE = "statement.dsse.json"
MAX_ENVELOPE_BYTES = 1 << 24
MAX_BUNDLE_BYTES = 16 << 30
"""Largest total size of the parts. They are read into memory."""
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


class Part(NamedTuple):
    """A part of a bundle, as the signed statement describes it."""

    name: str
    size: int
    sha256: str


@contextlib.contextmanager
def new_archive(path: Path, envelope: bytes, parts: Mapping[str, bytes]) -> Iterator[None]:
    """Write an archive under a temporary name, and give it its name at the end of the `with` block.

    The file has mode 0600. If the block fails, no file is left.

    Raises:
        ConfigError: The file exists, or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _refusals(path):
            if os.path.lexists(path):
                raise FileExistsError
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                _write(file, {ENVELOPE: envelope, **parts})
                file.flush()
                os.fsync(file.fileno())
        yield
        with _refusals(path):
            _name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise ConfigError(f"{path} exists. Remove it, or choose another output.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Choose another output.") from error


def _name(temporary: Path, path: Path) -> None:
    """Give a file its name. A link never replaces another file; a file system without links, such as FAT, renames."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError from None
        temporary.rename(path)


def _write(file: BinaryIO, parts: Mapping[str, bytes]) -> None:
    for name, data in parts.items():
        file.write(_header(name, len(data)))
        file.write(data)
        file.write(bytes(-len(data) % _BLOCK))
    file.write(bytes(2 * _BLOCK))
    file.write(bytes(-file.tell() % _RECORD))


def read_archive(
    path: Path, open_envelope: Callable[[bytes], tuple[T, Sequence[Part]]]
) -> tuple[T, dict[str, bytes]]:
    """Read and verify an archive, and return the content of its envelope and of all other parts.

    Args:
        path: The file.
        open_envelope: Verifies the envelope's signature, and returns its content and the parts that follow, in order.

    Raises:
        ConfigError: The file cannot be read, is no regular file, or belongs to another user.
        ArtifactTampered: The file differs from what was signed. The message names the first part that does.
    """
    with _open_own(path) as file:
        size = os.fstat(file.fileno()).st_size
        opened, parts = open_envelope(_read_envelope(file, path))
        total = sum(part.size for part in parts)
        if total > size:
            raise ArtifactTampered(f"{path} is cut off: its parts are larger than the file. Copy it again.")
        if total > MAX_BUNDLE_BYTES:
            raise ConfigError(
                f"{path} has {total} bytes, and at most {MAX_BUNDLE_BYTES} can be imported. Export a smaller model."
            )
        contents = {part.name: _read_part(file, part) for part in parts}
        rest = file.read(3 * _RECORD)
        if len(rest) > 2 * _RECORD or any(rest):
            raise ArtifactTampered(
                f"{path} has data after its last part, which was not signed. Export it again."
            )
        if len(rest) < 2 * _BLOCK:
            raise ArtifactTampered(f"{path} is cut off after its last part. Copy it again.")
    return opened, contents


@contextlib.contextmanager
def _open_own(path: Path) -> Iterator[BinaryIO]:
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is no regular file. Name the file that `jobs.export_model` wrote.")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigError(
                f"{path} belongs to user {status.st_uid}, who could change it at any time. Copy it to a file of yours."
            )
        try:
            yield file
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def _read_envelope(file: BinaryIO, path: Path) -> bytes:
    block = file.read(_BLOCK)
    try:
        size = tarfile.TarInfo.frombuf(block, "utf-8", "strict").size
    except (tarfile.HeaderError, UnicodeDecodeError):
        size = -1
    if not 0 <= size <= MAX_ENVELOPE_BYTES or block != _header(ENVELOPE, size):
        raise ArtifactTampered(f"{path} is no bundle: it does not begin with {ENVELOPE}. Export it again.")
    return _read_data(file, ENVELOPE, size)


def _read_part(file: BinaryIO, part: Part) -> bytes:
    block = file.read(_BLOCK)
    if block != _header(part.name, part.size):
        raise ArtifactTampered(_wrong_header(block, part))
    data = _read_data(file, part.name, part.size)
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise ArtifactTampered(
            f"'{part.name}' was altered after the export: it does not have its signed hash. Export it again."
        )
    return data


def _read_data(file: BinaryIO, name: str, size: int) -> bytes:
    data, padding = file.read(size), file.read(-size % _BLOCK)
    if len(data) != size or padding != bytes(-size % _BLOCK):
        raise ArtifactTampered(f"The file is cut off or altered in '{name}'. Copy or export it again.")
    return data


def _wrong_header(block: bytes, part: Part) -> str:
    if len(block) < _BLOCK:
        return f"The file is cut off before '{part.name}'. Copy or export it again."
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        what = f"{found.name!r} with {found.size} bytes"
    except tarfile.HeaderError:
        what = "no tar header"
    return (
        f"The file has {what} where the signed '{part.name}' with {part.size} bytes must be. It was altered after the "
        "export; export it again."
    )


def _header(name: str, size: int) -> bytes:
    """Return the only accepted header of a part."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return bytes(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))
