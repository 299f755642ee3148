"""The configuration section `features`: settings for the rows of all feature views."""

from __future__ import annotations

from dataclasses import dataclass

MAX_AHEAD_S = 31 * 86_400


@dataclass(kw_only=True, slots=True)
class FeaturesConfig:
    """Settings for the rows of all feature views."""

    max_ahead_s: float = 60.0
    """How far a row's times may be in the future, in seconds, when the row is pushed, streamed or ingested."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_ahead_s <= MAX_AHEAD_S:
            raise ValueError(
                f"features.max_ahead_s must be between 0 and {MAX_AHEAD_S}, got {self.max_ahead_s}."
            )
