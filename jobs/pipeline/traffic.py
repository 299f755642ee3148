"""`python -m jobs.pipeline.traffic`: a client that scores people through the edge, one request each.

It uses what any application has: the edge's address, its CA certificate and a token. Answers go to a Parquet file with
each person's prediction id, so that outcomes can be posted later.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from dataclasses import dataclass

import aiohttp
import polars as pl
import xxhash

from cluster.entrypoint import job
from cluster.errors import Inconsistent, SourceError
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord, require_record
from cluster.settings import PlatformConfig
from cluster.storage import exists, layout, read_parquet, resolve, write_parquet

SECONDS_TO_TRY = 60


@dataclass(kw_only=True, slots=True)
class TrafficConfig(PlatformConfig):
    """Who is scored, and when."""

    name: str = "employment"
    """Of the model."""
    people: str = "???"
    """Parquet with the entity key and `event_timestamp`."""
    key: str = "person_id"
    as_of: str = "???"
    """ISO 8601 instant at which features are read."""
    requests: int = 4000
    offset: int = 0
    """People passed over before the first request."""
    connections: int = 16
    answers: str = "???"
    """Parquet to write: key, prediction_id, variant, status, latency_ms."""
    purpose: str = "employment_statistics"

    def __post_init__(self) -> None:
        if self.requests < 1 or self.connections < 1:
            raise ValueError("requests and connections must be at least 1.")


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's end."""

    key: int
    prediction_id: str | None
    variant: str | None
    status: int
    latency_ms: float


def choose(people: pl.DataFrame, *, key: str, offset: int, count: int) -> list[int]:
    """People in an order that does not depend on the file's: by a hash of their key."""
    return sorted(people[key], key=lambda value: xxhash.xxh32_intdigest(str(value).encode()))[
        offset : offset + count
    ]


@job("traffic", TrafficConfig)
def main(config: TrafficConfig) -> None:
    """Send the requests, write the answers, say what came back."""
    people_uri = resolve(config.people)
    if not exists(people_uri):
        raise SourceError(f"No people at {people_uri}. Run `python -m feature_jobs.census.source` first.")
    people = pl.DataFrame(pl.from_arrow(read_parquet(people_uri)))
    keys = choose(people, key=config.key, offset=config.offset, count=config.requests)
    started = time.perf_counter()
    answers = asyncio.run(_send(config, keys))
    seconds = time.perf_counter() - started
    frame = pl.DataFrame(answers).rename({"key": config.key})
    write_parquet(frame.to_arrow(), resolve(config.answers))
    statuses = Counter(answer.status for answer in answers)
    print(
        f"sent {len(answers)} requests in {seconds:.1f} s ({len(answers) / seconds:.0f}/s), statuses {dict(statuses)}"
    )
    if statuses[200] != len(answers):
        raise Inconsistent(
            f"{len(answers) - statuses[200]} of {len(answers)} requests failed; see {config.answers}."
        )


async def _send(config: TrafficConfig, keys: list[int]) -> list[Answer]:
    record = require_record(config)
    context = ssl.create_default_context(cafile=f"{layout(config.storage).tls}/ca.pem")
    token = mint_token(
        layout(config.storage), subject="demo-app", role=Role.service, purpose=config.purpose, ttl_s=900
    )
    todo = iter(keys)
    answers: list[Answer] = []
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context, limit=config.connections),
        headers={"Authorization": f"Bearer {token}"},
        timeout=aiohttp.ClientTimeout(total=SECONDS_TO_TRY),
    ) as client:

        async def work() -> None:
            for key in todo:
                answers.append(await _ask(client, record, config, key))
                if len(answers) % 1000 == 0:
                    print(f"{len(answers)} of {len(keys)} answered", flush=True)

        await asyncio.gather(*(work() for _ in range(config.connections)))
    return answers


async def _ask(
    client: aiohttp.ClientSession, record: ClusterRecord, config: TrafficConfig, key: int
) -> Answer:
    url = f"{record.edge_url}/v1/models/{config.name}:predict"
    body = {"entities": [{config.key: key}], "as_of": config.as_of}
    started = time.perf_counter()
    async with client.post(url, json=body, headers={"X-Unit-ID": str(key)}) as response:
        content = await response.json(content_type=None)
        latency_ms = (time.perf_counter() - started) * 1000
        ok = response.status == 200
        return Answer(
            key=key,
            prediction_id=content["prediction_id"] if ok else None,
            variant=content["variant"] if ok else None,
            status=response.status,
            latency_ms=latency_ms,
        )


if __name__ == "__main__":
    main()
