"""Run a command again and again, as systemd or Kubernetes does for a service that must always run.

python -m tests.nodes.restarting COMMAND...
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
