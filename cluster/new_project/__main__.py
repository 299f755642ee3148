"""`python -m cluster.new_project FOLDER`: write a project that runs as it is, in a new or empty folder.

The project has definitions, a pipeline, two schedules, a test, and small data that this command makes: readings of
machines, and which of them failed. No file is ever overwritten. The command needs no cluster.
"""

from __future__ import annotations

import argparse
import shlex

from cluster.entrypoint import refuse
from cluster.errors import RefusedError
from cluster.new_project.writing import write_project


def main() -> None:
    """Parse the command line and write the project."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.new_project",
        description="Write a project that runs as it is: definitions, a pipeline, schedules, a test and small data.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder that does not exist yet, or is empty")
    folder = parser.parse_args().folder
    try:
        num_files = write_project(folder)
    except RefusedError as error:
        refuse(error)
    print(f"wrote {num_files} files to {folder}. Next: cd {shlex.quote(folder)}, and read README.md")


if __name__ == "__main__":
    main()
