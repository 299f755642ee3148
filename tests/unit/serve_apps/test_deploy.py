"""What a deployment says."""

from __future__ import annotations

from cluster.registry import Lineage, ModelVersion
from serve_apps.deploy import described


def test_a_version_beside_the_champion_says_that_it_gets_no_traffic() -> None:
    """With the command that starts a rollout; the champion says that it serves."""
    version = ModelVersion(
        name="m",
        version=2,
        family="f",
        task="binary",
        uri="",
        manifest_hash="",
        files={},
        lineage=Lineage(training_set_hash=""),
        metrics={},
    )
    beside = described(version, app="m-v2", champion=1)
    assert "version 1 stays champion and keeps its traffic" in beside
    assert "python -m serve_apps.rollout action=start name=m version=2 weight=10" in beside
    assert "serving" not in beside
    assert described(version, app="m-v2", champion=2) == "serving m version 2 as application m-v2"
