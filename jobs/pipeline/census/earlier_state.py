"""Continue a demo of an earlier release, which recorded its finished stages in `state.json`, not in the ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.pipeline.context import EarlierStage
from jobs.pipeline.control import Pipeline
from jobs.pipeline.state import newest_run

_OUTPUTS = {
    "training_set": "train.manifest.json",
    "train_lightgbm": "lightgbm.json",
    "train_network": "network.json",
    "train_broken": "broken.json",
}
"""File with the result of a stage, in the demo's folder."""
EARLIER_RUN = "earlier-release"


def adopt_earlier_state(pipeline: Pipeline, demo: Path) -> None:
    """Record the stages that `state.json` lists as done. Do nothing if the pipeline was run already."""
    state = demo / "state.json"
    if not state.exists() or newest_run(pipeline.ledger, pipeline.name) is not None:
        return
    finished = json.loads(state.read_text())
    pipeline.adopt(
        EARLIER_RUN,
        {name: EarlierStage(stage["seconds"], _result(demo, name)) for name, stage in finished.items()},
    )


def _result(demo: Path, name: str) -> dict[str, Any]:
    file = demo / _OUTPUTS.get(name, "")
    return dict(json.loads(file.read_text())) if file.is_file() else {}
