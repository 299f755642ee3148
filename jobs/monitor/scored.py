"""Read a finished run of batch scoring by columns, in the form of a served version.

The scores are in the types of the version's signature already. Outcomes come from the outcome log, by the predictions'
ids, or from a column that was copied from the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa

from cluster.errors import ConfigError, RefusedError, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.events import ScoringFinished
from cluster.records.location import outcome_log
from cluster.records.reading import INVALID_OUTCOME, OUTCOME, RESERVED_COLUMNS, exact_column, read_outcomes
from cluster.registry import Registry
from cluster.runtime import ModelSignature, OutcomeParser
from cluster.runtime.loader import load_signature
from cluster.security.encryption.parquet import ProtectedFileCorrupt
from cluster.security.keys.access import KeyAccess, key_store
from cluster.storage import Layout, exists, layout, read_bytes, resolve, sha256
from jobs.monitor.config import MonitorConfig
from jobs.monitor.logged import ScoredLog, ServedVersion
from jobs.score.files import MANIFEST, FileOfRows, Folder, Manifest, digest
from jobs.score.source import is_below

VARIANT = "batch"
"""Variant of scores that no replica gave."""
_ANSWERS = ("probability", "label", "probabilities", "value")


def read_scored(config: MonitorConfig, ledger: Ledger, access: KeyAccess) -> ScoredLog:
    """Read the scores in the folder `predictions`, with outcomes where they are known.

    Raises:
        RefusedError: The folder has no finished run of the model, or its files are not those of the run.
    """
    places = layout(config.storage)
    uri = resolve(str(config.predictions))
    manifest = read_manifest(uri, ledger, model=config.name)
    version = Registry(ledger, places).get(manifest.model, str(manifest.version))
    signature = load_signature(version, key_store(access))
    columns = columns_to_read(manifest, signature, config.outcome)
    folder = folder_of(uri, manifest, places, access)
    tables = [read_scores(folder, file, columns) for file in manifest.files]
    rows = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables)))
    rows = rows.with_columns(pl.lit(0, dtype=pl.Int64).alias("row"))
    truths = OutcomeParser(signature)
    unknown = 0
    if config.outcome is not None:
        rows = with_outcomes(rows, rows[config.outcome].to_list(), truths)
    else:
        outcomes = read_outcomes(outcome_log(places, ledger, manifest.model), key_store(access))
        rows, unknown = match_by_id(rows, outcomes, truths)
    served = ServedVersion(
        variant=VARIANT,
        version=version,
        rows=rows,
        failed=sum(manifest.set_aside.values()),
    )
    return ScoredLog(served=served, unknown_rows=unknown)


def read_manifest(uri: str, ledger: Ledger, *, model: str) -> Manifest:
    """Read the manifest of a run's output, and compare it with the ledger.

    Raises:
        RefusedError: There is none, or it is not the one of a finished run of the model.
    """
    if not exists(f"{uri}/{MANIFEST}"):
        raise ConfigError(
            f"{uri} has no {MANIFEST}, so it is no finished run of `python -m jobs.score`. Give its output folder with "
            "`predictions=…`, or run the same command again to finish it."
        )
    data = read_bytes(f"{uri}/{MANIFEST}")
    try:
        manifest = Manifest.from_bytes(data)
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{uri}/{MANIFEST} is no manifest of a run: {error!r}.") from error
    finished = ledger.newest(ScoringFinished, run=manifest.run)
    if finished is None or finished.payload["manifest_hash"] != digest(data):
        raise RefusedError(
            f"The ledger has no finished run with the manifest of {uri}. Use the unchanged output of a run of this "
            "installation."
        )
    if manifest.model != model:
        raise ConfigError(f"{uri} has scores of model '{manifest.model}', not of '{model}'.")
    return manifest


def folder_of(uri: str, manifest: Manifest, places: Layout, access: KeyAccess) -> Folder:
    """Return the folder, with the key and place of its files."""
    place = uri.removeprefix(f"{places.root.rstrip('/')}/") if is_below(uri, places.root) else ""
    return Folder(uri=uri, key=manifest.key, place=place, access=access)


def columns_to_read(manifest: Manifest, signature: ModelSignature, outcome: str | None) -> list[str]:
    """Return the columns that monitoring needs.

    Raises:
        ConfigError: The output has no column of this name for the outcomes.
    """
    if outcome is not None and outcome not in manifest.columns:
        raise ConfigError(
            f"outcome: the scores have no column '{outcome}'.{did_you_mean(outcome, manifest.columns)} Copy it from "
            "the input with `keep=…` of jobs.score."
        )
    inputs = [name for name in signature.columns if name not in RESERVED_COLUMNS]
    wanted = {"prediction_id", "as_of", *_ANSWERS, *inputs, *([outcome] if outcome else [])}
    return [name for name in manifest.columns if name in wanted]


def read_scores(folder: Folder, file: FileOfRows, columns: list[str]) -> pa.Table:
    """Read columns of a file. An encrypted file is authenticated by its key, another one by its hash.

    Raises:
        ProtectedFileCorrupt: The file is not the one that the run wrote.
    """
    if folder.key is None and sha256(f"{folder.uri}/{file.name}") != file.sha256:
        raise ProtectedFileCorrupt(
            f"{folder.uri}/{file.name} was changed since the run. Restore it from a backup, or score the rows again."
        )
    return folder.read(file.name, columns)


def match_by_id(
    rows: pl.DataFrame, outcomes: pl.DataFrame, truths: OutcomeParser
) -> tuple[pl.DataFrame, int]:
    """Add outcomes by the predictions' ids. Return the rows, and the number of outcomes of unknown rows.

    An outcome of a scored row has row 0, because each row has an id of its own.
    """
    ours = outcomes.filter(pl.col("prediction_id").is_in(rows["prediction_id"].to_list()))
    of_rows = ours.filter(pl.col("row") == 0)
    known = dict(zip(of_rows["prediction_id"].to_list(), of_rows["outcome"].to_list(), strict=True))
    values = [known.get(name) for name in rows["prediction_id"].to_list()] if known else [None] * rows.height
    return with_outcomes(rows, values, truths), ours.height - of_rows.height


def with_outcomes(rows: pl.DataFrame, values: Sequence[object], truths: OutcomeParser) -> pl.DataFrame:
    """Add the columns `outcome`, and `odd_outcome`: whether the value is no class or number of the model."""
    parsed = [None if value is None else truths.parse(value) for value in values]
    invalid = [value is not None and one is None for value, one in zip(values, parsed, strict=True)]
    return rows.with_columns(
        exact_column(OUTCOME, parsed), pl.Series(INVALID_OUTCOME, invalid, dtype=pl.Boolean)
    )
