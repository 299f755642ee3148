"""Where Ray's GCS keeps the state of the cluster: on the head's machine, or in Redis.

In Redis the state outlives the head. After a crash of the head, its nodes and their replicas continue, and the next
head takes them over.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.host.names import require_redis_url

REDIS_PORT = 6379


@dataclass(kw_only=True, slots=True)
class GcsConfig:
    """Configuration of the state of Ray's GCS."""

    url: str | None = None
    """`redis://host:port`, or `rediss://host:port` with TLS, and with a user name if Redis needs one. Null keeps the
    state on the head's machine."""
    password_file: str | None = None
    """File with the password of Redis, mode 0600."""
    ca_file: str | None = None
    """File with the certificate authority of the Redis server; null is the system's authorities."""

    def __post_init__(self) -> None:
        if self.url is None:
            return
        require_redis_url("cluster.gcs", self.url)
        parts = urlsplit(self.url)
        if not parts.hostname or parts.path not in ("", "/", "/0"):
            raise ValueError(
                f"cluster.gcs.url must be redis://host:port with database 0, which is Ray's, got '{self.url}'."
            )

    @property
    def address(self) -> str:
        """The address as Ray takes it: a URL without a user name."""
        parts = urlsplit(self.url or "")
        return f"{parts.scheme}://{parts.hostname}:{parts.port or REDIS_PORT}"

    @property
    def user(self) -> str:
        """Name of the user of Redis; empty for the default user."""
        return urlsplit(self.url or "").username or ""
