"""Load the view and the source for a command that reads batches."""

from __future__ import annotations

from cluster.errors import DefinitionError, SourceError
from cluster.ledger import Ledger
from cluster.placement import Selector, find_nodes
from cluster.session import attach
from cluster.settings import PlatformConfig
from cluster.storage import is_uri, resolve
from feature_jobs.store.catalog.specifications import ViewSpec, load_definitions, view_spec
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.definitions.sources import BatchSource, FileSource, from_path
from feature_jobs.store.definitions.views import FeatureView


def applied_view(definitions: str, name: str, ledger: Ledger) -> tuple[FeatureView, ViewSpec]:
    """Load a view from its module and its specification from the ledger. Their versions must be equal.

    Args:
        definitions: The module of definitions.
        name: The view's name.
        ledger: The ledger.

    Raises:
        DefinitionError: The view was not applied, or was changed after it was applied.
    """
    view = load_definitions(definitions).view(name)
    spec = view_spec(ledger, view.name)
    if spec.version != view.version:
        raise DefinitionError(
            f"View '{view.name}' was changed after it was applied. "
            f"Run `python -m feature_jobs.apply definitions={definitions}`."
        )
    return view, spec


def batch_source(view: FeatureView, path: str | None) -> BatchSource:
    """Return the source of a batch: the file that the command names, or else the view's own source.

    Args:
        view: The view.
        path: Path of a file that replaces the view's source, or None.

    Raises:
        SourceError: The view's source is a Kafka topic, which has no end.
    """
    if path is not None:
        return from_path(view.source, path)
    if isinstance(view.source, KafkaSource):
        raise SourceError(
            f"View '{view.name}' has a Kafka topic as its source. Run `python -m feature_jobs.stream source=kafka "
            f"view={view.name}`, or give files with `source.path=…`."
        )
    return view.source


def attach_for_tasks(config: PlatformConfig, source: BatchSource) -> Selector:
    """Attach to Ray, and return where tasks may run: on this node only if they read files of its disk.

    Raises:
        ConfigError: no node may run them.
    """
    attach(config)
    reads_disk = isinstance(source, FileSource) and not is_uri(resolve(source.path))
    return find_nodes(config.placement, on_this_node="it reads files of this machine" if reads_disk else None)
