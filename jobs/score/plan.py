"""Decide what a run does, before it starts: the rows, the inputs of the model, the columns and the place of the output.

A run that was started before is continued with what its event says, so it reads the same versions of feature tables at
the same time.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import ConfigError, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.chain import to_json
from cluster.ledger.events import ScoringStarted
from cluster.registry import ModelVersion, Registry, require_not_retired
from cluster.runtime import ModelSignature
from cluster.runtime.loader import load_signature
from cluster.security.acting import Actor
from cluster.security.keys.access import KeyAccess, key_store
from cluster.storage import Layout, layout, resolve
from feature_jobs.store.catalog.specifications import ServiceSpec, service_spec
from feature_jobs.store.ingestion.ranges import parse_instant
from feature_jobs.store.offline.manifest import require_files
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.types.schema import EVENT
from feature_jobs.view_tables import view_snapshot
from jobs.score.config import InputFormat, InputsFrom, ScoreConfig
from jobs.score.files import Folder, read_run
from jobs.score.inputs import FeatureRead, InputPlan, needed_columns, needed_service, row_keys, text_dtype
from jobs.score.part import RESERVED, Scoring, columns_to_read
from jobs.score.rights import Rights
from jobs.score.source import Source, is_below, open_source, require_known_columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run that can be started or continued."""

    started: ScoringStarted
    """The event of its start."""
    is_new: bool
    """Whether the event must still be appended."""
    scoring: Scoring
    source: Source
    left_out: list[str]
    """Inputs that the output lacks, because the caller may not export them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What a run is to do, after the checks of the settings and of the caller's rights."""

    version: ModelVersion
    signature: ModelSignature
    source: Source
    inputs_from: InputsFrom
    service: ServiceSpec | None
    """The service that the inputs are read from; None if the rows have them."""
    output: str
    is_protected: bool
    """Whether the output is below the storage root, and so encrypted."""
    kept: list[str]
    """Columns of the input to copy."""
    inputs: list[str]
    """Inputs of the model to copy."""
    left_out: list[str]
    """Inputs that the output lacks, because the caller may not export them."""


def make_plan(config: ScoreConfig, ledger: Ledger, actor: Actor, *, now: dt.datetime) -> Plan:
    """Check the caller's rights and all settings, and return the plan. Only a missing key of the scores is created.

    Raises:
        RefusedError: The run cannot start, or the id belongs to a run with other settings.
    """
    places = layout(config.storage)
    rights = Rights(actor=actor, region=config.cluster.region)
    request = _check_request(config, ledger, places, rights)
    wanted = _wanted_start(config, request, now)
    wanted = replace(wanted, run=choose_run(config, wanted, ledger))
    found = ledger.newest(ScoringStarted, run=wanted.run)
    started = wanted if found is None else require_same(ScoringStarted(**found.payload), wanted)
    read = None
    if request.service is not None:
        read = feature_read(
            request.service, request.signature, started, request.inputs_from, places, actor.access
        )
        _require_keys(read, request.source, request.inputs_from)
        if found is None:
            pinned = {name: snapshot.version for name, snapshot in read.snapshots.items()}
            started = replace(started, table_versions=pinned)
    inputs = input_plan(request.signature, read, request.source)
    folder = _folder(request, ledger, places, rights)
    return Plan(
        started=started,
        is_new=found is None,
        scoring=_scoring(config, request, started, inputs, folder),
        source=request.source,
        left_out=request.left_out,
    )


def _check_request(config: ScoreConfig, ledger: Ledger, places: Layout, rights: Rights) -> _Request:
    """Check the settings and the caller's rights, and decide the columns of the output."""
    registry = Registry(ledger, places)
    version = registry.get(config.name, config.version)
    rights.check_scoring(version, None)
    require_not_retired(ledger, registry, version)
    registry.check_files(version, actor=rights.actor.name)
    signature = load_signature(version, key_store(rights.actor.access))
    source = open_source(config, places=places, ledger=ledger)
    inputs_from = choose_inputs(config.inputs_from, signature, source.schema.names)
    service = None
    if inputs_from is not InputsFrom.given:
        whole = service_spec(ledger, signature.service, signature.service_version)
        service = needed_service(whole, signature.columns, source.schema.names)
        rights.check_scoring(version, service)
    kept = kept_columns(config, source, ledger, version)
    output = resolve(config.output)
    is_protected = is_below(output, places.root)
    inputs, left_out = output_inputs(config, signature, source, service, rights, is_protected=is_protected)
    if not is_protected:
        rights.check_export(ledger, version)
        kept = _exportable_kept(config, kept, source, rights)
    return _Request(
        version=version,
        signature=signature,
        source=source,
        inputs_from=inputs_from,
        service=service,
        output=output,
        is_protected=is_protected,
        kept=kept,
        inputs=inputs,
        left_out=left_out,
    )


