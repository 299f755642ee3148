"""Model versions and their aliases, as a projection of the ledger.

The tables can be dropped and rebuilt from the events. Every read first applies the new events of the ledger, so all
processes see the same state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
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
from cluster.errors import ArtifactTampered, ModelNotFound, RefusedError, did_you_mean
from cluster.known_fields import known_fields
from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import (
    AliasMoved,
    ArtifactRefused,
    ModelRegistered,
    ModelReinstated,
    ModelRetired,
)
from cluster.ledger.projection import Projection
from cluster.ledger.reservations import reserve_number
from cluster.security.authorization.policy import Resource
from cluster.security.keys.store import KeyStore
from cluster.storage import Layout, exists, is_uri, replace_non_finite, write_bytes

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
    """Data, code and configuration that a model version was trained with."""

    training_set_hash: str = ""
    """Empty if the version was not trained from a training set of the feature store."""
    table_versions: dict[str, int] = field(default_factory=dict)
    """Maps feature view to Delta table version."""
    service: str = ""
    service_version: str = ""
    git_commit: str = "unknown"
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of the training job."""
    seed: int = 0
    libraries: dict[str, str] = field(default_factory=dict)
    """Maps library to its version. Empty in versions of older releases."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """`run` and `trial` of the sweep that chose the hyper-parameters; empty if no sweep did."""


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
    """Warnings of the training job. Versions of older releases have none."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where an imported version comes from; empty if it was trained here."""
    contents: dict[str, str] = field(default_factory=dict)
    """Maps file name to the SHA-256 of its content before encryption. Versions of older releases have none."""
    registered_by: str = ""
    """Subject that registered the version."""

    def resource(self, *, region: str) -> Resource:
        """Return the version as a resource for the policies."""
        return Resource(kind="model", name=self.name, region=region, registered_by=self.registered_by)


