"""The demo's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.settings import PlatformConfig


@dataclass(kw_only=True, slots=True)
class PipelineConfig(PlatformConfig):
    """How large the demo is."""

    name: str = "employment"
    """Of the model."""
    label: str = "employed"
    reference_year: int = 2015
    years: list[int] = field(default_factory=lambda: [2016, 2017, 2018])
    requests_per_year: int = 4000
    challenger_weight: float = 20.0
    """Percent of units."""
    broken_weight: float = 10.0
    """Percent of units."""
    broken_requests: int = 4000

    def __post_init__(self) -> None:
        if not self.years:
            raise ValueError("years must name at least one later year.")
        for name in ("challenger_weight", "broken_weight"):
            if not 0 < getattr(self, name) <= 50:
                raise ValueError(f"{name} must be above 0 and at most 50 percent, got {getattr(self, name)}.")