def _wanted_start(config: ScoreConfig, request: _Request, now: dt.datetime) -> ScoringStarted:
    """Return the event of a new run, without its id and without the versions of the feature tables."""
    as_of = now if config.as_of is None else parse_instant(config.as_of, name="as_of")
    signature, source = request.signature, request.source
    return ScoringStarted(
        run="",
        model=request.version.name,
        version=request.version.version,
        inputs_from=request.inputs_from.value,
        as_of=as_of.isoformat(),
        service="" if request.service is None else signature.service,
        service_version="" if request.service is None else signature.service_version,
        table_versions={},
        input=source.uri,
        input_hash=source.hash,
        input_version=source.version,
        rows=source.rows,
        output=request.output,
        keep=request.kept,
        settings={
            "part_rows": config.part_rows,
            "as_of": config.as_of,
            "delimiter": config.delimiter,
            "keep_inputs": request.inputs,
        },
    )


def _folder(request: _Request, ledger: Ledger, places: Layout, rights: Rights) -> Folder:
    """Return the output folder. Below the storage root, it has a key."""
    uri, access = request.output, rights.actor.access
    if not request.is_protected:
        return Folder(uri=uri, key=None, place="", access=access)
    place = uri.removeprefix(f"{places.root.rstrip('/')}/")
    return Folder(uri=uri, key=rights.ensure_key(ledger, request.version), place=place, access=access)


def _scoring(
    config: ScoreConfig, request: _Request, started: ScoringStarted, inputs: InputPlan, folder: Folder
) -> Scoring:
    """Return what workers need to score the parts of a run."""
    source, kept = request.source, request.kept
    return Scoring(
        run=hashlib.sha256(started.run.encode()).hexdigest()[:16],
        version=request.version,
        access=folder.access,
        source=replace(source, files=()),
        inputs=inputs,
        read_columns=columns_to_read(inputs, kept, source.schema.names),
        kept_columns=tuple(kept),
        input_columns=tuple(name for name in request.inputs if name not in kept),
        time=dt.datetime.fromisoformat(started.as_of),
        folder=folder,
        part_rows=config.part_rows,
        max_bad=int(config.max_bad_share * source.rows),
    )


def choose_inputs(asked: InputsFrom, signature: ModelSignature, columns: Sequence[str]) -> InputsFrom:
    """Return where the inputs come from. `auto` depends on the columns of the rows.

    Raises:
        ConfigError: The model has no feature service, or the rows have only some of its inputs.
    """
    missing = [name for name in signature.columns if name not in columns]
    if asked is InputsFrom.given or (asked is InputsFrom.auto and not missing):
        if missing:
            raise ConfigError(
                f"The rows have no column '{missing[0]}', an input of the model.{did_you_mean(missing[0], columns)} "
                "Add it, or let the command read features with inputs_from=join or inputs_from=latest."
            )
        return InputsFrom.given
    if not signature.service and not missing:
        raise ConfigError(
            f"The model has no feature service, so inputs_from={asked.value} cannot read its inputs. The rows have all "
            "of them: set inputs_from=given."
        )
    if not signature.service:
        raise ConfigError(
            f"The rows have no column '{missing[0]}', an input of the model, and the model has no feature service that "
            "it could be read from. Add it to the rows."
        )
    if asked is InputsFrom.auto and len(missing) < len(signature.columns):
        raise ConfigError(
            f"The rows have some inputs of the model, but not '{missing[0]}'. Add it, or set inputs_from=join or "
            "inputs_from=latest to read all inputs from the feature store."
        )
    return InputsFrom.join if asked is InputsFrom.auto else asked


def kept_columns(config: ScoreConfig, source: Source, ledger: Ledger, version: ModelVersion) -> list[str]:
    """Return the columns of the input that are copied to the output.

    Raises:
        ConfigError: A column is missing, or has the name of one of the output's own columns.
    """
    present = source.schema.names
    if config.keep is not None:
        require_known_columns(source, config.keep, option="keep")
        if taken := [name for name in config.keep if name in RESERVED]:
            raise ConfigError(
                f"keep: the output has a column '{taken[0]}' of its own. Rename the input's column, or leave it out."
            )
        return list(dict.fromkeys(config.keep))
    lineage = version.lineage
    if not lineage.service:
        return [name for name in present if name.endswith("_id") and name not in RESERVED]
    views = service_spec(ledger, lineage.service, lineage.service_version).views
    keys = dict.fromkeys(key for view in views for key in view.join_keys)
    return [name for name in (*keys, EVENT) if name in present and name not in RESERVED]


