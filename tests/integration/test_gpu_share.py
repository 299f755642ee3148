"""Tests of replicas that share a GPU.

The machine needs no real GPU, because Ray places replicas by declared numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

import configs
from tests.integration.conftest import exports
from tests.integration.test_scaling import BODY, MODEL, PREDICT, SIGNATURE, Version
from tests.servers.replica import register

if TYPE_CHECKING:
    from tests.integration.conftest import Project

FREE = "import json, ray; ray.init(log_to_driver=False); print(json.dumps(ray.available_resources().get('GPU', 0)))"


def test_four_replicas_of_a_version_run_on_one_gpu(empty_project: Project) -> None:
    """Four replicas with the settings of `tier=enterprise_gpu` use one GPU fully."""
    project = empty_project
    tier = OmegaConf.load(Path(configs.__file__).parent / "tier" / "enterprise_gpu.yaml").replica
    project.up("cluster.num_gpus=1", "cluster.num_cpus=16")
    project.env.update(exports(project.run("cluster.status", "--env", check=True).stdout))
    register(project.root / "scaled", project.config, SIGNATURE, project.owner)
    overrides = [f"replica.{name}={value}" for name, value in tier.items()]
    project.run("serve_apps.deploy", f"name={MODEL}", "version=1", *overrides, check=True)
    version = Version(project)
    assert len(version.replicas()) == 4
    assert version.deployment()["required_resources"]["GPU"] == 0.25
    free = project.run_python("-c", FREE, check=True).stdout
    assert json.loads(free.splitlines()[-1]) == 0
    assert version.call(PREDICT, BODY)[0] == 200
