"""The first process of a machine's PID namespace. It removes ended processes, and waits until its input ends.

When it ends, the kernel kills all processes of the namespace at once. Its input ends with the test, even if the test is
killed. So no test leaves a process behind.

    python -m tests.nodes.init_process
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Print a line when it runs, then wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then removes ended processes by itself
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
