"""Read a training set by columns or by row groups, with the caller's keys. No process holds the whole table.

`RowFile` is plain data: the driver sends it to the workers, and each worker asks its node's key broker for the keys.
The file is opened again for each read, so a revoked key stops working within a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from jobs.train.rows.arrow_types import without_string_views


class RowGroups(Protocol):
    """Rows in groups. One group is in memory at a time."""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of rows of each group."""
        ...

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return some columns of one group."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFile:
    """A Parquet file with the keys to read it. `open_row_file` creates it."""

    uri: str
    access: KeyAccess
    protection: Protection | None = None
    """Expected keys of the columns; None for a caller's own file."""
    place: str | None = None
    """Expected place of the file, see `ProtectedFiles.read`."""
    group_sizes: tuple[int, ...] = ()
    schema: pa.Schema = None

    @property
    def column_names(self) -> list[str]:
        return list(self.schema.names)

    @property
    def num_rows(self) -> int:
        return sum(self.group_sizes)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """Return one column of all rows."""
        return self._read([name], None)[name]

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return some columns of one row group.

        Raises:
            AccessDenied, KeyRevoked, KeyNotFound: The key store refuses a key.
            ProtectedFileCorrupt: The file is truncated, altered, or not the expected one.
        """
        return self._read(columns, group)

    def _read(self, columns: Sequence[str], group: int | None) -> pa.Table:
        files = protected_files(self.access)
        with files.open(self.uri, protection=self.protection, place=self.place, unplaced=True) as file:
            return without_string_views(file.read(list(columns), row_group=group))


def open_row_file(
    uri: str, access: KeyAccess, *, protection: Protection | None = None, place: str | None = None
) -> RowFile:
    """Return the file with the sizes of its row groups. For arguments and errors see `ProtectedFiles.read`."""
    with protected_files(access).open(uri, protection=protection, place=place, unplaced=True) as file:
        sizes, schema = tuple(file.row_group_sizes), file.schema
    return RowFile(
        uri=uri,
        access=access,
        protection=protection,
        place=place,
        group_sizes=sizes,
        schema=without_string_views(schema.empty_table()).schema,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRows:
    """Rows of a table in memory, as row groups."""

    table: pa.Table
    group_rows: int = 65_536
    """Rows of each group; the last one may have fewer."""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        full, rest = divmod(int(self.table.num_rows), self.group_rows)
        return (self.group_rows,) * full + ((rest,) if rest else ())

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return some columns of one group."""
        return self.table.slice(group * self.group_rows, self.group_rows).select(list(columns))
