"""A container of the image, run by runc: uid 1000, no capabilities, read-only root, own network namespace."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.nodes.namespaces import Machine

USER_ID = 1000
NAME = "falaj.example"
"""Host name of the container's edge in its certificate."""
PORT = 8443
STOP_S = 120.0
COMMAND_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container, started or not, with its volume and network namespace."""

    name: str
    bundle: Path
    root: Path
    """The volume: the container's `/data`."""
    machine: Machine

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run the image's program, and kill it at the end if it still runs. Its output goes to `log`."""
        with self.log.open("ab") as sink:
            process = subprocess.Popen(
                [*self._runc("run"), "--bundle", str(self.bundle), self.name],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                subprocess.run([*self._runc("kill"), self.name, "KILL"], check=False, capture_output=True)
                process.wait(STOP_S)
            subprocess.run([*self._runc("delete"), "--force", self.name], check=False, capture_output=True)

    @property
    def log(self) -> Path:
        """File with the output of the container's program."""
        return self.bundle / "container.log"

    def run(self, module: str, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `python -m module` in the container."""
        return self.execute("python", "-m", module, *args, check=check)

    def execute(self, *command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command in the container. With `check`, a failure shows the command's output."""
        result = subprocess.run(
            [*self._runc("exec"), self.name, *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert not (check and result.returncode), f"{command}: {result.stdout}{result.stderr}"
        return result

    def _runc(self, command: str) -> list[str]:
        return [_runc(), "--root", str(self.bundle / "state"), command]


@contextlib.contextmanager
def mounted(image: str) -> Iterator[Path]:
    """Mount an image's file system, and remove the mount at the end."""
    working = _output("buildah", "from", "--pull-never", image)
    try:
        yield Path(_output("buildah", "mount", working))
    finally:
        subprocess.run(["buildah", "rm", working], check=False, capture_output=True)


def image_config(image: str) -> dict[str, Any]:
    """Return what an image says about its program: user, environment, entry point and health check."""
    content: dict[str, Any] = json.loads(_output("buildah", "inspect", "--type", "image", image))
    config: dict[str, Any] = content["Docker"]["config"]
    return config


def create(*, image: str, root: Path, folder: Path, machine: Machine, options: list[str]) -> Container:
    """Write a runtime bundle, as a container engine does. `options` are added to the image's command."""
    bundle, volume = folder / "bundle", folder / "data"
    for path in (bundle, volume):
        path.mkdir(mode=0o700)
    shutil.chown(volume, USER_ID, USER_ID)
    # A container engine writes this file, too.
    hosts = bundle / "hosts"
    hosts.write_text("127.0.0.1 localhost falaj\n")
    hosts.chmod(0o644)
    specification = _specification(
        image_config(image), root=root, volume=volume, hosts=hosts, machine=machine, options=options
    )
    (bundle / "config.json").write_text(json.dumps(specification))
    return Container(name=machine.namespace, bundle=bundle, root=volume, machine=machine)


def _specification(
    config: dict[str, Any], *, root: Path, volume: Path, hosts: Path, machine: Machine, options: list[str]
) -> dict[str, Any]:
    user, _, group = config["User"].partition(":")
    private = ["nosuid", "nodev"]
    return {
        "ociVersion": "1.0.2",
        "hostname": "falaj",
        "root": {"path": str(root), "readonly": True},
        "process": {
            "user": {"uid": int(user), "gid": int(group)},
            "args": [*config["Entrypoint"], *config["Cmd"], *options],
            "env": config["Env"],
            "cwd": config["WorkingDir"],
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "mounts": [
            _mount("/proc", "proc"),
            _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            _mount("/dev/shm", "tmpfs", *private, "mode=1777", "size=2g"),
            _mount("/sys", "sysfs", *private, "noexec", "ro"),
            _mount("/tmp", "tmpfs", *private, "mode=1777", "size=2g"),
            _mount("/data", "bind", *private, "rbind", "rw", source=volume),
            _mount("/etc/hosts", "bind", *private, "rbind", "ro", source=hosts),
        ],
        "linux": {
            "namespaces": [
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                {"type": "network", "path": f"/run/netns/{machine.namespace}"},
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def _mount(destination: str, kind: str, *options: str, source: Path | None = None) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": kind,
        "source": str(source or kind),
        "options": list(options),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _runc() -> str:
    return shutil.which("runc") or "/usr/sbin/runc"
