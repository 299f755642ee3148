"""Detect whether a folder is in memory or on an encrypted device, so that its files cannot be read from a raw disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
MOUNTS, DEVICES = Path("/proc/self/mountinfo"), Path("/sys/dev/block")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A mounted file system."""

    folder: str
    device: str
    """`major:minor`."""
    kind: str


def parse_mounts(table: str) -> list[Mount]:
    """Parse the mounts in the text of a `mountinfo` file (proc(5)), in the order in which they were made."""
    parsed = []
    for line in table.splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split(" ")
        folder = fields[4].encode().decode("unicode_escape")  # mountinfo writes a space as \040
        parsed.append(Mount(folder=folder, device=fields[2], kind=tail.split(" ")[0]))
    return parsed


def is_protected_at_rest(folder: Path, *, table: Path = MOUNTS, devices: Path = DEVICES) -> bool | None:
    """Return whether a folder, or its nearest existing parent, is in memory or on an encrypted device.

    Only encryption by Linux is detected. Encryption by a hypervisor or by the disk itself is not visible to Linux.

    Args:
        folder: folder to look up.
        table: file with the list of mounts.
        devices: folder with the block devices.

    Returns:
        None if the mount cannot be found on this machine.
    """
    mount = find_mount(folder, table=table)
    return (
        None if mount is None else mount.kind in MEMORY_FILE_SYSTEMS or _is_encrypted(devices / mount.device)
    )


def find_mount(folder: Path, *, table: Path = MOUNTS) -> Mount | None:
    """Return the mount of a folder or of its nearest existing parent, or None if no mount is found."""
    try:
        all_mounts = parse_mounts(table.read_text())
    except (OSError, IndexError):
        return None
    path = os.path.realpath(folder)
    candidates = [
        mount
        for mount in all_mounts
        if path == mount.folder or path.startswith(f"{mount.folder.rstrip('/')}/")
    ]
    return (
        max(enumerate(candidates), key=lambda item: (len(item[1].folder), item[0]))[1] if candidates else None
    )


def _is_encrypted(device: Path) -> bool:
    """Return whether a device is a dm-crypt device, or consists only of dm-crypt devices."""
    uuid = device / "dm" / "uuid"
    if uuid.exists() and uuid.read_text().startswith("CRYPT-"):
        return True
    lower_devices = list((device / "slaves").glob("*"))
    return bool(lower_devices) and all(_is_encrypted(lower) for lower in lower_devices)
