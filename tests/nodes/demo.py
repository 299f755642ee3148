"""`make demo-nodes`: the demo on a cluster of three nodes, compared with the demo on one machine.

The nodes are network namespaces of this machine. PostgreSQL has the ledger, Redis the online features, and a double of
S3 the rest. The demo's training set must have the hash that it has on one machine, which is part of the ledger of
`make demo`. It needs root, and 6 GiB of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.errors import Inconsistent
from tests.nodes.three_nodes import three_nodes

ROW_HASH = "ad05784c5485189f"
"""First digits of the hash of the demo's training set on one machine."""


def main() -> None:
    """Run the demo, print what differs, and exit 1 if a row differs."""
    with tempfile.TemporaryDirectory(prefix="falaj-demo-") as folder, three_nodes(Path(folder)) as cluster:
        head = cluster.head
        for node in cluster.nodes:
            print(f"node {node.name} joined at {node.address}", flush=True)
        demo = ("jobs.pipeline.census", "pipeline.vars.many_nodes=true")
        subprocess.run(head.command(sys.executable, "-m", *demo), env=head.env, check=True)
        summary = json.loads((head.storage_root / "demo" / "summary.json").read_text())
        check(summary)
        print(f"three nodes: the training set has the rows of one machine ({ROW_HASH})")


def check(summary: dict[str, Any]) -> None:
    """Require the rows of the demo on one machine, and that nothing was lost.

    Raises:
        Inconsistent: a figure is another one.
    """
    expected = {
        "hash": ROW_HASH,
        "errors": 0,
        "logged": summary["requests"]["sent"],
        "verified": True,
    }
    found = {
        "hash": summary["training_set"]["hash"][: len(ROW_HASH)],
        "errors": summary["requests"]["errors"],
        "logged": summary["prediction_log_rows"],
        "verified": summary["ledger"]["verified"],
    }
    if found != expected:
        raise Inconsistent(f"The demo on three nodes gave {found}, expected {expected}.")


if __name__ == "__main__":
    try:
        main()
    except pytest.skip.Exception as reason:
        print(reason, file=sys.stderr)
        sys.exit(2)
