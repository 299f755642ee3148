"""Client of the feature store for notebooks and scripts: build training sets and read features online.

    store = FeatureStore.attach(purpose="credit_scoring")
    train = store.training_set("credit", people).to_polars()
    now = store.read("credit", [{"customer_id": 7}]).to_pandas()

The client works like a job: it finds the running cluster in the same way, has an intent of its own, is subject to the
same policies, and records the same events.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from cluster.command_line import named_options
from cluster.entrypoint import compose_platform
from cluster.errors import InvalidRequest, TrainingSetError
from cluster.ledger import Ledger, open_ledger
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster, use_recorded_places
from cluster.settings import PlatformConfig
from cluster.storage import layout, resolve, write_bytes
from feature_jobs.materialize import parse_as_of
from feature_jobs.store.catalog.lifecycle import read_lifecycles, require_not_retired
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ServiceSpec, service_spec
from feature_jobs.store.offline.row_hash import row_hash
from feature_jobs.store.on_demand import add_on_demand
from feature_jobs.store.online.reader import FeatureReader, open_online_store
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.types.dtypes import to_arrow
from feature_jobs.store.types.key_types import describe_key_type, key_type_of
from feature_jobs.training_set import (
    Request,
    TrainingSetConfig,
    built_event,
    join_entities,
    manifest_path,
    write_training_set,
)

if TYPE_CHECKING:
    import pandas as pd

Entities = Any
"""A table of Arrow, Polars or pandas."""
ENTRYPOINT = "feature_jobs.client"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A table that can be converted to Arrow, Polars or pandas."""

    table: pa.Table

    def to_arrow(self) -> pa.Table:
        """Return the rows as an Arrow table, without a copy."""
        return self.table

    def to_polars(self) -> pl.DataFrame:
        """Return the rows as a Polars frame, without a copy if the types allow it."""
        return pl.DataFrame(pl.from_arrow(self.table))

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a pandas frame.

        Whole numbers and bools have nullable dtypes, so that large numbers stay exact beside nulls. Times keep their
        microseconds. Dates, decimals, bytes and text are Python objects, and a list is a NumPy array.
        """
        import pandas as pd  # imported here because the import is slow

        nullable = {
            pa.bool_(): pd.BooleanDtype(),
            **{pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype()},
            **{pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()},
            **{pa.uint8(): pd.UInt8Dtype(), pa.uint16(): pd.UInt16Dtype()},
            **{pa.uint32(): pd.UInt32Dtype(), pa.uint64(): pd.UInt64Dtype()},
        }
        return self.table.to_pandas(types_mapper=nullable.get)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSet(Rows):
    """Entity rows with their features."""

    manifest: dict[str, Any]
    spec: ServiceSpec
    store: FeatureStore

    def save(self, path: str) -> None:
        """Write the rows as a Parquet file, and the manifest beside it, for `jobs.train`."""
        self.store.save(self, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineFeatures(Rows):
    """Online features of some entities, in the order of the request."""

    status: dict[str, list[str]]
    """`<view>__<feature>` to one status per entity: present, null, missing, expired or newer."""


class FeatureStore:
    """The feature store of a running cluster, used by one principal."""

    def __init__(self, config: PlatformConfig, ledger: Ledger, actor: Actor) -> None:
        """Create a client from its parts. Use `attach` instead."""
        self._config = config
        self._ledger = ledger
        self._actor = actor
        self._paths = layout(config.storage)

    @classmethod
    def attach(
        cls,
        *overrides: str,
        purpose: str | None = None,
        role: str | None = None,
        token_file: str | None = None,
        storage_root: str | None = None,
    ) -> FeatureStore:
        """Connect to the running cluster.

        Args:
            overrides: Configuration as on a command line, such as "tier=enterprise_gpu".
            purpose: The purpose that the data is used for.
            role: The role of the machine's user, if the development issuer issues the token.
            token_file: File with an intent or a token, to use instead of the development issuer.
            storage_root: The project's storage root. By default, that of the working directory or the environment.

        Raises:
            ClusterNotRunning: No cluster is running.
            Unauthenticated, ConfigError: The token is invalid.
        """
        config = compose_platform(overrides)
        identity = config.identity
        identity.purpose = identity.purpose if purpose is None else purpose
        identity.role = identity.role if role is None else role
        identity.token_file = identity.token_file if token_file is None else token_file
        config.storage.root = config.storage.root if storage_root is None else storage_root
        use_recorded_places(config, given=named_options(overrides))
        record = require_running_cluster(config)
        ledger = open_ledger(config)
        return cls(config, ledger, create_actor(config, record, ledger, entrypoint=ENTRYPOINT))

    def training_set(self, service: str, entities: Entities, *, cutoff: bool = True) -> TrainingSet:
        """Build a training set and record it in the ledger.

        Args:
            service: Name of the feature service. Its newest version is used.
            entities: Join keys, `event_timestamp` (UTC if it has no zone), and any other columns.
            cutoff: Whether to leave out values that were created after an entity row's time.

        Returns:
            The entity rows in their order: their own columns, then one column `<view>__<feature>` per feature.

        Raises:
            AccessDenied: A view may not be read. The denial is recorded in the ledger.
            TrainingSetError: The entity rows cannot be joined.
            FeatureServiceNotFound: The service was not applied.
            ViewRetired: A view of the service is retired.
        """
        spec = service_spec(self._ledger, service)
        self._check(Action.build_training_set, spec)
        views = [view.name for view in spec.views]
        require_not_retired(read_lifecycles(self._ledger), views, doing="No new training set is built.")
        rows = _arrow(entities)
        config = self._training_config(service, cutoff=cutoff)
        request = Request(spec=spec, entities=None, cutoff=cutoff, versions={})
        table, manifest = join_entities(config, request, rows, row_hash(rows), access=self._actor.access)
        event = built_event(manifest, "", None)
        manifest["seq"] = self._ledger.append(event, actor=self._actor.name).seq
        return TrainingSet(table=table, manifest=manifest, spec=spec, store=self)

    def save(self, training_set: TrainingSet, path: str) -> None:
        """Write a training set. See `TrainingSet.save`."""
        output = resolve(path)
        access = self._actor.access
        write_training_set(training_set.table, output, training_set.spec, places=self._paths, access=access)
        write_bytes(manifest_path(output), json.dumps(training_set.manifest, indent=1).encode())

    def read(
        self,
        service: str,
        entities: Sequence[Mapping[str, Any]],
        *,
        as_of: dt.datetime | str | None = None,
        features: Mapping[str, Sequence[Any]] | None = None,
    ) -> OnlineFeatures:
        """Read the online features of entities. Missing values stay null: defaults are not filled in.

        Args:
            service: Name of the feature service. Its newest version is used.
            entities: The join keys of each entity.
            as_of: The time at which TTL is applied, by default now. A time without a zone is UTC. The online store has
                only one row per entity. If this row became known after `as_of`, its status is `newer`. To get the
                values of an earlier time, build a training set.
            features: Inputs of on-demand transforms, with one value per entity. Without them, on-demand features are
                left out.

        Raises:
            AccessDenied: A view may not be read. The denial is recorded in the ledger.
            InvalidRequest: An entity lacks a key, or an input is missing.
        """
        spec = service_spec(self._ledger, service)
        self._check(Action.read_online, spec)
        entities = keys_of(entities)
        read_time = parse_as_of(as_of.isoformat() if isinstance(as_of, dt.datetime) else as_of)
        vectors = FeatureReader(spec, self._online).read(entities, read_time)
        dtypes = spec.dtypes
        on_demand = [name for transform in spec.on_demand for name in transform.columns]
        if features is not None:
            add_on_demand(spec, vectors, features, on_demand)
        else:
            dtypes = {name: dtype for name, dtype in dtypes.items() if name not in on_demand}
        keys = {key: [entity.get(key) for entity in entities] for entity in entities[:1] for key in entity}
        columns = {name: to_arrow(vectors.columns[name], dtype) for name, dtype in dtypes.items()}
        statuses = {name: [str(status) for status in vectors.status[name]] for name in dtypes}
        return OnlineFeatures(table=pa.table(keys | columns), status=statuses)

    def close(self) -> None:
        """Close the online store and the ledger."""
        if "_online" in self.__dict__:
            self._online.close()
        self._ledger.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @functools.cached_property
    def _online(self) -> OnlineStore:
        return open_online_store(self._config.online, self._paths, key_store(self._actor.access))

    def _check(self, action: Action, spec: ServiceSpec) -> None:
        region = self._config.cluster.region
        for view in spec.views:
            self._actor.check(action, *view_resources(view, region=region))

    def _training_config(self, service: str, *, cutoff: bool) -> TrainingSetConfig:
        platform = {each.name: getattr(self._config, each.name) for each in fields(PlatformConfig)}
        return TrainingSetConfig(**platform, service=service, entities="in memory", output="", cutoff=cutoff)


def keys_of(entities: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the entities' keys as Python values. Values of NumPy and pandas are converted.

    Raises:
        InvalidRequest: A key is neither text nor a 64-bit whole number.
    """
    plain = []
    for position, entity in enumerate(entities):
        keys = {key: value.item() if hasattr(value, "item") else value for key, value in entity.items()}
        for key, value in keys.items():
            if value is not None and key_type_of(value) is None:
                raise InvalidRequest(
                    f"entities[{position}].{key} must be {describe_key_type(None)}, got {value!r}."
                )
        plain.append(keys)
    return plain


def _arrow(entities: Entities) -> pa.Table:
    """Convert entity rows to an Arrow table.

    Raises:
        TrainingSetError: `entities` is not a table, or has no rows.
    """
    match entities:
        case pa.Table():
            table = entities
        case pl.DataFrame():
            table = entities.to_arrow()
        case _ if hasattr(entities, "columns"):
            table = pa.Table.from_pandas(entities, preserve_index=False)
        case _:
            raise TrainingSetError(
                f"Entity rows must be a table of Arrow, Polars or pandas, got {type(entities).__name__}."
            )
    if table.num_rows == 0:
        raise TrainingSetError("The table of entity rows is empty. Give at least one row.")
    return table
