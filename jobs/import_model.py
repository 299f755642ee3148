"""`python -m jobs.import_model file=m-3.falaj`: register a version that another installation exported.

The exporter's public key must be in this installation's folder `keys/trusted`, as `<name of the installation>.pub.pem`.
The features must be applied here with the same meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.checkpoint import load_signer
from cluster.registry import ModelVersion, Registry
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.scratch import memory_folder, scratch_directory
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyStore
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import Layout, local, resolve
from jobs.promotion.definitions import input_resources, matching_service
from jobs.promotion.importing import (
    Bundle,
    ImportPrecision,
    Prepared,
    choose_precision,
    import_lock,
    prepare,
    read_bundle,
    register,
    require_new,
)
from jobs.promotion.reference import describe_parity
from jobs.promotion.trust import load_trusted_keys, own_key, trust_advice


@dataclass(kw_only=True, slots=True)
class ImportModelConfig(PlatformConfig):
    """Configuration of one import."""

    file: str
    """File that `jobs.export_model` wrote."""
    precision: ImportPrecision = ImportPrecision.auto
    """Number type of a network."""
    older: bool = False
    """Import a version although a newer one of the same installation is here."""


@job("import_model", ImportModelConfig, timed=True)
def main(config: ImportModelConfig) -> None:
    """Import one version."""
    ledger = open_ledger(config)
    record = require_running_cluster(config)
    if record.node_id is not None:
        raise ConfigError("The trusted keys are only on the head. Run the command there.")
    actor = create_actor(config, record, ledger, entrypoint="jobs.import_model")
    print(import_version(config, ledger, actor, key_store(actor.access), places=record.layout))


def import_version(
    config: ImportModelConfig, ledger: Ledger, actor: Actor, store: KeyStore, *, places: Layout
) -> str:
    """Verify a bundle, register its version, and return a description of what was done.

    Args:
        config: Configuration of the import.
        ledger: The importer's ledger.
        actor: Who imports.
        store: Key store with the model's key.
        places: Folders of the running cluster. An option cannot move them, so it cannot name other trusted keys.

    Raises:
        RefusedError: The bundle is not what a trusted installation exported, is here already, has other definitions
            than this installation, or is not permitted. Nothing was registered.
    """
    keys, runs = local(places.keys), local(places.runs)
    signer = load_signer(keys)
    trusted = own_key(signer) | load_trusted_keys(keys)
    with import_lock(runs):
        bundle = read_bundle(local(resolve(config.file)), trusted, advice=trust_advice(keys))
        precision = choose_precision(bundle, config.precision, tier=config.tier)
        content = require_new(bundle, ledger, precision=precision, own=signer, older=config.older)
        name, region = bundle.statement.name, bundle.statement.installation.region
        actor.check(Action.register_model, Resource(kind="model", name=name, region=config.cluster.region))
        actor.check(Action.import_model, *input_resources(bundle.definitions, model=name, region=region))
        service_version = matching_service(ledger, bundle.definitions)
        with scratch_directory(memory_folder(otherwise=runs)) as folder:
            prepared = prepare(bundle, folder, service_version=service_version, precision=precision)
            version = register(
                bundle,
                prepared,
                Registry(ledger, places),
                content=content,
                service_version=service_version,
                store=store,
                actor=actor.name,
            )
    return describe(bundle, prepared, version)


def describe(bundle: Bundle, prepared: Prepared, version: ModelVersion) -> str:
    """Return the command's result as text."""
    statement = bundle.statement
    lines = [
        f"imported {version.name} version {version.version}: version {statement.version} of '{bundle.exporter.name}'",
        f"verified {len(bundle.parts)} parts, and {len(bundle.entries)} of the {statement.ledger.size} events there",
    ]
    if prepared.parity is not None:
        lines.append(
            f"as int8: on {prepared.parity['rows']} reference rows its scores differ from float32 by "
            f"{describe_parity(prepared.parity)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
