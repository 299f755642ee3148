"""`python -m jobs.evaluate name=m version=1`: evaluate a version on the rows that its training held out."""

from __future__ import annotations

from typing import Any

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.registry import Registry
from cluster.runtime import load_model
from cluster.runtime.device_choice import Hardware
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.storage import layout, resolve, write_json
from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.measuring import evaluate
from jobs.evaluate.report import describe
from jobs.evaluate.requirements import require_met
from jobs.evaluate.slices import smallest_slice
from jobs.parity import require_parity
from jobs.train.data import read_training_set
from jobs.train.version_rows import recorded_training_set, require_same_rows


@job("evaluate", EvaluateConfig, timed=True)
def main(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate one version and append the result to the ledger."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.evaluate")
    version = Registry(ledger, layout(config.storage)).get(config.name, config.version)
    # The registry shows the result with the version, so the actor needs the same right as to register a version.
    actor.check(Action.register_model, version.resource(region=config.cluster.region))
    path = config.training_set or recorded_training_set(version)
    store = key_store(actor.access)
    model = load_model(version, store, hardware=Hardware(num_threads=2))
    source = read_training_set(
        path, protected_files(actor.access), places=layout(config.storage), ledger=ledger
    )
    if config.training_set is None:
        require_same_rows(version, source, path=path, option="training_set")
    event = evaluate(config, version, model, source, store)
    ledger.append(event, actor=actor.name)
    for line in describe(event, model.signature):
        print(line, flush=True)
    output = event.payload() | {"family": version.family, "smallest_slice": smallest_slice(event.slices)}
    if config.output is not None:
        write_json(resolve(config.output), output)
    title = f"{version.name} version {version.version}"
    require_parity(event.parity, model=title)
    require_met(event.requirements, model=title)
    return output


if __name__ == "__main__":
    main()
