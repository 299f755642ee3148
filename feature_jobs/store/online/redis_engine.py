"""The Redis engine of the online store, for many machines: one hash for each view, read with one HMGET.

The hash has the stamp, the meta, and the rows by address. So one command returns rows and the stamp that they belong
to. Compare-and-set runs in Redis as a script, which is atomic. A materialisation fills a hash of its own, and one
script renames it to the view's name; Redis frees the old hash in the background. All rows of a view are on one node, so
a Redis cluster distributes views, not entities.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from cluster.errors import OnlineStoreUnavailable
from feature_jobs.store.online.engine import Carry, RecentRow, Rows, Write
from feature_jobs.store.online.meta import GENERATION_BYTES, STAMP_BYTES

PIECE_ROWS = 2_000
"""Number of rows in one command."""
STAGED_S = 86_400
"""Seconds after which Redis deletes the staged rows of a killed materialisation."""
TIMEOUT_S = 5.0
"""Timeout in seconds of a connection and of a command."""
FAST_TIMEOUT_S = 1.0
"""The same in a replica. A replica's health check has a timeout of 1 s, and only its second failure counts."""

_NEWER = """
local function newer(one, other)
  local a = {struct.unpack('>I4I4I4I4I4I4', one)}
  local b = {struct.unpack('>I4I4I4I4I4I4', other)}
  for i = 1, 6 do
    if a[i] ~= b[i] then return a[i] > b[i] end
  end
  return false
end
"""
# The script compares ranks as numbers, because Lua compares strings by the server's locale.
_PUT = f"""{_NEWER}
if ARGV[1] ~= '' and redis.call('HGET', KEYS[1], 's') ~= ARGV[1] then return -1 end
local turn = redis.call('HINCRBY', KEYS[1], 'n', 1)
local written = 0
for i = 2, #ARGV, 3 do
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  local fits
  if ARGV[i + 2] ~= '' then
    fits = (old and string.sub(old, 1, 24) or '\\0') == ARGV[i + 2]
  else
    fits = not old or newer(ARGV[i + 1], old)
  end
  if fits then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    redis.call('ZADD', KEYS[2], turn, ARGV[i])
    written = written + 1
  end
end
return written
"""
_SET_META = """
if (redis.call('HGET', KEYS[1], 's') or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 's', ARGV[2], 'm', ARGV[3])
return 1
"""
_SWITCH = """
if (redis.call('HGET', KEYS[1], 's') or '') ~= ARGV[1] then return -1 end
if (redis.call('HGET', KEYS[1], 'n') or '0') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[3], 's', ARGV[3], 'm', ARGV[4], 'n', ARGV[2])
redis.call('PERSIST', KEYS[3])
redis.call('UNLINK', KEYS[1], KEYS[2])
redis.call('RENAME', KEYS[3], KEYS[1])
if redis.call('EXISTS', KEYS[4]) == 1 then
  redis.call('PERSIST', KEYS[4])
  redis.call('RENAME', KEYS[4], KEYS[2])
end
return 1
"""


