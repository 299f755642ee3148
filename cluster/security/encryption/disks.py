"""Whether what is written to a folder can be read from the disk afterwards: memory and encrypted devices keep it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MEMORY = frozenset({"tmpfs", "ramfs"})
MOUNTS, DEVICES = Path("/proc/self/mountinfo"), Path("/sys/dev/block")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A mounted file system."""

    folder: str
    device: str
    """`major:minor`."""
    kind: str


def mounts(table: str) -> list[Mount]:
    """The mounts in the text of a `mountinfo` file (proc(5)), in the order in which they were made."""
    found = []
    for line in table.splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split(" ")
        folder = fields[4].encode().decode("unicode_escape")  # a space in a name is written \040
        found.append(Mount(folder=folder, device=fields[2], kind=tail.split(" ")[0]))
    return found


def keeps_secrets(folder: Path, *, table: Path = MOUNTS, devices: Path = DEVICES) -> bool | None:
    """Whether a folder, or the first one above it that exists, is in memory or on an encrypted device.

    Only what Linux says of it counts: encryption by the hypervisor or the disk itself cannot be seen from here.

    Args:
        folder: what is asked about.
        table: the mounts there are.
        devices: the block devices there are.

    Returns:
        None where this machine does not say.
    """
    mount = mount_of(folder, table=table)
    return None if mount is None else mount.kind in MEMORY or _is_encrypted(devices / mount.device)


def mount_of(folder: Path, *, table: Path = MOUNTS) -> Mount | None:
    """What a folder, or the first one above it that exists, lies on; none where this machine does not say."""
    try:
        known = mounts(table.read_text())
    except (OSError, IndexError):
        return None
    path = os.path.realpath(folder)
    above = [one for one in known if path == one.folder or path.startswith(f"{one.folder.rstrip('/')}/")]
    return max(enumerate(above), key=lambda item: (len(item[1].folder), item[0]))[1] if above else None


def _is_encrypted(device: Path) -> bool:
    """A dm-crypt device, or one that lies on nothing else."""
    uuid = device / "dm" / "uuid"
    if uuid.exists() and uuid.read_text().startswith("CRYPT-"):
        return True
    below = list((device / "slaves").glob("*"))
    return bool(below) and all(_is_encrypted(one) for one in below)