class Registry:
    """Reads and writes model versions."""

    def __init__(self, ledger: Ledger, storage: Layout) -> None:
        self._ledger = ledger
        self._storage = storage
        self._projection = Projection(
            ledger, name="registry", metadata=METADATA, wanted=_wanted, apply=_apply
        )

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
        origin: Mapping[str, Any] | None = None,
        store: KeyStore,
        actor: str,
    ) -> ModelVersion:
        """Encrypt and store a folder of model files, and record it as the next version.

        A crash before the event leaves a folder without a version. The next registration skips that folder's number.

        Args:
            source: Folder with the model files.
            name: Name of the model.
            family, task, lineage, metrics, warnings, origin: Recorded with the version.
            store: Key store of the model's key. The key is created if it does not exist.
            actor: Subject of the event.

        Raises:
            RefusedError: A file has a format that is not allowed.
            AccessDenied, KeyRevoked: The key store refuses the key.
        """
        parts = allowed_files(source)
        store.ensure(model_key(name))
        version = self._reserve(name)
        files, contents = self._store_files(source, parts, name=name, version=version, store=store)
        manifest = manifest_bytes(files)
        write_bytes(f"{self._storage.model(name, version)}/{MANIFEST}", manifest)
        event = ModelRegistered(
            name=name,
            version=version,
            family=family,
            task=task,
            manifest_hash=hashlib.sha256(manifest).hexdigest(),
            files=files,
            lineage=asdict(lineage),
            metrics=replace_non_finite(dict(metrics)),
            warnings=list(warnings),
            origin=dict(origin or {}),
            contents=contents,
        )
        self._ledger.append(event, actor=actor)
        return self.get(name, version)

    def get(self, name: str, version: int | str = CHAMPION) -> ModelVersion:
        """Return a version by its number, by an alias, or by `latest`.

        Raises:
            ModelNotFound: No such version. The message lists the known names, versions or aliases.
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
        """Return all model names, sorted."""
        with self._projection.reading() as connection:
            return [
                row.name
                for row in connection.execute(sa.select(VERSIONS.c.name).distinct().order_by(VERSIONS.c.name))
            ]

    def versions(self, name: str) -> list[int]:
        """Return all version numbers of a model, ascending."""
        query = sa.select(VERSIONS.c.version).where(VERSIONS.c.name == name).order_by(VERSIONS.c.version)
        with self._projection.reading() as connection:
            return [row.version for row in connection.execute(query)]

    def aliases(self, name: str) -> dict[str, int]:
        """Return a model's aliases with their version numbers."""
        query = sa.select(ALIASES.c.alias, ALIASES.c.version).where(ALIASES.c.name == name)
        with self._projection.reading() as connection:
            return {row.alias: row.version for row in connection.execute(query)}

    def move_alias(self, name: str, alias: str, version: int, *, actor: str, reason: str) -> None:
        """Point an alias to an existing version. The alias's history is in the ledger.

        Raises:
            ModelNotFound: No such version.
        """
        self.get(name, version)
        previous = self.aliases(name).get(alias)
        event = AliasMoved(name=name, alias=alias, version=version, previous=previous, reason=reason)
        self._ledger.append(event, actor=actor)

    def check_files(self, version: ModelVersion, *, actor: str) -> None:
        """Verify that a version's files are the registered ones. A failure is recorded as an event.

        Raises:
            ArtifactTampered: A file differs. The message names the file.
        """
        try:
            verify_files(version.uri, version.manifest_hash)
        except ArtifactTampered as error:
            event = ArtifactRefused(name=version.name, version=version.version, reason=str(error))
            self._ledger.append(event, actor=actor)
            raise

    def rebuild(self) -> None:
        """Drop the projection and rebuild it from the events."""
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

    def _store_files(
        self, source: Path, parts: Iterable[str], *, name: str, version: int, store: KeyStore
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Encrypt and store the files of a version. Return the SHA-256 of each file after and before encryption."""
        folder = self._storage.model(name, version)
        files: dict[str, str] = {}
        contents: dict[str, str] = {}
        for part in parts:
            data = (source / part).read_bytes()
            sealed = seal_file(data, name=name, version=version, part=part, store=store)
            write_bytes(f"{folder}/{part}", sealed)
            files[part] = hashlib.sha256(sealed).hexdigest()
            contents[part] = hashlib.sha256(data).hexdigest()
        return files, contents

    def _reserve(self, name: str) -> int:
        """Reserve the next version number in the ledger's database.

        If the number already has a folder, the folder is from a crashed registration or an older release. Then the
        number is skipped.
        """
        while True:
            newest = max(self.versions(name), default=0)
            version = reserve_number(self._ledger, f"models/{name}", above=newest)
            if _create_folder(self._storage.model(name, version)):
                return version

    def _version(self, event: dict[str, Any]) -> ModelVersion:
        return ModelVersion(
            **known_fields(ModelVersion, event)
            | {
                "lineage": Lineage(**known_fields(Lineage, event["lineage"])),
                "uri": self._storage.model(event["name"], event["version"]),
            }
        )


def retirement(ledger: Ledger, name: str, version: int) -> Entry | None:
    """Return the retirement of a version if it is in force."""
    retired = ledger.newest(ModelRetired, name=name, version=version)
    reinstated = ledger.newest(ModelReinstated, name=name, version=version)
    if retired is None or (reinstated is not None and reinstated.seq > retired.seq):
        return None
    return retired


def require_not_retired(ledger: Ledger, registry: Registry, version: ModelVersion) -> None:
    """Require that a version may be used for new predictions.

    Raises:
        RefusedError: The version is retired. The message has the reason and the newest version that is not.
    """
    found = retirement(ledger, version.name, version.version)
    if found is None:
        return
    others = (
        number
        for number in reversed(registry.versions(version.name))
        if retirement(ledger, version.name, number) is None
    )
    newest = next(others, None)
    advice = "Train a new version" if newest is None else f"Use another one, such as version={newest}"
    raise RefusedError(
        f"Version {version.version} of '{version.name}' is retired ({found.payload['reason']}). {advice}, or run "
        f"`python -m serve_apps.deploy action=reinstate name={version.name} version={version.version}`."
    )


def _create_folder(uri: str) -> bool:
    """Create a version's folder, and return whether it is new. A remote folder is created with its first file."""
    if is_uri(uri):
        return not exists(uri)
    try:
        Path(uri).mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _wanted(type_name: str) -> bool:
    return type_name in (ModelRegistered.__name__, AliasMoved.__name__)


def _apply(connection: sa.Connection, entry: Entry) -> None:
    match entry.event():
        case ModelRegistered() as event:
            content = event.payload() | {"registered_by": entry.actor}
            row = {"name": event.name, "version": event.version, "event": json.dumps(content)}
            connection.execute(VERSIONS.insert().values(row))
        case AliasMoved() as event:
            same_alias = (ALIASES.c.name == event.name) & (ALIASES.c.alias == event.alias)
            connection.execute(ALIASES.delete().where(same_alias))
            connection.execute(
                ALIASES.insert().values(name=event.name, alias=event.alias, version=event.version)
            )


def _join(values: list[int]) -> str:
    return ", ".join(map(str, values))
