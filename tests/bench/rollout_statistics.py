"""`make bench BENCH=rollout_statistics`: error rates and power of the rollout statistics, by simulation.

Each line is a share of 2,000 runs, or a number of units or requests. Even splits and tolerated ratios have 10,000 runs,
and whole rollouts of versions that differ have 500 or 250. It takes about a minute of CPU. `RUNS` changes the number of
runs, and `CASES=goal,breaker` measures only cases that begin so. `docs/statistics.md` has the figures of this table.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.statistics.policy import Form, UnitEvent
from tests.samples.rollout_simulations import (
    Detection,
    failing_share,
    false_no_harm,
    false_signal,
    goal_by_form,
    late_harm,
    mismatch,
    requests_until_break,
    rollouts,
    share_above_limit,
    superiority,
    the_plan,
)
from tests.samples.rollout_traffic import Version

RUNS = int(os.environ.get("RUNS", "2000"))
CASES = tuple(os.environ.get("CASES", "").split(","))
HEALTHY = Version()
BETTER = Version(rates={event: rate / 2 for event, rate in HEALTHY.rates.items()}, quality=0.84, cpu=0.8)
WORSE = replace(HEALTHY, rates={**HEALTHY.rates, UnitEvent.failure: 3 * HEALTHY.rates[UnitEvent.failure]})
LAST_WINDOW = the_plan().num_windows - 1
Figures = dict[str, float]
Draw = np.random.Generator


def whole_rollouts() -> Iterator[tuple[str, Callable[[Draw], Figures]]]:
    """Yield simulations of whole rollouts: 20,000 units, five steps, 100 looks, five guardrails and a goal."""
    versions = {"equal": (HEALTHY, RUNS), "better": (BETTER, RUNS // 4), "failing": (WORSE, RUNS // 8)}
    for case, (treatment, runs) in versions.items():

        def measure(draw: Draw, treatment: Version = treatment, runs: int = runs) -> Figures:
            rates = rollouts(draw, treatment, HEALTHY, runs=runs)
            return {"goal_share": rates.goal, "rollback_share": rates.rollback, "z_test_share": rates.z_test}

        yield f"rollout_{case}", measure


def single_tests() -> Iterator[tuple[str, Callable[[Draw], Figures]]]:
    """Yield simulations of one test each."""
    yield "goal_10_to_12", lambda draw: found(superiority(draw, runs=RUNS, treatment=0.12, control=0.1))
    yield "goal_10_to_10", lambda draw: found(superiority(draw, runs=RUNS, treatment=0.1, control=0.1))
    for form in Form:
        yield f"goal_equal_{form}", lambda draw, form=form: found(goal_by_form(draw, form=form, runs=RUNS))
    for share in (0.5, 0.48):
        for ramping in (False, True):
            yield (
                f"mismatch_{share}" + ("_ramping" if ramping else ""),
                lambda draw, share=share, ramping=ramping: found(
                    mismatch(
                        draw, runs=RUNS if ramping or share != 0.5 else 5 * RUNS, share=share, ramping=ramping
                    )
                ),
            )
    yield "all_fail", lambda draw: found(failing_share(draw, runs=RUNS, treatment=1, control=0.01, units=100))
    for window in (0, LAST_WINDOW):
        yield (
            f"5_against_1_window_{window + 1}",
            lambda draw, window=window: found(
                failing_share(draw, runs=RUNS, treatment=0.05, control=0.01, window=window)
            ),
        )
    for ratio in (1.0, 1.5):
        yield (
            f"tolerated_ratio_{ratio}",
            lambda draw, ratio=ratio: found(
                failing_share(
                    draw, runs=5 * RUNS, treatment=0.1 * ratio, control=0.1, ratio=ratio, units=1_000
                )
            ),
        )
    yield "no_harm_at_limit", lambda draw: {"share": false_no_harm(draw, runs=RUNS, share=0.02, limit=0.02)}
    yield (
        "no_harm_below_limit",
        lambda draw: {"share": false_no_harm(draw, runs=RUNS, share=0.01, limit=0.02)},
    )
    yield "late_harm", lambda draw: {"share": late_harm(draw, runs=RUNS)}
    yield "late_harm_one_window", lambda draw: {"share": late_harm(draw, runs=RUNS, with_windows=False)}
    yield "signals_equal", lambda draw: {"share": false_signal(draw, runs=RUNS)}
    for share in (0.05, 0.1):
        yield (
            f"shadow_share_{share}_limit_0.05",
            lambda draw, share=share: found(share_above_limit(draw, runs=RUNS, share=share, limit=0.05)),
        )
    yield (
        "breaker",
        lambda draw: {"requests_99": float(np.quantile(requests_until_break(draw, runs=RUNS), 0.99))},
    )


def found(detection: Detection) -> Figures:
    """Return the figures of a detection."""
    return {"share": detection.found, "mean_units": detection.mean_units, "units_99": detection.units_99}


def main() -> None:
    """Simulate, print a table, and write the results."""
    results = []
    for case, simulation in [*whole_rollouts(), *single_tests()]:
        if not case.startswith(CASES):
            continue
        began = time.process_time()
        figures = simulation(np.random.default_rng(zlib.crc32(case.encode())))  # a new case changes no other
        words = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{case:24} {words}   ({time.process_time() - began:.1f} s)", flush=True)
        results += [
            {
                "system": "falaj",
                "case": case,
                "metric": name,
                "value": float(value),
                "unit": name.split("_")[-1],
            }
            for name, value in figures.items()
            if np.isfinite(value)
        ]
    output = Path(".falaj/bench/rollout_statistics.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
