"""A control group for CPU time for a benchmark and all processes that it starts, like a service of systemd has.

Without one, Linux divides time between sessions (autogroups) before it looks at priorities. The processes of a cluster
and those of a peer are in different sessions, so other work on the machine slows them down differently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.scheduling import priority_warning

GROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
"""Where groups for CPU time are, in version 1 and version 2 of control groups."""


@contextlib.contextmanager
def own_group() -> Iterator[None]:
    """Put this process and those that it starts into a control group, if this user may. `GROUP=0` does not."""
    parent = next((path for path in GROUPS if (path / "cgroup.procs").is_file()), None)
    group = parent / f"falaj-bench-{os.getpid()}" if parent and os.environ.get("GROUP") != "0" else None
    try:
        if group is not None:
            group.mkdir()
            (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        group = None
    warning = priority_warning()
    print(f"warning: {warning}" if warning else "priorities count between all processes", flush=True)
    try:
        yield
    finally:
        if group is not None and parent is not None:
            (parent / "cgroup.procs").write_text(str(os.getpid()))
            with contextlib.suppress(OSError):  # a process still ends
                group.rmdir()
