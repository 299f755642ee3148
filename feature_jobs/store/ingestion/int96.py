"""INT96 times of Parquet, as Spark, Impala and old Hive write them: a day and the nanoseconds in it.

Arrow reads them as nanoseconds by default, which wrap outside the years 1677 to 2262, or as microseconds, which cut
off what is finer. Here both are read, and no time is changed but by the rules of `instants`.
"""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch


def exact_times(coarse: pa.Table, fine: pa.Table, rounded_up: Collection[str]) -> pa.Table:
    """Rows whose INT96 columns are microseconds.

    Args:
        coarse: the rows, read with INT96 as microseconds.
        fine: their INT96 columns, read as nanoseconds.
        rounded_up: columns in which a finer time is rounded up.

    Raises:
        SchemaMismatch: a time of another column is finer than microseconds.
    """
    for name in fine.column_names:
        position = coarse.schema.get_field_index(name)
        micros = coarse.column(position).cast(pa.int64())
        finer = _is_finer(micros, fine[name].cast(pa.int64()))
        if not pc.any(finer, min_count=0).as_py():
            continue
        if name not in rounded_up:
            raise SchemaMismatch(
                f"Column '{name}' has times that are finer than microseconds. Write it with microseconds."
            )
        more = pc.add(micros, finer.cast(pa.int64()))
        coarse = coarse.set_column(position, name, more.cast(coarse.schema.field(position).type))
    return coarse


def _is_finer(micros: pa.ChunkedArray, nanos: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where a time has nanoseconds beyond its microseconds; where nanoseconds wrapped, nobody can say."""
    most = (2**63 - 1) // 1000
    held = pc.and_(pc.less_equal(micros, most - 1), pc.greater_equal(micros, -most))
    inside = pc.if_else(held, micros, pa.scalar(0, pa.int64()))
    rest = pc.subtract(nanos, pc.multiply(inside, 1000))
    return pc.and_(held, pc.greater(rest, 0))
