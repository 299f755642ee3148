"""A storage root with a model, for batch scoring in this process: no cluster, and a broker that gives out every key."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ScoringFinished
from cluster.registry import Lineage, ModelVersion, Registry
from cluster.runtime import ModelSignature
from cluster.security.acting import Actor
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Policy
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.tokens.roles import Role
from cluster.settings import PlatformConfig, StorageConfig
from cluster.storage import layout
from jobs.score.__main__ import score
from jobs.score.config import ScoreConfig
from jobs.score.files import MANIFEST, Folder, Manifest
from tests.samples.principals import who
from tests.samples.trees import write_trees

MODEL = "m"
KEY = f"scores/{MODEL}/sensitive"
Write = Callable[[Path, ModelSignature], None]


class ScoringProject:
    """A folder with a storage root, a ledger and input files."""

    def __init__(self, root: Path, access: KeyAccess) -> None:
        self.root, self.access = root, access
        self.storage = StorageConfig(root=f"{root}/.falaj")
        (root / ".falaj").mkdir(exist_ok=True)
        self.config = PlatformConfig(storage=self.storage)
        self.ledger: Ledger = open_ledger(self.config)

    def actor(self, role: Role = Role.data_scientist, purpose: str = "testing") -> Actor:
        """Return a job's identity. Its permissions are those of the policies."""
        return Actor(
            principal=who(role, purpose, entrypoint="jobs.score"),
            access=self.access,
            policy=Policy.load(),
            environment="local",
            decisions=DecisionRecorder(self.ledger.append),
        )

    def register(
        self, signature: ModelSignature, *, write: Write = write_trees, lineage: Lineage | None = None
    ) -> ModelVersion:
        """Register a version of the model."""
        folder = Path(tempfile.mkdtemp(dir=self.root)) / "new"
        write(folder, signature)
        return Registry(self.ledger, layout(self.storage)).register(
            folder,
            name=MODEL,
            family="f",
            task=signature.task.value,
            lineage=lineage or Lineage(),
            metrics={},
            store=key_store(self.access),
            actor="t",
        )

    def write(self, table: pa.Table | dict[str, Any], name: str = "rows.parquet", **options: Any) -> str:
        """Write input rows as Parquet, and return their path."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
        return str(path)

    def options(self, *, output: str = "scores", **options: Any) -> ScoreConfig:
        """Return the options of a run. A relative output is in the project's folder."""
        settings = {"name": MODEL, "version": "latest", "input": str(self.root / "rows.parquet")} | options
        uri = output if "://" in output else str(self.root / output)
        return ScoreConfig(storage=self.storage, output=uri, **settings)

    def score(self, *, actor: Actor | None = None, **options: Any) -> ScoringFinished:
        """Score rows in this process."""
        return score(self.options(**options), self.ledger, actor or self.actor())

    def scores(self, output: str = "scores") -> pl.DataFrame:
        """Return all scores of a finished run, decrypted."""
        return self._read(output, "files")

    def set_aside(self, output: str = "scores") -> pl.DataFrame:
        """Return all rows of a finished run that have no score, decrypted."""
        return self._read(output, "set_aside_files")

    def _read(self, output: str, files: str) -> pl.DataFrame:
        uri = str(self.root / output)
        manifest = Manifest.from_bytes(Path(f"{uri}/{MANIFEST}").read_bytes())
        place = uri.removeprefix(f"{self.storage.root}/")
        folder = Folder(uri=uri, key=manifest.key, place=place, access=self.access)
        tables = [folder.read(file.name) for file in getattr(manifest, files)]
        return pl.DataFrame(pl.from_arrow(pa.concat_tables(tables))) if tables else pl.DataFrame()

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.engine.dispose()
