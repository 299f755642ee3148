"""`python -m jobs.train_text name=m text='docs/**/*.md'`: fit a decoder to text files, evaluate and register a version.

The version is judged in bits per byte on files that the fit has not seen. It cannot be deployed. Runs are those of
`jobs.train`: `run=<id>` continues the run with this id.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from cluster.artifact import model_key
from cluster.entrypoint import job
from cluster.host.this_node import this_node
from cluster.ledger import Ledger, open_ledger
from cluster.placement import find_nodes
from cluster.registry import Lineage, ModelVersion, Registry
from cluster.runtime.signature import LANGUAGE_MODEL
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.run_files import run_folder
from cluster.security.encryption.scratch import memory_folder, scratch_directory
from cluster.security.keys.access import key_store
from cluster.session import attach, require_running_cluster
from cluster.storage import layout, local
from jobs.train.decoder.config import TrainTextConfig
from jobs.train.decoder.corpus import Corpus, Parts, read_corpus, split_corpus
from jobs.train.families import FitContext, ResolvedFamily, resolve_family
from jobs.train.run.files import RunFiles, run_files
from jobs.train.run.identity import find_finished, new_run_id, run_settings
from jobs.train.run.lineage import git_commit, library_versions, to_json_values
from jobs.train.run.record import Run
from jobs.train.run.registration import TrainedModel, register, write_output


@job("train_text", TrainTextConfig, timed=True)
def main(config: TrainTextConfig) -> dict[str, Any]:
    """Train one version and register it."""
    family = resolve_family(config.model, reads_text=True)
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.train_text")
    model = Resource(kind="model", name=config.name, region=config.cluster.region)
    actor.check(Action.train_model, model)
    actor.check(Action.register_model, model)
    corpus = read_corpus(config.text, excluded=state_folders(config))
    parts = split_corpus(
        corpus,
        modulo=config.split.modulo,
        remainder=config.split.remainder,
        validation_share=config.validation_share,
    )
    run_id = config.run or new_run_id()
    config = replace(config, run=run_id)
    run = Run(
        ledger=ledger,
        model=config.name,
        run=run_id,
        family=family.name,
        settings=run_settings(config, family.name, family.parameters, corpus.hash),
        actor=actor.name,
    )
    is_continued = run.check_settings()
    number = run.finished_version()
    if number is not None:
        files_of_run(config, actor).remove_state()
        version = Registry(ledger, layout(config.storage)).get(config.name, number)
        print(f"run {run_id} is finished: {describe(version)}")
        return write_output(version, run=run_id, path=config.output)
    from jobs.train.decoder.fit import describe_text  # imports torch and Ray Train

    print(describe_text(corpus, parts), flush=True)
    with run.recorded(is_continued=is_continued):
        version = train(config, family, corpus, parts, ledger, actor)
    print(f"registered {describe(version)}")
    return write_output(version, run=run_id, path=config.output)


def files_of_run(config: TrainTextConfig, actor: Actor) -> RunFiles:
    """Return the files of the run."""
    assert config.run is not None
    root = layout(config.storage).root
    return run_files(root, model=config.name, run=config.run, access=actor.access)


def state_folders(config: TrainTextConfig) -> list[str]:
    """Return the platform's own folders. Their files are no texts of the caller."""
    places = layout(config.storage)
    return [places.root, places.disk]


def train(
    config: TrainTextConfig,
    family: ResolvedFamily,
    corpus: Corpus,
    parts: Parts,
    ledger: Ledger,
    actor: Actor,
) -> ModelVersion:
    """Fit, evaluate and register a version. If another job has finished the run, return its version."""
    from jobs.train.decoder.fit import evaluate_text, fit_text, text_warnings  # imports torch and Ray Train
    from jobs.train.progress import claimed_run  # imports Ray

    attach(config)
    places = layout(config.storage)
    key_store(actor.access).ensure(model_key(config.name))
    files = files_of_run(config, actor)
    name = f"{config.name}-{family.name}-{config.run}"
    with (
        claimed_run(name) as claim,
        # The workers read the text where this command reads it, so they run on this node.
        run_folder(places, for_all_nodes=this_node() is not None) as ray_files,
        scratch_directory(memory_folder(otherwise=local(places.runs))) as folder,
    ):
        finished = find_finished(ledger, model=config.name, run=str(config.run))
        if finished is not None:
            files.remove_state()
            return Registry(ledger, places).get(config.name, finished.version)
        context = FitContext(
            folder=folder,
            runs=ray_files.path,
            file_system=ray_files.file_system,
            seed=config.seed,
            scaling=config.scaling,
            deepspeed=config.deepspeed,
            checkpoint=config.checkpoint,
            run_name=name,
            selector=find_nodes(config.placement, on_this_node="the text may be on this node's disk"),
            files=files,
            claim=claim,
        )
        fit_text(parts, family, context)
        metrics = evaluate_text(folder, parts, family.parameters, max_rows=config.evaluated_rows)
        warnings = text_warnings(metrics)
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
        trained = TrainedModel(
            name=config.name,
            family=family.name,
            task=LANGUAGE_MODEL,
            folder=folder,
            lineage=build_text_lineage(config, family, corpus),
            metrics=metrics,
            warnings=warnings,
        )
        version = register(trained, ledger, places, actor)
    files.remove_state()
    return version


def build_text_lineage(config: TrainTextConfig, family: ResolvedFamily, corpus: Corpus) -> Lineage:
    """Return the lineage of a version: the hash of all texts, code, configuration and libraries."""
    parameters = to_json_values(asdict(family.parameters))
    return Lineage(
        training_set_hash=corpus.hash,
        git_commit=git_commit(),
        config=to_json_values(asdict(config)) | {"parameters": parameters},
        seed=config.seed,
        libraries=library_versions(),
    )


def describe(version: ModelVersion) -> str:
    """Describe a version and its quality in one line."""
    metrics = version.metrics
    return (
        f"{version.name} version {version.version}: {metrics['bits_per_byte']:.3f} bits per byte on held-out files "
        f"(a bigram model has {metrics['bigram_bits_per_byte']:.3f})"
    )


if __name__ == "__main__":
    main()
