"""Write `reference.json`: values of ville 0.1.0 and savvi 0.3.1 that the statistics are compared with.

Both packages are used only here, so the project does not depend on them:

    python -m venv /tmp/reference && /tmp/reference/bin/pip install ville==0.1.0 savvi==0.3.1 matplotlib
    /tmp/reference/bin/python tests/unit/cluster/statistics/make_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import savvi.multinomial
import ville

COUNTS = [(1, 0), (0, 1), (7, 2), (30, 12), (12, 30), (260, 240), (520, 430), (1_000, 900)]
"""Numbers of ones and zeros."""


def shares() -> list[dict[str, object]]:
    """Return logarithms of e-values for the null share `p0` and a prior Beta(a, b)."""
    rows: list[dict[str, object]] = []
    for ones, zeros in COUNTS:
        stream = np.repeat([1, 0], [ones, zeros])
        for p0, prior in ((0.5, 1.0), (0.6, 1.0), (0.02, 1.0), (0.5, 250.0)):
            test = ville.BernoulliTest(p0, prior=(prior, prior)).fit(stream)
            value = float(test.log_e_values_[-1])
            row = {"ones": ones, "zeros": zeros, "p0": p0, "prior": prior, "log_e": value}
            rows.append({"package": "ville"} | row)
        for prior in (1.0, 250.0):
            test = savvi.multinomial.Multinomial(0.05, np.array([0.5, 0.5]), k=2 * prior)
            test.update(np.array([ones, zeros]))
            row = {"ones": ones, "zeros": zeros, "p0": 0.5, "prior": prior, "log_e": float(np.log(test.odds))}
            rows.append({"package": "savvi"} | row)
    return rows


def boundaries() -> list[dict[str, object]]:
    """Return boundaries of a one-sided normal mixture, for a sum of values of variance 1."""
    return [
        {
            "package": "ville",
            "units": units,
            "error": error,
            "variance": variance,
            "boundary": float(ville.normal_mixture(units, error, 1 / variance, one_sided=True)),
        }
        for units in (200, 1_000, 10_000, 1_000_000)
        for error in (0.05, 0.01, 0.001)
        for variance in (0.0005, 0.01)
    ]


if __name__ == "__main__":
    content = {"shares": shares(), "boundaries": boundaries()}
    Path(__file__).with_name("reference.json").write_text(json.dumps(content, indent=1) + "\n")
