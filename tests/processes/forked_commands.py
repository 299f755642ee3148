"""Run `python -m module key=value ...` in a forked process. Its parent process has imported what all commands need.

Starting Python and importing Ray takes most of the time of a small command. A forked command behaves the same: it has
its own process, working directory, environment and exit code. If a test is about the start of the process itself, start
a new Python instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PRELOADED = (
    "ray.data",
    "ray.serve",
    "deltalake",
    "onnxruntime",
    "polars",
    "pyarrow.dataset",
    "feature_jobs.ingest",
    "feature_jobs.materialize",
    "feature_jobs.training_set",
    "jobs.train.families",
    "serve_apps.deploy",
)
"""Modules that most commands import. None of them starts a thread, because a fork would lose the thread."""


_NEW_NETWORK = 0x40000000
"""`CLONE_NEWNET` of Linux."""


def run_forked(
    module: str, *args: str, cwd: Path, env: dict[str, str], timeout_s: float, namespace: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a forked process, and return its output and exit code.

    Args:
        module: the command's module.
        args: its arguments.
        cwd: folder to run in.
        env: environment of the command.
        timeout_s: longest time in seconds.
        namespace: name of the network namespace to run in; None for that of this process.

    Raises:
        subprocess.TimeoutExpired: The command did not end in time, and was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        for path in (out, err):
            path.touch(mode=0o600)  # the files exist even if the process ends too early
        where = (str(cwd), env, str(out), str(err), namespace)
        process = context.Process(target=_main, args=(module, args, *where))
        process.start()
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *args], timeout_s, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(
            [module, *args],
            process.exitcode or 0,
            out.read_text(errors="replace"),
            err.read_text(errors="replace"),
        )


def _main(
    module: str,
    args: tuple[str, ...],
    cwd: str,
    env: dict[str, str],
    out: str,
    err: str,
    namespace: str | None,
) -> None:
    """Run the command in this process, then exit with its exit code."""
    if namespace is not None:
        _enter(namespace)
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (open until the process ends)
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [module, *args]
    checkout = Path(__file__).parents[2]
    # A script in `tests` has its folder in the path, and `tests/configs` would hide `configs`.
    hidden = ("", str(checkout), str(checkout / "tests"))
    sys.path[:] = [cwd, *(entry for entry in sys.path if entry not in hidden)]
    sys.modules.pop(module, None)
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 (the interpreter does the same)
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)


def _enter(namespace: str) -> None:
    """Move this process to a network namespace that `ip netns` has made. Python 3.12 has `os.setns` for this."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
