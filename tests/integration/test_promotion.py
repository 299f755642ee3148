"""A model moves between two installations. Each is a cluster of its own, in a network namespace of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.host import processes
from cluster.ledger import Ledger
from cluster.ledger.events import ModelExported, ModelRegistered
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord, find_own_record
from cluster.settings import StorageConfig
from cluster.storage import Layout
from tests.integration.conftest import refusal
from tests.nodes.namespaces import Machine, network
from tests.projects import loan

COMMAND_TIMEOUT_S = 300.0
CUSTOMERS = range(0, 40, 3)


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One cluster on one machine."""

    machine: Machine
    root: Path
    env: dict[str, str]

    @property
    def places(self) -> Layout:
        return Layout(str(self.root / ".falaj"))

    @property
    def record(self) -> ClusterRecord:
        record = find_own_record(StorageConfig(root=self.places.root))
        assert record is not None
        return record

    def ledger(self) -> Ledger:
        return Ledger(f"sqlite:///{self.places.ledger_path}")

    def run(self, module: str, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `python -m module args` on this machine."""
        result = subprocess.run(
            self.machine.command(sys.executable, "-m", module, *args),
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
        if check and result.returncode:
            pytest.fail(f"{result.args} exited {result.returncode}\n{result.stdout}\n{result.stderr[-8000:]}")
        return result

    def answers(self) -> list[dict[str, Any]]:
        """Return the predictions for some customers, from this installation's edge."""
        context = ssl.create_default_context(cafile=f"{self.places.tls}/ca.pem")
        token = mint_token(self.places, subject="t", role=Role.service, purpose="test", ttl_s=900)
        headers = {"Authorization": f"Bearer {token}", "X-Unit-ID": "3"}
        port = self.record.ports["edge"]
        answers = []
        for customer in CUSTOMERS:
            connection = http.client.HTTPSConnection(self.machine.address, port, context=context, timeout=60)
            body = json.dumps({"entities": [{"customer_id": customer}], "as_of": loan.AS_OF})
            connection.request("POST", loan.PREDICT, body, headers)
            response = connection.getresponse()
            content = json.loads(response.read())
            connection.close()
            assert response.status == 200, content
            answers += content["predictions"]
        return answers


@pytest.fixture(scope="module")
def installations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, Installation]]:
    """Two clusters. The first one serves the model `loan`, the second one has its features and no model."""
    folder = tmp_path_factory.mktemp("promotion")
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("RAY_", "FALAJ_"))}
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network("staging", "production"))
        pair = []
        for name, machine in net.machines.items():
            (folder / name).mkdir()
            one = Installation(machine=machine, root=folder / name, env=clean)
            stack.callback(end, one)
            own = (f"cluster.edge_host={machine.address}", "cluster.num_cpus=4")
            one.run("cluster.up", *own, f"identity.environment={name}", check=True)
            pair.append(one)
        staging, production = pair
        loan.prepare(staging)
        (production.root / "loans.py").write_text(loan.DEFINITIONS.replace("incomes.parquet", "paid.parquet"))
        shutil.copy(staging.root / "incomes.parquet", production.root / "paid.parquet")
        purpose = "identity.purpose=test"  # outside of "local", everybody states a purpose
        production.run("feature_jobs.apply", "definitions=loans", purpose, check=True)
        production.run("feature_jobs.ingest", "definitions=loans", "view=income", purpose, check=True)
        materialise = ("feature_jobs.materialize", "definitions=loans", "view=income", f"as_of={loan.AS_OF}")
        production.run(*materialise, purpose, check=True)
        yield staging, production


def end(installation: Installation) -> None:
    """Stop a cluster, and check that nothing of it is left."""
    if not (installation.root / ".falaj" / "cluster.json").exists():
        return
    instance = installation.record.instance
    installation.run("cluster.down")
    left = processes.find(instance)
    processes.end(instance)
    assert left == []


def test_an_exported_model_serves_the_same_answers_in_another_installation(
    installations: tuple[Installation, Installation],
) -> None:
    """From staging to production. An altered bundle is refused in one line that names the part.

    As for every model in production, another person than the importer must release it.
    """
    staging, production = installations
    file = production.root / "loan-1.falaj"
    exported = staging.run("jobs.export_model", "name=loan", "version=1", f"output={file}", check=True)
    assert "exported loan version 1" in exported.stdout
    assert len(list(staging.ledger().entries(ModelExported))) == 1
    trusted = Path(production.places.keys, "trusted")
    trusted.mkdir()
    shutil.copy(Path(staging.places.keys, "ledger.pub.pem"), trusted / "staging.pub.pem")
    altered = bytearray(file.read_bytes())
    altered[altered.index(b"tree_sizes=") + 12] ^= 1
    (production.root / "altered.falaj").write_bytes(altered)
    engineer = "identity.role=ml_engineer"
    refused = production.run("jobs.import_model", "file=altered.falaj", engineer)
    assert "'model/model.txt' was altered" in refusal(refused)
    assert list(production.ledger().entries(ModelRegistered)) == []
    done = production.run("jobs.import_model", "file=loan-1.falaj", engineer, check=True)
    assert "imported loan version 1: version 1 of 'staging'" in done.stdout
    deploy = ("serve_apps.deploy", "name=loan", "version=1")
    assert "four-eyes" in refusal(production.run(*deploy, "identity.purpose=test"))
    approver = production.root / "approver.jwt"
    identity = (
        "cluster.security.identity",
        "intent",
        "--sub",
        "ann",
        "--role",
        "approver",
        "--purpose",
        "test",
    )
    production.run(*identity, "--entrypoint", deploy[0], "--output", str(approver), check=True)
    production.run(*deploy, f"identity.token_file={approver}", check=True)
    assert production.answers() == staging.answers()
