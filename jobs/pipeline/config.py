"""Configuration of the demo."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.settings import PlatformConfig


@dataclass(kw_only=True, slots=True)
class PipelineConfig(PlatformConfig):
    """Configuration of the demo's size."""

    name: str = "employment"
    """Model name."""
    label: str = "employed"
    """Label column."""
    reference_year: int = 2015
    """Year of the training data."""
    years: list[int] = field(default_factory=lambda: [2016, 2017, 2018])
    """Later years. The people of these years are scored."""
    requests_per_year: int = 4000
    """Requests for each later year."""
    challenger_weight: float = 20.0
    """Percentage of units that the challenger answers."""
    broken_weight: float = 10.0
    """Percentage of units that the broken version answers."""
    broken_requests: int = 4000
    """Requests during the rollout of the broken version."""

    def __post_init__(self) -> None:
        if not self.years:
            raise ValueError("years must have at least one year.")
        for name in ("challenger_weight", "broken_weight"):
            if not 0 < getattr(self, name) <= 50:
                raise ValueError(f"{name} must be above 0 and at most 50 percent, got {getattr(self, name)}.")
