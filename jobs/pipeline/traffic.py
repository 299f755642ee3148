"""`python -m jobs.pipeline.traffic`: a client that scores people through the edge, one request per person.

It writes the answers to a Parquet file with each person's prediction id, so that outcomes can be posted later.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import aiohttp
import polars as pl
import xxhash

from cluster.entrypoint import job
from cluster.errors import ConfigError, Inconsistent, SourceError, did_you_mean
from cluster.settings import PlatformConfig
from cluster.storage import exists, read_parquet, resolve, write_parquet
from jobs.pipeline.census.client import edge_access

REQUEST_TIMEOUT_S = 60
EntityKey = int | str
"""Value of the entity key."""


@dataclass(kw_only=True, slots=True)
class TrafficConfig(PlatformConfig):
    """Configuration of one run of the scoring client."""

    name: str = "???"
    """Model name."""
    people: str = "???"
    """Parquet file with the entity key and `event_timestamp`."""
    key: str = "???"
    """Entity key column."""
    as_of: str = "???"
    """ISO 8601 time at which features are read."""
    requests: int = 4000
    """Number of requests."""
    offset: int = 0
    """Number of people to skip before the first request."""
    connections: int = 16
    """Number of parallel connections."""
    answers: str = "???"
    """Parquet file to write: key, prediction_id, variant, status, latency_ms."""
    purpose: str = ""
    """Purpose of the client's token."""

    def __post_init__(self) -> None:
        if self.requests < 1 or self.connections < 1:
            raise ValueError("requests and connections must be at least 1.")


@dataclass(frozen=True, slots=True)
class Answer:
    """Response to one request."""

    key: EntityKey
    prediction_id: str | None
    """None if the request failed."""
    variant: str | None
    """None if the request failed."""
    status: int
    latency_ms: float


def choose_people(people: pl.DataFrame, *, key: str, offset: int, count: int) -> list[EntityKey]:
    """Return the keys of `count` people. They are ordered by a hash, so that the order in the file has no influence."""
    return sorted(people[key], key=lambda value: xxhash.xxh32_intdigest(str(value).encode()))[
        offset : offset + count
    ]


def answers_frame(answers: Sequence[Answer], *, key: str, key_type: pl.DataType) -> pl.DataFrame:
    """Return the answers as a table, in which the key has its type from the file of people.

    No type is guessed from the values, because the first answers may all be failures.
    """
    columns: dict[str, pl.DataType] = {
        "key": key_type,
        "prediction_id": pl.String(),
        "variant": pl.String(),
        "status": pl.Int64(),
        "latency_ms": pl.Float64(),
    }
    rows = [asdict(answer) for answer in answers]
    return pl.DataFrame(rows, schema=columns).rename({"key": key})


@job("traffic", TrafficConfig)
def main(config: TrafficConfig) -> None:
    """Send the requests, write the answers and print the statuses."""
    people_uri = resolve(config.people)
    if not exists(people_uri):
        raise SourceError(f"{people_uri} does not exist. Name a Parquet file with people=…")
    people = pl.DataFrame(pl.from_arrow(read_parquet(people_uri)))
    if config.key not in people.columns:
        raise ConfigError(
            f"{people_uri} has no column '{config.key}'.{did_you_mean(config.key, people.columns)}"
        )
    keys = choose_people(people, key=config.key, offset=config.offset, count=config.requests)
    started = time.perf_counter()
    answers = asyncio.run(_send(config, keys))
    seconds = time.perf_counter() - started
    frame = answers_frame(answers, key=config.key, key_type=people.schema[config.key])
    write_parquet(frame.to_arrow(), resolve(config.answers))
    statuses = Counter(answer.status for answer in answers)
    print(
        f"sent {len(answers)} requests in {seconds:.1f} s ({len(answers) / seconds:.0f}/s), statuses {dict(statuses)}"
    )
    if statuses[200] != len(answers):
        raise Inconsistent(
            f"{len(answers) - statuses[200]} of {len(answers)} requests failed; see {config.answers}."
        )


async def _send(config: TrafficConfig, keys: list[EntityKey]) -> list[Answer]:
    """Score all people over `config.connections` parallel connections."""
    access = edge_access(config, purpose=config.purpose)
    url = f"{access.url}/v1/models/{config.name}:predict"
    remaining = iter(keys)
    answers: list[Answer] = []
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=access.ssl_context, limit=config.connections),
        headers=access.headers,
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    ) as client:

        async def score_remaining() -> None:
            for key in remaining:
                answers.append(await _predict(client, url, config, key))
                if len(answers) % 1000 == 0:
                    print(f"{len(answers)} of {len(keys)} answered", flush=True)

        await asyncio.gather(*(score_remaining() for _ in range(config.connections)))
    return answers


async def _predict(client: aiohttp.ClientSession, url: str, config: TrafficConfig, key: EntityKey) -> Answer:
    """Send the request of one person."""
    body = {"entities": [{config.key: key}], "as_of": config.as_of}
    started = time.perf_counter()
    async with client.post(url, json=body, headers={"X-Unit-ID": str(key)}) as response:
        content = await response.json(content_type=None)
        latency_ms = (time.perf_counter() - started) * 1000
        is_ok = response.status == 200
        return Answer(
            key=key,
            prediction_id=content["prediction_id"] if is_ok else None,
            variant=content["variant"] if is_ok else None,
            status=response.status,
            latency_ms=latency_ms,
        )


if __name__ == "__main__":
    main()
