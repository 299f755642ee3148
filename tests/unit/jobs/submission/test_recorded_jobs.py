"""Tests of the submitted jobs in the ledger, and of the folder of configurations that they load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster import up
from cluster.errors import ConfigError
from cluster.host.submission import SubmissionConfig
from cluster.ledger import Ledger
from cluster.ledger.events import JobFinished, JobStarted
from cluster.settings import ClusterConfig, PlatformConfig, PortsConfig, StorageConfig
from jobs.submission import recorded_jobs, run_job
from tests.servers.ports import free_port
from tests.unit.jobs.submission.conftest import APPLY, record

if TYPE_CHECKING:
    from tests.unit.jobs.submission.conftest import Service


def unfinished(ledger: Ledger) -> list[str]:
    return [job.id for job in recorded_jobs.unfinished_jobs(ledger)]


def test_start_reads_only_unfinished_jobs(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many jobs have finished, a new service reads the events of the others, in their order."""
    jobs = [service.submit(subject=f"s{number}") for number in range(12)]
    for job in jobs[:3] + jobs[4:-1]:
        service.finish(job)
    assert unfinished(service.ledger) == [jobs[3], jobs[-1]]
    read: list[int] = []
    get = Ledger.get
    monkeypatch.setattr(Ledger, "get", lambda self, seq: read.append(seq) or get(self, seq))  # type: ignore[func-returns-value]
    monkeypatch.setattr(Ledger, "find", None)
    monkeypatch.setattr(Ledger, "entries", None)
    assert unfinished(Ledger(service.url)) == [jobs[3], jobs[-1]]
    assert len(read) == 2


def test_ledger_of_an_earlier_release_is_read_once(service: Service) -> None:
    """It has events of jobs from before the projection, and a finished job stays finished."""
    first, second = service.submit(), service.submit()
    service.finish(first)
    with service.ledger.writing() as connection:
        recorded_jobs.METADATA.drop_all(connection)
    assert unfinished(service.ledger) == [second]
    service.finish(second)
    assert unfinished(service.ledger) == []


def test_a_pipeline_of_your_own_without_the_operators_folder_is_refused_with_the_option(
    new_service: Callable[..., Service],
) -> None:
    """A job cannot name a folder of configurations itself."""
    body = {"module": "jobs.pipeline", "overrides": ["pipeline=bikes"]}
    status, content = new_service().call("POST", body=body)
    assert (status, "has no choice 'bikes'" in content["error"]) == (400, True)
    assert "`cluster.up jobs.config_dir=…`" in content["error"]


def test_folder_that_others_may_change_starts_no_job(
    new_service: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request gets 403 and an event. A job that was accepted before does not start, and its end has the reason."""
    conf = tmp_path / "conf"
    conf.mkdir()
    service = new_service(config_dir=str(conf))
    job = service.submit()
    conf.chmod(0o777)
    status, content = service.call("POST", body=APPLY)
    assert (status, "jobs.config_dir" in content["error"]) == (403, True)
    assert [event["rule"] for event in service.refusals()] == ["config_dir"]
    monkeypatch.setattr(run_job, "require_recorded_cluster", lambda config: record(tmp_path))
    monkeypatch.setattr(run_job, "open_ledger", lambda config: service.ledger)
    monkeypatch.setattr(sys, "argv", ["run_job", f"job={job}"])
    monkeypatch.setenv("FALAJ_PROJECT_ROOT", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run_job.main()
    assert ended.value.code == 2
    [finished] = service.ledger.entries(JobFinished)
    assert finished.payload["state"] == "not started"
    assert "conf can be changed by others" in finished.payload["reason"]
    assert not list(service.ledger.entries(JobStarted))


def test_cluster_does_not_start_with_a_folder_that_others_may_change(tmp_path: Path) -> None:
    """A missing folder is refused, too. The message says what is wrong with which folder."""
    conf = tmp_path / "conf"
    ports = PortsConfig(**{name: free_port() for name in PortsConfig.__dataclass_fields__})
    config = PlatformConfig(
        storage=StorageConfig(root=str(tmp_path / "state")),
        cluster=ClusterConfig(ports=ports),
        jobs=SubmissionConfig(config_dir=str(conf)),
    )
    with pytest.raises(ConfigError, match="conf cannot be read"):
        up.check(config)
    conf.mkdir()
    up.check(config)
    conf.chmod(0o1777)
    with pytest.raises(ConfigError, match="conf can be changed by others"):
        up.check(config)