class RedisEngine:
    """An engine on a Redis database.

    Args:
        url: `redis://` or `rediss://host:port/db`, with the user name if Redis needs one.
        prefix: first part of every key, so that several installations can share one Redis.
        ca_file: certificate authority of the server's certificate; None for the system's authorities.
        password_file: file with the password; None for no password.
        fails_fast: use a short timeout, because the event loop of a replica waits for the answer. Retry a command only
            once, after a connection that was closed.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        ca_file: Path | None,
        password_file: Path | None,
        fails_fast: bool = False,
    ) -> None:
        timeout_s = FAST_TIMEOUT_S if fails_fast else TIMEOUT_S
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            # A repeated command changes nothing.
            "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
            if fails_fast
            else Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.1), 3),
        }
        if ca_file is not None:
            options["ssl_ca_certs"] = str(ca_file)
        if password_file is not None:
            options["password"] = password_file.read_text().strip()
        self._url = url
        self._prefix = prefix
        self._redis = redis.Redis.from_url(url, **options)
        self._execute: Callable[..., Any] = self._redis.execute_command
        self._put = self._redis.register_script(_PUT)
        self._set_meta = self._redis.register_script(_SET_META)
        self._switch = self._redis.register_script(_SWITCH)

    def meta(self, view: str) -> bytes | None:
        with self._errors():
            packed: bytes | None = self._execute("HGET", self._rows(view), b"m")
            return packed

    def rows(self, view: str, stamp: bytes, addresses: Sequence[bytes]) -> Sequence[bytes | None] | None:
        with self._errors():
            values: list[bytes | None] = self._execute("HMGET", self._rows(view), b"s", *addresses)
        return values[1:] if values[0] == stamp else None

    def put(self, view: str, stamp: bytes, writes: Sequence[Write]) -> int | None:
        with self._errors():
            written = _compare_and_set(self._put, self._rows(view), self._recent(view), stamp, writes)
        return None if written < 0 else written

    def set_meta(self, view: str, expected: bytes | None, meta: bytes) -> bool:
        with self._errors():
            arguments = [expected or b"", meta[:STAMP_BYTES], meta]
            return bool(self._set_meta(keys=[self._rows(view)], args=arguments))

    def stage(self, view: str, generation: bytes, rows: Iterable[tuple[bytes, bytes]]) -> None:
        staged, remaining = self._staged(view, generation), iter(rows)
        while piece := list(itertools.islice(remaining, PIECE_ROWS)):
            with self._errors(), self._redis.pipeline(transaction=False) as pipeline:
                pipeline.hset(staged, items=list(itertools.chain.from_iterable(piece)))
                pipeline.expire(staged, STAGED_S)
                pipeline.execute()

    def switch(self, view: str, expected: bytes | None, meta: bytes, carry: Carry) -> bool:
        generation = meta[:GENERATION_BYTES]
        rows, recent, staged = self._rows(view), self._recent(view), self._staged(view, generation)
        staged_recent = staged + b":put"
        after = b"-inf"
        while True:
            with self._errors():
                turn = self._execute("HGET", rows, "n") or b"0"
                fresh = self._put_after(rows, recent, after) if expected else ()
                staged_rows = self._at(staged, [address for address, _ in fresh])
            recent_rows = [RecentRow(*row, other) for row, other in zip(fresh, staged_rows, strict=True)]
            carried = [Write(address, packed) for address, packed in carry(recent_rows)]
            with self._errors():
                if carried:
                    _compare_and_set(self._put, staged, staged_recent, b"", carried)
                    self._redis.expire(staged_recent, STAGED_S)
                arguments = [expected or b"", turn, meta[:STAMP_BYTES], meta]
                result = self._switch(keys=[rows, recent, staged, staged_recent], args=arguments)
            if result:
                return bool(result == 1)
            # Rows were put after `turn` was read. Try again, with those rows only.
            after = b"(" + turn

    def close(self) -> None:
        self._redis.close()

    def _put_after(self, rows: bytes, recent: bytes, after: bytes) -> Rows:
        """Return address and row of the rows that were put after the write with this number."""
        addresses = self._execute("ZRANGEBYSCORE", recent, after, "+inf")
        stored = self._at(rows, addresses)
        return [
            (address, packed) for address, packed in zip(addresses, stored, strict=True) if packed is not None
        ]

    def _at(self, rows: bytes, addresses: Sequence[bytes]) -> list[bytes | None]:
        return [
            packed
            for piece in range(0, len(addresses), PIECE_ROWS)
            for packed in self._execute("HMGET", rows, *addresses[piece : piece + PIECE_ROWS])
        ]

    # The braces keep all keys of a view on one node of a cluster. Scripts need that.
    def _rows(self, view: str) -> bytes:
        return f"{{{self._prefix}:online:{view}}}".encode()

    def _recent(self, view: str) -> bytes:
        return self._rows(view) + b":put"

    def _staged(self, view: str, generation: bytes) -> bytes:
        return self._rows(view) + b":" + generation.hex().encode()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise OnlineStoreUnavailable for an error of Redis."""
        try:
            yield
        except RedisError as error:
            raise OnlineStoreUnavailable(
                f"The online store at {self._url} failed: {error}. Check that Redis runs and that online.url is right."
            ) from error


def _compare_and_set(
    script: Callable[..., Any], rows: bytes, recent: bytes, stamp: bytes, writes: Sequence[Write]
) -> int:
    arguments: list[bytes] = [stamp]
    for write in writes:
        arguments += (write.address, write.packed, write.expected)
    return int(script(keys=[rows, recent], args=arguments))
