"""Model versions and their aliases, a projection of the ledger.

The tables can be dropped and are built again from the events; every read first catches up with the ledger, so two
processes never disagree for longer than a query.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cluster.artifact import (
    MANIFEST,
    allowed_files,
    manifest_bytes,
    model_key,
    seal_file,
    verify_files,
)
from cluster.errors import ArtifactTampered, ModelNotFound, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import AliasMoved, ArtifactRefused, ModelRegistered
from cluster.ledger.projection import Projection
from cluster.security.authorization.policy import Resource
from cluster.security.keys.store import KeyStore
from cluster.storage import Layout, finite, local, write_bytes

__all__ = ["Lineage", "ModelVersion", "Registry", "verify_files"]

CHAMPION = "champion"
LATEST = "latest"

METADATA = sa.MetaData()
VERSIONS = sa.Table(
    "model_versions",
    METADATA,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("event", sa.Text, nullable=False),
)
ALIASES = sa.Table(
    "model_aliases",
    METADATA,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("alias", sa.String(128), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """What a model version came from."""

    training_set_hash: str
    table_versions: dict[str, int] = field(default_factory=dict)
    """Feature view to Delta table version."""
    service: str = ""
    service_version: str = ""
    git_commit: str = "unknown"
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of the training job."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """One registered version of a model."""

    name: str
    version: int
    family: str
    task: str
    uri: str
    manifest_hash: str
    files: dict[str, str]
    lineage: Lineage
    metrics: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    """What training said to be wary of; versions of older releases have none."""
    registered_by: str = ""
    """Subject of who registered it."""

    def resource(self, *, region: str) -> Resource:
        """The version as the policies see it."""
        return Resource(kind="model", name=self.name, region=region, registered_by=self.registered_by)


class Registry:
    """Reads and writes model versions."""

    def __init__(self, ledger: Ledger, places: Layout) -> None:
        self._ledger = ledger
        self._places = places
        self._projection = Projection(ledger, name="registry", metadata=METADATA, apply=_apply)

    def register(
        self,
        source: Path,
        *,
        name: str,
        family: str,
        task: str,
        lineage: Lineage,
        metrics: Mapping[str, Any],
        warnings: Sequence[str] = (),
        store: KeyStore,
        actor: str,
    ) -> ModelVersion:
        """Seal a folder of model files into the store and record it as the next version.

        A crash before the event leaves a folder that no version points to, and the next registration passes over it.

        Raises:
            RefusedError: a file in a format that is not allowed.
            AccessDenied, KeyRevoked: as the key store says.
        """
        names = allowed_files(source)
        store.ensure(model_key(name))
        version, folder = self._reserve(name)
        files: dict[str, str] = {}
        for part in names:
            sealed = seal_file(
                (source / part).read_bytes(), name=name, version=version, part=part, store=store
            )
            write_bytes(str(folder / part), sealed)
            files[part] = hashlib.sha256(sealed).hexdigest()
        data = manifest_bytes(files)
        write_bytes(str(folder / MANIFEST), data)
        event = ModelRegistered(
            name=name,
            version=version,
            family=family,
            task=task,
            manifest_hash=hashlib.sha256(data).hexdigest(),
            files=files,
            lineage=asdict(lineage),
            metrics=finite(dict(metrics)),
            warnings=list(warnings),
        )
        self._ledger.append(event, actor=actor)
        return self.get(name, version)

    def get(self, name: str, version: int | str = CHAMPION) -> ModelVersion:
        """A version by number, by alias, or the `latest`.

        Raises:
            ModelNotFound: saying which names, versions and aliases there are.
        """
        number = self._number(name, version)
        query = sa.select(VERSIONS.c.event).where(VERSIONS.c.name == name, VERSIONS.c.version == number)
        with self._projection.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise ModelNotFound(
                f"Model '{name}' has no version {number}.", hint=f" Known: {_join(self.versions(name))}."
            )
        return self._version(json.loads(row.event))

    def names(self) -> list[str]:
        """All model names."""
        with self._projection.reading() as connection:
            return [
                row.name
                for row in connection.execute(sa.select(VERSIONS.c.name).distinct().order_by(VERSIONS.c.name))
            ]

    def versions(self, name: str) -> list[int]:
        """All version numbers of a model, ascending."""
        query = sa.select(VERSIONS.c.version).where(VERSIONS.c.name == name).order_by(VERSIONS.c.version)
        with self._projection.reading() as connection:
            return [row.version for row in connection.execute(query)]

    def aliases(self, name: str) -> dict[str, int]:
        """Alias to version number."""
        query = sa.select(ALIASES.c.alias, ALIASES.c.version).where(ALIASES.c.name == name)
        with self._projection.reading() as connection:
            return {row.alias: row.version for row in connection.execute(query)}

    def move_alias(self, name: str, alias: str, version: int, *, actor: str, reason: str) -> None:
        """Point an alias to an existing version; its history is the ledger's."""
        self.get(name, version)
        previous = self.aliases(name).get(alias)
        event = AliasMoved(name=name, alias=alias, version=version, previous=previous, reason=reason)
        self._ledger.append(event, actor=actor)

    def check_files(self, version: ModelVersion, *, actor: str) -> None:
        """Prove that a version's files are those that were registered; a refusal is an event.

        Raises:
            ArtifactTampered: naming the file.
        """
        try:
            verify_files(version.uri, version.manifest_hash)
        except ArtifactTampered as error:
            event = ArtifactRefused(name=version.name, version=version.version, reason=str(error))
            self._ledger.append(event, actor=actor)
            raise

    def rebuild(self) -> None:
        """Drop the projection and build it again from the events."""
        self._projection.rebuild()

    def _number(self, name: str, version: int | str) -> int:
        known = self.versions(name)
        if not known:
            raise ModelNotFound(f"No model '{name}'.", hint=did_you_mean(name, self.names()))
        if isinstance(version, int) or version.isdecimal():
            return int(version)
        if version == LATEST:
            return known[-1]
        aliases = self.aliases(name)
        if version not in aliases:
            raise ModelNotFound(
                f"Version '{version}' of model '{name}' is neither a number nor an alias.",
                hint=did_you_mean(version, [LATEST, *aliases]),
            )
        return aliases[version]

    def _reserve(self, name: str) -> tuple[int, Path]:
        folder = local(self._places.models(name))
        folder.mkdir(parents=True, exist_ok=True)
        version = max(self.versions(name), default=0) + 1
        while True:
            try:
                (folder / str(version)).mkdir()
                return version, folder / str(version)
            except FileExistsError:
                version += 1

    def _version(self, event: dict[str, Any]) -> ModelVersion:
        return ModelVersion(
            **event
            | {
                "lineage": Lineage(**event["lineage"]),
                "uri": self._places.model(event["name"], event["version"]),
            }
        )


def _apply(connection: sa.Connection, entry: Entry) -> None:
    match entry.event():
        case ModelRegistered() as event:
            known = event.payload() | {"registered_by": entry.actor}
            row = {"name": event.name, "version": event.version, "event": json.dumps(known)}
            connection.execute(VERSIONS.insert().values(row))
        case AliasMoved() as event:
            same = (ALIASES.c.name == event.name) & (ALIASES.c.alias == event.alias)
            connection.execute(ALIASES.delete().where(same))
            connection.execute(
                ALIASES.insert().values(name=event.name, alias=event.alias, version=event.version)
            )


def _join(values: list[int]) -> str:
    return ", ".join(map(str, values))
