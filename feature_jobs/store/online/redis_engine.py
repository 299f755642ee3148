"""The online store's bytes in Redis, for many machines: one hash a view, read with one HMGET.

The hash holds the stamp, the meta and the rows by address, so one command gives rows and says whether they are still
the ones that were asked for. Compare-and-set runs inside Redis as a script, which nothing interrupts. A materialisation
fills a hash of its own and takes the other's name in one script; Redis frees the old one in the background. A view's
rows lie on one node, so a cluster spreads views, not entities.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from cluster.errors import OnlineStoreUnavailable
from feature_jobs.store.online.engine import Carry, Rows, Write
from feature_jobs.store.online.meta import GENERATION_BYTES, STAMP_BYTES

PIECE_ROWS = 2_000
STAGED_S = 86_400
"""What a killed materialisation left is gone after this."""
TIMEOUT_S = 5.0

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
# Bytes are compared as numbers, because Lua orders strings as the server's locale does.
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
_CHANGE = """
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
    """A Redis database.

    Args:
        url: `redis://` or `rediss://host:port/db`, with a user's name if there is one.
        prefix: in front of every key, so that one Redis can serve several installations.
        ca_file: certificate authority of its address; none takes the system's.
        password_file: a file with the password.
    """

    def __init__(self, url: str, *, prefix: str, ca_file: Path | None, password_file: Path | None) -> None:
        options: dict[str, Any] = {
            "socket_timeout": TIMEOUT_S,
            "socket_connect_timeout": TIMEOUT_S,
            # Soon, or a request waits for seconds; whatever was done already changes nothing when it is done again.
            "retry": Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.1), 3),
        }
        if ca_file is not None:
            options["ssl_ca_certs"] = str(ca_file)
        if password_file is not None:
            options["password"] = password_file.read_text().strip()
        self._url = url
        self._prefix = prefix
        self._redis = redis.Redis.from_url(url, **options)
        self._ask: Callable[..., Any] = self._redis.execute_command
        self._put = self._redis.register_script(_PUT)
        self._change = self._redis.register_script(_CHANGE)
        self._switch = self._redis.register_script(_SWITCH)

    def meta(self, view: str) -> bytes | None:
        with self._asking():
            found: bytes | None = self._ask("HGET", self._rows(view), b"m")
            return found

    def rows(self, view: str, stamp: bytes, addresses: Sequence[bytes]) -> Sequence[bytes | None] | None:
        with self._asking():
            found: list[bytes | None] = self._ask("HMGET", self._rows(view), b"s", *addresses)
        return found[1:] if found[0] == stamp else None

    def put(self, view: str, stamp: bytes, writes: Sequence[Write]) -> int | None:
        with self._asking():
            written = _cas(self._put, self._rows(view), self._recent(view), stamp, writes)
        return None if written < 0 else written

    def change(self, view: str, before: bytes | None, meta: bytes) -> bool:
        with self._asking():
            arguments = [before or b"", meta[:STAMP_BYTES], meta]
            return bool(self._change(keys=[self._rows(view)], args=arguments))

    def stage(self, view: str, generation: bytes, rows: Iterable[tuple[bytes, bytes]]) -> None:
        staged, remaining = self._staged(view, generation), iter(rows)
        while piece := list(itertools.islice(remaining, PIECE_ROWS)):
            with self._asking(), self._redis.pipeline(transaction=False) as pipeline:
                pipeline.hset(staged, items=list(itertools.chain.from_iterable(piece)))
                pipeline.expire(staged, STAGED_S)
                pipeline.execute()

    def switch(self, view: str, before: bytes | None, meta: bytes, carry: Carry) -> bool:
        generation = meta[:GENERATION_BYTES]
        rows, recent, staged = self._rows(view), self._recent(view), self._staged(view, generation)
        kept = staged + b":put"
        after = b"-inf"
        while True:
            with self._asking():
                turn = self._ask("HGET", rows, "n") or b"0"
                fresh = self._put_after(rows, recent, after) if before else ()
                lying = self._at(staged, [address for address, _ in fresh])
            beside = [(*row, there) for row, there in zip(fresh, lying, strict=True)]
            taken = [Write(address, packed) for address, packed in carry(beside)]
            with self._asking():
                if taken:
                    _cas(self._put, staged, kept, b"", taken)
                    self._redis.expire(kept, STAGED_S)
                arguments = [before or b"", turn, meta[:STAMP_BYTES], meta]
                done = self._switch(keys=[rows, recent, staged, kept], args=arguments)
            if done:
                return bool(done == 1)
            # Something was put since `turn` was read: once more, for that alone.
            after = b"(" + turn

    def close(self) -> None:
        self._redis.close()

    def _put_after(self, rows: bytes, recent: bytes, after: bytes) -> Rows:
        """The rows that were put since a turn."""
        addresses = self._ask("ZRANGEBYSCORE", recent, after, "+inf")
        found = self._at(rows, addresses)
        return [
            (address, packed) for address, packed in zip(addresses, found, strict=True) if packed is not None
        ]

    def _at(self, rows: bytes, addresses: Sequence[bytes]) -> list[bytes | None]:
        return [
            packed
            for piece in range(0, len(addresses), PIECE_ROWS)
            for packed in self._ask("HMGET", rows, *addresses[piece : piece + PIECE_ROWS])
        ]

    # The braces keep a view's keys on one node of a cluster, where a script needs them.
    def _rows(self, view: str) -> bytes:
        return f"{{{self._prefix}:online:{view}}}".encode()

    def _recent(self, view: str) -> bytes:
        return self._rows(view) + b":put"

    def _staged(self, view: str, generation: bytes) -> bytes:
        return self._rows(view) + b":" + generation.hex().encode()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except RedisError as error:
            raise OnlineStoreUnavailable(
                f"The online store at {self._url} does not do what it is asked: {error}. Is Redis up, and online.url "
                "right?"
            ) from error


def _cas(
    script: Callable[..., Any], rows: bytes, recent: bytes, stamp: bytes, writes: Sequence[Write]
) -> int:
    arguments: list[bytes] = [stamp]
    for write in writes:
        arguments += (write.address, write.packed, write.expected)
    return int(script(keys=[rows, recent], args=arguments))
