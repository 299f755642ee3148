"""A model moves between two installations. Each is a cluster of its own, in a network namespace of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import ModelExported, ModelRegistered
from cluster.storage import Layout
from tests.integration.conftest import refusal
from tests.nodes.namespaces import network
from tests.nodes.two_machines import Computer, end_everything, send
from tests.projects import loan

CUSTOMERS = range(0, 40, 3)


@dataclass(frozen=True, kw_only=True)
class Installation(Computer):
    """One cluster on one machine."""

    @property
    def places(self) -> Layout:
        return Layout(str(self.root / ".falaj"))

    def ledger(self) -> Ledger:
        return Ledger(f"sqlite:///{self.places.ledger_path}")

    def answers(self) -> list[dict[str, Any]]:
        """Return the predictions for some customers, from this installation's edge."""
        answers = []
        for customer in CUSTOMERS:
            body = {"entities": [{"customer_id": customer}], "as_of": loan.AS_OF}
            status, content = send(self, body, unit=3, tokens_of=self)
            assert status == 200, content
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
            stack.callback(end_everything, [one])
            own = (f"cluster.edge_host={machine.address}", "cluster.num_cpus=4")
            one.run("cluster.up", *own, f"identity.environment={name}")
            pair.append(one)
        staging, production = pair
        loan.prepare(staging)
        (production.root / "loans.py").write_text(loan.DEFINITIONS.replace("incomes.parquet", "paid.parquet"))
        shutil.copy(staging.root / "incomes.parquet", production.root / "paid.parquet")
        purpose = "identity.purpose=test"  # outside of "local", everybody states a purpose
        production.run("feature_jobs.apply", "definitions=loans", purpose)
        production.run("feature_jobs.ingest", "definitions=loans", "view=income", purpose)
        materialise = ("feature_jobs.materialize", "definitions=loans", "view=income", f"as_of={loan.AS_OF}")
        production.run(*materialise, purpose)
        yield staging, production


def test_an_exported_model_serves_the_same_answers_in_another_installation(
    installations: tuple[Installation, Installation],
) -> None:
    """From staging to production. An altered bundle is refused in one line that names the part.

    As for every model in production, another person than the importer must release it.
    """
    staging, production = installations
    file = production.root / "loan-1.falaj"
    exported = staging.run("jobs.export_model", "name=loan", "version=1", f"output={file}")
    assert "exported loan version 1" in exported.stdout
    assert len(list(staging.ledger().entries(ModelExported))) == 1
    trusted = Path(production.places.keys, "trusted")
    trusted.mkdir()
    shutil.copy(Path(staging.places.keys, "ledger.pub.pem"), trusted / "staging.pub.pem")
    altered = bytearray(file.read_bytes())
    altered[altered.index(b"tree_sizes=") + 12] ^= 1
    (production.root / "altered.falaj").write_bytes(altered)
    engineer = "identity.role=ml_engineer"
    refused = production.run("jobs.import_model", "file=altered.falaj", engineer, check=False)
    assert "'model/model.txt' was altered" in refusal(refused)
    assert list(production.ledger().entries(ModelRegistered)) == []
    done = production.run("jobs.import_model", "file=loan-1.falaj", engineer)
    assert "imported loan version 1: version 1 of 'staging'" in done.stdout
    deploy = ("serve_apps.deploy", "name=loan", "version=1")
    assert "four-eyes" in refusal(production.run(*deploy, "identity.purpose=test", check=False))
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
    production.run(*identity, "--entrypoint", deploy[0], "--output", str(approver))
    production.run(*deploy, f"identity.token_file={approver}")
    assert production.answers() == staging.answers()
