"""Tests of `is_protected_at_rest`, with a fake mount table and fake devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.security.encryption.disks import is_protected_at_rest

TABLE = r"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:23 / /dev/shm rw - tmpfs tmpfs rw
24 22 253:1 / /home rw shared:7 - ext4 /dev/mapper/home rw
25 22 253:2 / /data rw - xfs /dev/mapper/vg-data rw
26 22 253:3 / /half rw - xfs /dev/mapper/vg-half rw
27 22 254:0 / /mnt/a\040b rw - ext4 /dev/vda rw
28 27 0:24 / /mnt/a\040b/memory rw - tmpfs tmpfs rw
29 22 0:25 / /net rw - nfs4 server:/ rw
30 24 254:0 / /home rw - ext4 /dev/vda rw
31 30 253:1 / /home rw - ext4 /dev/mapper/home rw
"""


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """Return a mount table and devices: an encrypted one, a volume on it, and a volume that is half on it."""
    devices = tmp_path / "block"
    for name in ("254:0", "253:1/dm", "253:2/dm", "253:2/slaves", "253:3/dm", "253:3/slaves"):
        (devices / name).mkdir(parents=True)
    (devices / "253:1/dm/uuid").write_text("CRYPT-LUKS2-abc-home\n")
    for name in ("253:2", "253:3"):
        (devices / name / "dm/uuid").write_text("LVM-abc\n")
        (devices / name / "slaves/dm-1").symlink_to(devices / "253:1")
    (devices / "253:3/slaves/vda").symlink_to(devices / "254:0")
    table = tmp_path / "mountinfo"
    table.write_text(TABLE)
    return table, devices


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/tmp/falaj-1", False),
        ("/dev/shm/falaj", True),
        ("/dev/shmooze", False),
        ("/home/ann/not/there/yet", True),
        ("/data/spill", True),
        ("/half/spill", False),
        ("/mnt/a b/x", False),
        ("/mnt/a b/memory/x", True),
        ("/net/x", False),
    ],
)
def test_memory_and_encrypted_devices_keep_secrets(
    machine: tuple[Path, Path], folder: str, expected: bool
) -> None:
    """The nearest mount counts, and of two at the same path the later one. A half-encrypted volume does not count."""
    table, devices = machine
    assert is_protected_at_rest(Path(folder), table=table, devices=devices) is expected


@pytest.mark.parametrize("content", [None, "", "nonsense\n"])
def test_result_is_unknown_without_a_mount_table(tmp_path: Path, content: str | None) -> None:
    """For example, macOS has no mount table."""
    table = tmp_path / "mountinfo"
    if content is not None:
        table.write_text(content)
    assert is_protected_at_rest(Path("/tmp"), table=table, devices=tmp_path) is None


def test_real_mount_table_can_be_read() -> None:
    if Path("/dev/shm").is_mount():
        assert is_protected_at_rest(Path("/dev/shm/anything")) is True
