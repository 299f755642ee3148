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
    """Parquet file of the delivery."""
    key: str = "???"
    """Column that identifies an entity."""
    column: str = "???"
    """Column that must have values."""


@job(None, CheckConfig)
def main(config: CheckConfig) -> dict[str, float]:
    """Return the figures that the pipeline checks."""
    return figures(config.path, key=config.key, column=config.column)


def figures(path: str, *, key: str, column: str) -> dict[str, float]:
    """Return the number of rows and of entities, and the share of rows without a value in a column."""
    rows = pq.read_table(path, columns=[key, column])
    return {
        "rows": rows.num_rows,
        "entities": pc.count_distinct(rows[key]).as_py(),
        "missing_share": rows[column].null_count / max(rows.num_rows, 1),
    }


if __name__ == "__main__":
    main()
