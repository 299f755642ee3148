"""Tests of what `cluster.status` says about a machine's certificate."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from cluster.node.certificates import describe_certificate, ensure_certificates
from cluster.node.description import describe_machine
from cluster.security.tls import certificates
from cluster.settings import PlatformConfig, StorageConfig


def test_status_says_when_ray_needs_a_new_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reads its certificate at its start only. The others read renewed ones."""
    config = PlatformConfig(storage=StorageConfig(root=str(tmp_path)))
    record = describe_machine(config, cluster_id="abc")
    assert "<- problem" in describe_certificate(record, ray_started_at=None)
    ensure_certificates(config, record)
    now = dt.datetime.now(dt.UTC)
    after, before = (now + dt.timedelta(seconds=5)).timestamp(), now.timestamp() - 5
    fresh = describe_certificate(record, ray_started_at=after)
    until = now + dt.timedelta(days=certificates.LEAF_DAYS)
    assert fresh == f"until {until:%Y-%m-%d}; the supervisor renews it"
    stale = describe_certificate(record, ray_started_at=before)
    until = now + dt.timedelta(days=certificates.LEAF_DAYS / 3)
    assert f"an earlier one, valid until about {until:%Y-%m-%d}: run `python -m cluster.down`" in stale
    monkeypatch.setattr(certificates, "LEAF_DAYS", -1 / 86_400)
    certificates.ensure_tls(record.layout, renew=True)
    assert "expired on" in describe_certificate(record, ray_started_at=after)
