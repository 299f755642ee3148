"""`python -m tests.processes.imported_packages common command…`: print as JSON which packages each command imports.

This process imports the module `common`, which all commands import anyway. For each command it forks a process, which
imports only the rest. So all commands together take less time than a new interpreter for each of them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def packages(module: str) -> list[str]:
    """Import a module in a forked process, and return the names of all top-level packages that are loaded then."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            importlib.import_module(module)
            names = sorted({name.partition(".")[0] for name in sys.modules})
            os.write(writer, json.dumps(names).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        content = file.read()
    os.waitpid(pid, 0)
    return list(json.loads(content))


def main() -> None:
    """Print a JSON object: each command with its packages."""
    _, common, *commands = sys.argv
    importlib.import_module(common)
    print(json.dumps({command: packages(command) for command in commands}))


if __name__ == "__main__":
    main()
