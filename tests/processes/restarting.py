"""A double of systemd or Kubernetes for the peer: it runs a command again whenever it has ended.

python -m tests.processes.restarting COMMAND...
"""

from __future__ import annotations

import subprocess
import sys
import time

PAUSE_S = 1.0


def main() -> None:
    """Run the command until this process is killed."""
    while True:
        subprocess.run(sys.argv[1:], check=False)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
