"""Tests of the places of state that a command takes from the cluster's record."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import down, up
from cluster.command_line import overrides_of
from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.ledger.events import ClusterStopped
from cluster.node.launch import shared_overrides
from cluster.security.ledger_reader import add_ledger_flags, open_reader
from cluster.session import RECORD_VARIABLE, use_recorded_places, write_record
from cluster.settings import LedgerConfig, OnlineConfig, OnlineKind, PlatformConfig, StorageConfig
from cluster.storage import ROOT_VARIABLE
from tests.processes.commands import run_main
from tests.servers import replica

PLACES = PlatformConfig(
    storage=StorageConfig(root="s3://bucket/it's", upload_after_s=30),
    ledger=LedgerConfig(url="postgresql+psycopg://falaj@10.0.0.9/falaj"),
    online=OnlineConfig(kind=OnlineKind.redis, url="redis://10.0.0.9:6379/0", map_size_gib=2.5),
)


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a folder without variables of a cluster."""
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.delenv(RECORD_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record_cluster(shell: Path, places: PlatformConfig, *, folder: str = ".falaj") -> None:
    """Write the record of a cluster with these places into a folder."""
    record = replace(
        replica.record(shell, "", 1),
        cluster_id="recorded",
        storage_root=places.storage.root,
        local_root=str(shell / folder),
    )
    record = replace(record, overrides=shared_overrides(places, record))
    (shell / folder).mkdir()
    write_record(record, record.storage)


def places_of(config: PlatformConfig, *given: str) -> tuple[str, str | None, OnlineConfig]:
    """Return where a command with this configuration finds its state."""
    use_recorded_places(config, given=given)
    return config.storage.root, config.ledger.url, config.online


def test_command_without_options_uses_the_places_of_the_running_cluster(shell: Path) -> None:
    """All values survive, also numbers, enums and apostrophes."""
    record_cluster(shell, PLACES)
    config = PlatformConfig()
    assert places_of(config) == (PLACES.storage.root, PLACES.ledger.url, PLACES.online)
    assert config.storage.local == str(shell / ".falaj")
    assert config.storage.upload_after_s == 30


def test_places_on_the_command_line_win(shell: Path) -> None:
    """A given section stays as it is. The others come from the cluster."""
    record_cluster(shell, PLACES)
    config = PlatformConfig(ledger=LedgerConfig(url="sqlite:///other.db"))
    assert places_of(config)[1] == "sqlite:///other.db"
    same_root = PlatformConfig(storage=StorageConfig(root=PLACES.storage.root, local=".falaj"))
    assert places_of(same_root, "storage.root")[1] == PLACES.ledger.url


def test_another_storage_root_shares_nothing_with_the_cluster(shell: Path) -> None:
    """Otherwise a project of its own would write into the cluster's ledger."""
    record_cluster(shell, PLACES)
    other = PlatformConfig(storage=StorageConfig(root="s3://bucket/other", local=".falaj"))
    assert places_of(other, "storage.root")[1] is None
    assert other.online == OnlineConfig()


def test_a_folder_alone_names_the_cluster_that_is_recorded_there(shell: Path) -> None:
    """A command with `storage.local` alone would otherwise use an empty ledger. Another folder shares nothing."""
    record_cluster(shell, PLACES, folder="n2")
    config = PlatformConfig(storage=StorageConfig(local=str(shell / "n2")))
    assert places_of(config, "storage.local") == (PLACES.storage.root, PLACES.ledger.url, PLACES.online)
    assert config.storage.local == str(shell / "n2")
    assert config.storage.upload_after_s == 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RECORD_VARIABLE, str(shell / "n2" / "cluster.json"))
        elsewhere = PlatformConfig(storage=StorageConfig(local=str(shell / "n3")))
        assert places_of(elsewhere, "storage.local")[1] is None


def test_down_with_a_folder_alone_ends_the_cluster_in_its_own_ledger(shell: Path) -> None:
    """The other nodes read the event there. Otherwise they would never end."""
    url = f"sqlite:///{shell}/elsewhere.db"
    places = PlatformConfig(storage=StorageConfig(root=str(shell / "shared")), ledger=LedgerConfig(url=url))
    record_cluster(shell, places, folder="n2")
    assert run_main(down.main, f"storage.local={shell / 'n2'}").returncode == 0
    [stopped] = Ledger(url).entries(ClusterStopped)
    assert stopped.payload == {"cluster_id": "recorded"}
    assert not (shell / ".falaj").exists()


@pytest.mark.parametrize("options", [[], ["storage.root=s3://bucket/it's", "storage.local=.falaj"]])
def test_up_after_a_crash_is_refused_without_the_options_of_the_start(
    shell: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """It would otherwise use the production ledger and bucket with local keys and policies."""
    started: list[PlatformConfig] = []
    monkeypatch.setattr(up, "start", started.append)
    record_cluster(shell, PLACES)
    refused = run_main(up.main, *options)
    assert refused.returncode == 2
    assert "has ended without `python -m cluster.down`" in refused.stderr
    assert not started


def test_up_takes_no_places_from_another_cluster(shell: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell can have the variables of another cluster."""
    started: list[PlatformConfig] = []
    monkeypatch.setattr(up, "start", started.append)
    record_cluster(shell, PLACES, folder="other")
    monkeypatch.setenv(RECORD_VARIABLE, str(shell / "other" / "cluster.json"))
    run_main(up.main)
    [config] = started
    assert config.ledger.url is None


def test_without_a_cluster_the_defaults_stay() -> None:
    """A command before `cluster.up` has the configured places."""
    assert places_of(PlatformConfig()) == (".falaj", None, OnlineConfig())


def test_ledger_tool_reads_the_ledger_of_the_cluster(shell: Path) -> None:
    """`cluster.ledger export` without flags exports the ledger that the cluster writes."""
    url = f"sqlite:///{shell}/elsewhere.db"
    Ledger(url).append(ClusterStopped(cluster_id="c"), actor="test")
    parser = argparse.ArgumentParser()
    add_ledger_flags(parser)
    flags = parser.parse_args([])
    with pytest.raises(ConfigError, match="No ledger at"):
        open_reader(flags)
    record_cluster(shell, replace(PLACES, ledger=LedgerConfig(url=url)))
    assert open_reader(flags).head() == 1


@job("platform", PlatformConfig)
def print_given(config: PlatformConfig) -> None:
    """Print the arguments for storage and tier."""
    print(overrides_of({"storage", "tier"}))


def test_a_command_can_pass_its_places_on() -> None:
    """The demo starts a cluster with the settings that it was given."""
    arguments = ["storage=s3", "storage.root='s3://b/p'", "ledger.checkpoint_every=9", "tier=smb_cpu"]
    assert run_main(print_given, *arguments).stdout == f"{[arguments[0], arguments[1], arguments[3]]}\n"
