"""A stage of your own: what is in a delivery. The pipeline's `require` says what is good enough."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.entrypoint import job
from cluster.settings import PlatformConfig


@dataclass(kw_only=True, slots=True)
class CheckConfig(PlatformConfig):
    """Options of the command."""

    path: str = "???"
    """Parquet file with the readings."""


@job(None, CheckConfig)
def main(config: CheckConfig) -> dict[str, float]:
    """Return the figures that the pipeline checks."""
    return figures(config.path)


def figures(path: str) -> dict[str, float]:
    """Return the number of rows and machines, and the share of rows without a vibration."""
    rows = pq.read_table(path, columns=["machine_id", "vibration"])
    return {
        "rows": rows.num_rows,
        "machines": pc.count_distinct(rows["machine_id"]).as_py(),
        "missing_share": rows["vibration"].null_count / max(rows.num_rows, 1),
    }


if __name__ == "__main__":
    main()
