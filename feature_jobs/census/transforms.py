"""Transforms of the census views: pure functions over Arrow tables, the same at ingestion and wherever else."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

AGE_BANDS = {"0-15": 0, "16-24": 16, "25-34": 25, "35-44": 35, "45-54": 45, "55-64": 55, "65+": 65}
"""Band to its lowest age in years."""
SCHOOLING_BANDS = {
    "none": 0,
    "below-high-school": 2,
    "high-school": 16,
    "some-college": 18,
    "bachelor": 21,
    "graduate": 22,
}
"""Band to its lowest ACS code of educational attainment."""


def with_bands(table: pa.Table) -> pa.Table:
    """Add `age_band` and `schooling`, the keys of a person's cohort."""
    table = table.append_column("age_band", age_band(table["AGEP"]))
    return table.append_column("schooling", schooling(table["SCHL"]))


def age_band(age: pa.ChunkedArray) -> pa.ChunkedArray:
    """The band of an age in years; null for null and for negative ages."""
    return _band(age, AGE_BANDS)


def schooling(code: pa.ChunkedArray) -> pa.ChunkedArray:
    """The band of an ACS educational attainment code, given as text or number; null for null."""
    return _band(pc.cast(code, pa.int64()), SCHOOLING_BANDS)


def _band(values: pa.ChunkedArray, bands: dict[str, int]) -> pa.ChunkedArray:
    result: pa.ChunkedArray = pa.nulls(len(values), pa.string())
    for name, lowest in bands.items():
        result = pc.if_else(pc.fill_null(pc.greater_equal(values, lowest), False), name, result)
    return result
