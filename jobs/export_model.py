"""`python -m jobs.export_model name=m version=3 output=m-3.falaj`: write a version to one signed file.

`jobs.import_model` reads the file in another installation. The file has the model unencrypted, so keep it as safe as
the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.checkpoint import load_signer
from cluster.registry import Registry
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.security.encryption.scratch import memory_folder, scratch_directory
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyStore
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout, local, resolve
from jobs.promotion.archive import new_archive
from jobs.promotion.exporting import Export, build_export, find_source
from jobs.promotion.reference import describe_parity
from jobs.promotion.statement import require_signer


@dataclass(kw_only=True, slots=True)
class ExportModelConfig(PlatformConfig):
    """Configuration of one export."""

    name: str
    """Model name."""
    output: str
    """File to write. It must not exist."""
    version: str = "latest"
    """Version number, alias, or `latest`."""


@job("export_model", ExportModelConfig, timed=True)
def main(config: ExportModelConfig) -> None:
    """Export one version."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.export_model")
    print(describe(export_version(config, ledger, actor, key_store(actor.access)), output=config.output))


def export_version(config: ExportModelConfig, ledger: Ledger, actor: Actor, store: KeyStore) -> Export:
    """Check that the actor may export the version, then write the file, with one event.

    Raises:
        AccessDenied: The actor may not export the model, or its data may not be used for the actor's purpose.
        ConfigError: The output exists or cannot be written, or this machine has no signing key.
        ArtifactTampered: A file of the version differs from the registered one.
    """
    places = layout(config.storage)
    registry = Registry(ledger, places)
    version = registry.get(config.name, config.version)
    source = find_source(ledger, version)
    actor.check(Action.export_model, *source.resources(region=config.cluster.region))
    output = local(resolve(config.output))
    signer = require_signer(load_signer(local(places.keys)))
    registry.check_files(version, actor=actor.name)
    with scratch_directory(memory_folder(otherwise=local(places.runs))) as folder:
        export = build_export(config, source, store=store, signer=signer, folder=folder)
    with new_archive(output, export.envelope, export.parts):
        # The event comes before the file: no version leaves the installation without an event.
        ledger.append(export.event, actor=actor.name)
    return export


def describe(export: Export, *, output: str) -> str:
    """Return the command's result as text."""
    statement = export.statement
    lines = [
        f"exported {statement.name} version {statement.version} to {output}",
        f"signed with key {statement.installation.key_id}; the importer must trust keys/ledger.pub.pem",
    ]
    if export.parity is not None:
        lines.append(
            f"with an int8 graph: on {export.parity['rows']} reference rows its scores differ by "
            f"{describe_parity(export.parity)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