def output_inputs(
    config: ScoreConfig,
    signature: ModelSignature,
    source: Source,
    service: ServiceSpec | None,
    rights: Rights,
    *,
    is_protected: bool,
) -> tuple[list[str], list[str]]:
    """Return the inputs that the output has, and those that it lacks because the caller may not export them."""
    wanted = is_protected if config.keep_inputs is None else config.keep_inputs
    names = [name for name in signature.columns if name not in RESERVED] if wanted else []
    if is_protected:
        return names, []
    allowed = rights.exportable(names, service or source.service)
    return allowed, [name for name in names if name not in allowed]


def _exportable_kept(config: ScoreConfig, kept: list[str], source: Source, rights: Rights) -> list[str]:
    allowed = rights.exportable(kept, source.service)
    if config.keep is not None and (denied := [name for name in kept if name not in allowed]):
        raise ConfigError(
            f"keep: you may not write '{denied[0]}' outside the storage root. Leave it out, or write the output "
            "below the storage root, where it is encrypted."
        )
    return allowed


def choose_run(config: ScoreConfig, wanted: ScoringStarted, ledger: Ledger) -> str:
    """Return the run's id.

    Without an id in the configuration, it is that of the run in the output folder, if the run has the same settings and
    rows. Otherwise it is a new one: a hash of all that decides the rows, with a number if there was such a run before.
    """
    if config.run is not None:
        return config.run
    here = read_run(wanted.output)
    found = None if here is None else ledger.newest(ScoringStarted, run=here)
    if here is not None and found and _compared(ScoringStarted(**found.payload)) == _compared(wanted):
        return here
    base = hashlib.sha256(json.dumps(_compared(wanted), sort_keys=True).encode()).hexdigest()[:16]
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    return next(name for name in names if ledger.newest(ScoringStarted, run=name) is None)


def require_same(started: ScoringStarted, wanted: ScoringStarted) -> ScoringStarted:
    """Return the event of a run that was started before.

    Raises:
        ConfigError: The run was started with other settings or rows. The message names the setting.
    """
    before, now = _compared(started), _compared(wanted)
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"Run '{started.run}' was started with {name}={before.get(name)}, not {now[name]}. Continue it with the "
            "same settings and rows, or give another `run`."
        )
    return started


def _compared(event: ScoringStarted) -> dict[str, Any]:
    names = ("model", "version", "input", "input_hash", "output", "inputs_from", "keep")
    compared: dict[str, Any] = to_json({name: getattr(event, name) for name in names} | event.settings)
    return compared


def feature_read(
    service: ServiceSpec,
    signature: ModelSignature,
    started: ScoringStarted,
    inputs_from: InputsFrom,
    places: Layout,
    access: KeyAccess,
) -> FeatureRead:
    """Pin the tables of a service's views: the versions of the run's start, or the newest for a new run.

    Raises:
        TrainingSetError: A view has no rows, or files of a pinned version were removed.
    """
    snapshots: dict[str, Snapshot] = {}
    for view in service.views:
        pinned = started.table_versions.get(view.name)
        snapshots[view.name] = view_snapshot(view, places, access, version=pinned)
        if pinned is not None:
            require_files(snapshots[view.name], view.name)
    return FeatureRead(
        spec=service,
        snapshots=snapshots,
        needed=needed_columns(service, signature.columns),
        as_of=dt.datetime.fromisoformat(started.as_of) if inputs_from is InputsFrom.latest else None,
    )


def _require_keys(read: FeatureRead, source: Source, inputs_from: InputsFrom) -> None:
    present = source.schema.names
    names = [*read.keys, *([EVENT] if inputs_from is InputsFrom.join else [])]
    names += [one.name for transform in read.spec.on_demand for one in transform.inputs]
    for name in names:
        if name not in present:
            advice = (
                " Add the time of each row, or set inputs_from=latest to read the values of now."
                if name == EVENT
                else ""
            )
            raise ConfigError(
                f"The rows have no column '{name}', which inputs_from={inputs_from.value} needs."
                f"{did_you_mean(name, present)}{advice}"
            )


def input_plan(signature: ModelSignature, read: FeatureRead | None, source: Source) -> InputPlan:
    """Return how inputs are made, with the types of the columns of CSV."""
    types: dict[str, str] = {}
    if source.format is InputFormat.csv:
        if read is None or read.as_of is None:
            types[EVENT] = "timestamp"
        if read is None:
            types |= {spec.name: text_dtype(spec) for spec in signature.inputs}
        else:
            types |= row_keys(read.spec, read.snapshots)
            types |= {one.name: one.dtype for transform in read.spec.on_demand for one in transform.inputs}
    present = set(source.schema.names)
    return InputPlan(
        signature=signature,
        read=read,
        text_types={name: dtype for name, dtype in types.items() if name in present and dtype != "string"},
    )
