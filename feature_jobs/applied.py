"""What a command over batches starts from: the view as it was applied, and its source."""

from __future__ import annotations

from cluster.errors import DefinitionError, SourceError
from cluster.ledger import Ledger
from feature_jobs.store.catalog.specifications import ViewSpec, load_definitions, view_spec
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.definitions.sources import BatchSource, from_path
from feature_jobs.store.definitions.views import FeatureView


def applied_view(definitions: str, name: str, ledger: Ledger) -> tuple[FeatureView, ViewSpec]:
    """The view as its module defines it and as it was applied, which is the same.

    Raises:
        DefinitionError: it was not applied, or was changed since.
    """
    view = load_definitions(definitions).view(name)
    spec = view_spec(ledger, view.name)
    if spec.version != view.version:
        raise DefinitionError(
            f"View '{view.name}' was changed since it was applied. "
            f"Run `python -m feature_jobs.apply definitions={definitions}`."
        )
    return view, spec


def given_source(view: FeatureView, path: str | None) -> BatchSource:
    """The view's own source, or the file that the command names in its place.

    Raises:
        SourceError: its own is a topic, which has no end.
    """
    if path is not None:
        return from_path(view.source, path)
    if isinstance(view.source, KafkaSource):
        raise SourceError(
            f"View '{view.name}' has a topic as its source. Run `python -m feature_jobs.stream source=kafka "
            f"view={view.name}`, or give files with `source.path=…`."
        )
    return view.source
