"""`python tests/image/build.py`: build the image with buildah, which needs no daemon and no registry. Needs root.

    BASE=image    the base image; by default Debian, made by mmdebstrap from Debian's packages
    TORCH=gpu     PyTorch for GPUs
    TAG=name      name of the image, `localhost/falaj` by default

The image is in buildah's own storage, which Podman and CRI-O share. pip uses the settings that it has on this machine
(index, certificates, folders of packages). They are mounted during the build only, so no layer contains them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = "bookworm"
DEBIAN_IMAGE = f"localhost/falaj-debian:{DEBIAN}"
IMAGE = "localhost/falaj"
TOOLS = ("buildah", "mmdebstrap")
PIP_FOLDER = "/run/pip"
PIP_SETTINGS = (
    *("index-url", "extra-index-url", "find-links", "trusted-host"),
    *("cert", "client-cert", "constraint", "proxy", "timeout", "retries"),
)
"""Settings of pip that say where packages come from."""


@dataclass(frozen=True, kw_only=True)
class PipSettings:
    """pip's settings for a build."""

    text: str
    """Content of a `pip.conf`."""
    mounts: dict[str, str]
    """Paths of this machine that the settings name, and their paths in the build."""


def main() -> None:
    """Build the image. Exit 2 if a tool is missing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        problem = f"{', '.join(missing)} not installed (Debian: apt-get install buildah mmdebstrap)"
        sys.exit(_refuse(problem if missing else "building an image needs root"))
    base = os.environ.get("BASE") or build_debian()
    build(base, tag=os.environ.get("TAG") or IMAGE, torch=os.environ.get("TORCH") or "cpu")


def build(base: str, *, tag: str, torch: str) -> None:
    """Build the image from the `Dockerfile`."""
    settings = pip_settings(pip_list())
    with tempfile.TemporaryDirectory() as folder:
        pip_file = Path(folder) / "pip.conf"
        pip_file.write_text(settings.text)
        mounts = [f"--volume={source}:{target}:ro" for source, target in settings.mounts.items()]
        # Only Docker's format has HEALTHCHECK.
        _run(
            *("buildah", "build", "--format=docker", "--isolation=chroot", "--layers"),
            *(f"--secret=id=pip,src={pip_file}", *mounts),
            *(f"--build-arg=BASE={base}", f"--build-arg=TORCH={torch}", f"--tag={tag}", str(ROOT)),
        )


def build_debian() -> str:
    """Build the base image from Debian's packages, if it does not exist, and return its name."""
    found = subprocess.run(["buildah", "images", "--quiet", DEBIAN_IMAGE], capture_output=True, check=False)
    if found.returncode == 0:
        return DEBIAN_IMAGE
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "debian.tar"
        # mmdebstrap leaves this machine's name and name server in the file system.
        clean = 'rm --force "$1"/etc/hostname "$1"/etc/resolv.conf'
        _run("mmdebstrap", "--variant=minbase", f"--customize-hook={clean}", DEBIAN, str(archive))
        container = _output("buildah", "from", "scratch")
        try:
            _run("buildah", "add", "--quiet", container, str(archive), "/")
            _run("buildah", "config", "--cmd=/bin/bash", container)
            _run("buildah", "commit", "--quiet", "--format=docker", container, DEBIAN_IMAGE)
        finally:
            _run("buildah", "rm", container)
    return DEBIAN_IMAGE


def pip_list() -> list[str]:
    """Return pip's settings on this machine, as lines such as `global.cert='/etc/ca.pem'`; empty without pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.splitlines()


def pip_settings(lines: Iterable[str]) -> PipSettings:
    """Return the settings that say where packages come from, with paths as the build sees them."""
    values: dict[str, str] = {}
    # Environment variables have precedence, and pip lists them first.
    for line in reversed(list(lines)):
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = value.strip().strip("'\"")
    mounts: dict[str, str] = {}
    content = ["[global]"]
    for name in PIP_SETTINGS:
        if name in values:
            words = [_in_build(word, mounts) for word in values[name].split()]
            content.append(f"{name} = {' '.join(words)}")
    return PipSettings(text="\n".join(content) + "\n", mounts=mounts)


def _in_build(word: str, mounts: dict[str, str]) -> str:
    """Return a word of pip's settings for the build. A path of this machine gets a mount."""
    path = Path(word.removeprefix("file://"))
    if not path.is_absolute() or not path.exists():
        return word
    # The files of a local index are often beside its pages, so the folder above the pages is mounted.
    source = path.parent if word.startswith("file://") else path
    target = mounts.setdefault(str(source), f"{PIP_FOLDER}/{len(mounts)}")
    return f"file://{target}/{path.name}" if word.startswith("file://") else target


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _run(*command: str) -> None:
    if subprocess.run(command, check=False).returncode:
        sys.exit(1)


def _refuse(problem: str) -> int:
    print(f"refused: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
