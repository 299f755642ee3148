"""`make soak`: ten minutes at 70 % of peak load through the edge. No request may fail, and no process may grow.

The peak is the rate of the same client in the first seconds. Memory is the resident set of each process that handles
requests or supervises other processes, sampled every few seconds. Growth is the slope of a least-squares line through
the samples. The first fifth of the time is left out, because caches are filled during that time. The exit code is 1 if
a request failed or was lost, or if a process grew.

    MINUTES=2 makes a shorter run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import psutil

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cluster.host import processes
from tests.clients.under_load import UnderLoad
from tests.integration.conftest import Project
from tests.projects import scoring

MINUTES = float(os.environ.get("MINUTES", "10"))
PEAK_S, SAMPLE_S, CONNECTIONS, SHARE = 15.0, 5.0, 16, 0.7
GROWTH = 0.05
"""If the memory of a process grows by more than this share during the run, the process counts as growing."""
WATCHED = {
    "replica": "ServeReplica",
    "serve controller": "ServeController",
    "haproxy": "haproxy",
    "edge controller": "serve_apps.edge",
}


def resident(project: Project) -> dict[str, float]:
    """Return the resident memory of each process in MiB."""
    found = {}
    for process in processes.find(project.record.cluster_id):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline()).split()
            kind = next(
                (kind for kind, word in WATCHED.items() if any(word in part for part in command[:4])), None
            )
            if kind is not None:
                found[f"{kind} {process.pid}"] = process.memory_info().rss / 2**20
    return found


def soaked(project: Project, load: UnderLoad) -> list[tuple[float, dict[str, float]]]:
    """Return samples of memory, each with its time in seconds."""
    began, samples = time.monotonic(), []
    while (at := time.monotonic() - began) < MINUTES * 60:
        samples.append((at, resident(project)))
        load.more(1)
        time.sleep(SAMPLE_S)
    return samples


def lines(samples: list[tuple[float, dict[str, float]]]) -> dict[str, tuple[float, float]]:
    """For each process that ran the whole time, return two values of the line: MiB at its end, and MiB per minute."""
    settled = [one for one in samples if one[0] >= samples[-1][0] / 5]
    found = {}
    for name in set.intersection(*(set(one) for _, one in settled)):
        slope, start = np.polyfit([at for at, _ in settled], [one[name] for _, one in settled], 1)
        found[name] = (float(start + slope * settled[-1][0]), float(slope * 60))
    return found


def main() -> int:
    """Run the load, print the results, and return the exit code: 0 if no request failed and no process grew."""
    with scoring.running_project() as project:
        with UnderLoad(project, per_s=None, connections=CONNECTIONS) as load:
            time.sleep(PEAK_S)
        peak = len(load.outcome().answers) / PEAK_S
        with UnderLoad(project, per_s=SHARE * peak, connections=CONNECTIONS) as load:
            samples = soaked(project, load)
        outcome = load.outcome()
    print(f"peak {peak:.0f} requests/s; {MINUTES:g} minutes at {SHARE:.0%}: {outcome}")
    results = [
        {"system": "falaj", "case": "soak", "metric": "failed", "value": len(outcome.failed), "unit": "1"}
    ]
    grew = []
    for name, (size, per_minute) in sorted(lines(samples).items()):
        print(f"{name:24} {size:7.1f} MiB, {per_minute:+7.3f} MiB a minute")
        results.append(
            {
                "system": "falaj",
                "case": name.rsplit(" ", 1)[0],
                "metric": "growth",
                "value": per_minute,
                "unit": "MiB/min",
            }
        )
        if per_minute * MINUTES > GROWTH * size:
            grew.append(name)
    output = Path(".falaj/bench/soak.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))
    bad = bool(
        outcome.failed or outcome.lost or outcome.twice or outcome.orphans or outcome.unrecorded or grew
    )
    print(f"grew: {', '.join(grew)}" if grew else "nothing grew")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
