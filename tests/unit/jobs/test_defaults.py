"""The defaults in `configs/` equal those of the dataclasses.

Both are needed: Hydra accepts only options that the YAML file has, and `--help` shows its comments.
"""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cluster.settings import PlatformConfig
from jobs.compact_log.__main__ import CompactLogConfig
from jobs.evaluate.config import EvaluateConfig
from jobs.export_model import ExportModelConfig
from jobs.import_model import ImportModelConfig
from jobs.monitor.config import MonitorConfig
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.outcomes import OutcomesConfig
from jobs.pipeline.traffic import TrafficConfig
from jobs.register.config import RegisterConfig
from jobs.sweep.config import SweepConfig
from jobs.train import lightgbm
from jobs.train.config import TrainConfig
from jobs.train.decoder import family as decoder
from jobs.train.decoder.config import TrainTextConfig
from jobs.train.ft_transformer import family as ft_transformer
from jobs.train.reproduce import ReproduceConfig
from jobs.train.tabular_network import family as tabular_network


def composed(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_module("configs", version_base=None):
        config: Any = OmegaConf.to_container(compose(name, overrides=list(overrides)))
    return dict(config)


def defaults(schema: type[Any]) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
    return dict(content)


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("train", TrainConfig),
        ("train_text", TrainTextConfig),
        ("sweep", SweepConfig),
        ("evaluate", EvaluateConfig),
        ("monitor", MonitorConfig),
        ("compact_log", CompactLogConfig),
        ("export_model", ExportModelConfig),
        ("import_model", ImportModelConfig),
        ("register", RegisterConfig),
        ("reproduce", ReproduceConfig),
        ("pipeline", PipelineConfig),
        ("traffic", TrafficConfig),
        ("outcomes", OutcomesConfig),
    ],
)
def test_a_commands_yaml_has_the_dataclass_defaults(name: str, schema: type[Any]) -> None:
    """There are exceptions: the platform's sections, which a tier sets, model and pipeline, which are groups, and the
    search space, which a group sets."""
    other_sections = {*PlatformConfig.__dataclass_fields__, "model", "pipeline"}
    expected = {key: value for key, value in defaults(schema).items() if key not in other_sections}
    actual = composed(name)
    if name == "sweep":
        actual["sweep"] |= {"space": {}, "model": {}}
    assert {key: actual[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("command", "model", "schema"),
    [
        ("train", "lightgbm", lightgbm.Parameters),
        ("train", "tabular_network", tabular_network.Parameters),
        ("train", "ft_transformer", ft_transformer.Parameters),
        ("train_text", "decoder", decoder.Parameters),
    ],
)
def test_a_familys_yaml_has_the_dataclass_defaults(command: str, model: str, schema: type[Any]) -> None:
    """In addition, the YAML file names the family."""
    assert composed(command, f"model={model}")["model"] == {"family": model} | defaults(schema)
