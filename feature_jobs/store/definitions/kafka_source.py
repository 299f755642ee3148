"""A Kafka topic as a view's source, with one JSON object per message."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from typing import Any

from cluster.errors import DefinitionError
from feature_jobs.store.types.instants import validate_zone

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


@dataclass(frozen=True, slots=True)
class KafkaSource:
    """A topic that `python -m feature_jobs.stream source=kafka` reads.

    Times in a message are ISO 8601 text, or whole milliseconds since 1970, as in Kafka's own timestamps. Credentials
    are not part of a definition: they are in the file that `kafka.properties_file` names.
    """

    bootstrap_servers: str
    topic: str
    _: KW_ONLY
    event_timestamp: str
    """Field with the event time: when the values were true in the world."""
    created_timestamp: str | None = None
    """Field with the created time: when the source knew the values."""
    deleted: str | None = None
    """Bool field that is true for tombstones."""
    zone: str | None = None
    """Time zone of times in text without a zone. None means UTC. Milliseconds since 1970 are always UTC."""

    def __post_init__(self) -> None:
        if not self.bootstrap_servers or not _TOPIC.fullmatch(self.topic):
            raise DefinitionError(
                f"KafkaSource needs 'host:port' of brokers and a topic's name, got {self.bootstrap_servers!r} and "
                f"{self.topic!r}."
            )
        if not self.event_timestamp:
            raise DefinitionError(f"KafkaSource('{self.topic}') needs event_timestamp, the name of a field.")
        validate_zone(self.zone, f"KafkaSource('{self.topic}')")
        if self.deleted in ("", self.event_timestamp, self.created_timestamp or self.event_timestamp):
            raise DefinitionError(f"KafkaSource('{self.topic}'): deleted must name a bool field of its own.")
        if self.created_timestamp == self.event_timestamp:
            object.__setattr__(self, "created_timestamp", None)

    @property
    def path(self) -> str:
        """The topic as one URL-like word, as definitions record it."""
        return f"kafka://{self.bootstrap_servers}/{self.topic}"

    @property
    def columns(self) -> dict[str, str]:
        """Dtypes of fields that the view does not declare. Always empty: such fields have JSON's own types."""
        return {}

    def definition(self) -> dict[str, Any]:
        """Return the source as the ledger records it."""
        return {
            "path": self.path,
            "event_timestamp": self.event_timestamp,
            "created_timestamp": self.created_timestamp,
            **({} if self.deleted is None else {"deleted": self.deleted}),
            **({} if self.zone is None else {"zone": self.zone}),
        }
