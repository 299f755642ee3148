"""Aggregated views in the online store: one value for each entity, its packed `WindowState`.

Windows move, so values that are computed at one instant are wrong at the next instant. Therefore the state is stored,
and the values are computed at the `as_of` of each read. The state is encrypted under the most sensitive class of the
columns that it is made of.

After a materialisation, a state can be read at any instant that is not before the materialisation's `as_of` minus the
longest window. At an earlier instant the status is `newer`. In a view that was materialised, an entity without a row
has no events, so its counts are 0, as offline. In a view with only pushed rows, the entity's values are missing.
`window_rows.py` computes states from a table, and `events.py` adds events to them. This module is for readers, so it
imports neither Polars nor delta-rs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from feature_jobs.store.aggregation.tiles import NO_INSTANT, Tiling, WindowState
from feature_jobs.store.catalog.specifications import FieldSpec, ViewSpec
from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.definitions.views import Sensitivity, content_hash
from feature_jobs.store.online.rows import FoundRow

_ASCENDING = list(Sensitivity)


def stored_view(view: ViewSpec) -> ViewSpec:
    """Return an aggregated view as it is stored online: with the state as its only field. Other views do not change.

    The state's dtype has a hash of the aggregations, so a state for other aggregations is not read.
    """
    if view.windows is None:
        return view
    sensitivities = [field.sensitivity for field in view.stored if field.name in view.windows.table_columns]
    state = FieldSpec(
        name="state",
        dtype=f"windows-{content_hash(asdict(view.windows))}",
        sensitivity=max(sensitivities, key=lambda name: _ASCENDING.index(Sensitivity(name))),
        categorical=False,
    )
    return replace(view, fields=[state], windows=None, event_fields=())


class WindowedView:
    """Reads the states of one view."""

    def __init__(self, view: ViewSpec, windows: WindowSpec) -> None:
        self.stored = stored_view(view)
        self._tiling = Tiling(windows)

    def rows_at(
        self, keys: Sequence[object | None], states: Sequence[FoundRow | None], at_us: int
    ) -> list[FoundRow | None]:
        """Return rows with the view's features at an instant; None without a key, or if the state lacks events.

        If the state begins after the instant, the row has the state's time and no values.

        Raises:
            InvalidRequest: a sum of whole numbers is beyond int64.
        """
        return [
            None if key is None else self._row_at(state, at_us)
            for key, state in zip(keys, states, strict=True)
        ]

    def _row_at(self, state_row: FoundRow | None, at_us: int) -> FoundRow | None:
        if state_row is None:
            state = WindowState(self._tiling)
        else:
            _, _, _, (packed,) = state_row
            if packed is None:
                return None
            state = WindowState.unpack(self._tiling, packed)
        values = state.values(at_us)
        if values is not None:
            return at_us, at_us, None not in values, values
        # There are no values because the state lacks events, or because it begins after this instant.
        return None if state.since_us >= NO_INSTANT else (state.since_us, state.since_us, False, ())
