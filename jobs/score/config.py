"""Configuration of `jobs.score`."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from cluster.settings import PlatformConfig

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class InputsFrom(enum.Enum):
    """Where the model's inputs come from."""

    auto = "auto"
    """`given` if the rows have all inputs of the model, `join` if they have none."""
    join = "join"
    """The feature store, at each row's `event_timestamp`."""
    latest = "latest"
    """The feature store, at `as_of`, the same time for all rows."""
    given = "given"
    """The rows themselves."""


class InputFormat(enum.Enum):
    """Format of the rows to score."""

    parquet = "parquet"
    csv = "csv"
    """UTF-8, with a header."""
    delta = "delta"
    """A Delta table that is not one of the platform's own."""


@dataclass(kw_only=True, slots=True)
class ScoreConfig(PlatformConfig):
    """Configuration of one run of batch scoring."""

    name: str
    """Model name."""
    input: str
    """Rows to score: a file, a folder, a pattern, or a Delta table; a path or any fsspec URI."""
    output: str
    """Folder for the scores, a path or any fsspec URI. Below the storage root they are encrypted."""
    version: str = "champion"
    """Version number, alias, or `latest`."""
    run: str | None = None
    """The run's id. The same id continues the run. None derives it from the input and all settings."""
    inputs_from: InputsFrom = InputsFrom.auto
    """Where the model's inputs come from."""
    as_of: str | None = None
    """ISO 8601 instant, for `inputs_from=latest`. None is the run's start."""
    format: InputFormat | None = None
    """None takes it from the name: `.csv` and `.csv.gz` are CSV, a folder with `_delta_log` is a Delta table."""
    delimiter: str = ","
    """Delimiter of CSV."""
    keep: list[str] | None = None
    """Columns of the input that are copied to the output. None copies the join keys and `event_timestamp`; for a model
    without a feature service, all columns that end in `_id`."""
    keep_inputs: bool | None = None
    """Whether the output has the model's inputs too. None means yes below the storage root, so that monitoring can
    measure drift, and no elsewhere."""
    max_bad_share: float = 0.05
    """Largest share of rows that may be set aside. A run with more is refused."""
    part_rows: int = 250_000
    """Largest number of rows of an output file, and of the rows that a task has in memory."""
    task_values: int = 5_000_000
    """Number of values (rows times inputs) above which Ray tasks do the work. The command itself scores fewer."""

    def __post_init__(self) -> None:
        if self.run is not None and not RUN_ID.fullmatch(self.run):
            raise ValueError(
                "run must be 1 to 100 letters, digits, '_', '.' or '-', and begin with a letter or digit, got "
                f"{self.run!r}."
            )
        if self.as_of is not None and self.inputs_from is not InputsFrom.latest:
            raise ValueError(
                "as_of is the time for inputs_from=latest. Leave it out, or set inputs_from=latest."
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}.")
        if self.part_rows < 1:
            raise ValueError(f"part_rows must be at least 1, got {self.part_rows}.")
        if len(self.delimiter) != 1:
            raise ValueError(f"delimiter must be one character, got {self.delimiter!r}.")
