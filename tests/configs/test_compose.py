"""Every job's configuration and every tier compose and fit their dataclasses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import configs
from cluster.settings import PlatformConfig
from cluster.settings_conversion import load

ROOT = Path(configs.__file__).parent
GROUPS = sorted(
    path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("hydra", "__pycache__")
)
JOBS = sorted(path.stem for path in ROOT.glob("*.yaml"))
TIERS = sorted(path.stem for path in (ROOT / "tier").glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "tier"), [*((name, "smb_cpu") for name in JOBS), *(("platform", tier) for tier in TIERS)]
)
def test_every_configuration_composes(name: str, tier: str) -> None:
    """The composed platform sections are valid. Every setting of a tier belongs to one of them."""
    with initialize_config_module("configs", version_base=None):
        config = compose(name, overrides=[f"tier={tier}"])
    sections = {key: config[key] for key in PlatformConfig.__dataclass_fields__ if key in config}
    platform = load(OmegaConf.create(sections), PlatformConfig)
    assert platform.tier.value == tier


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_options(group: str) -> None:
    """A group without options would fail only when a user selects an option from it."""
    options = list((ROOT / group).glob("*.yaml"))
    assert options
