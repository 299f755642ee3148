"""`python -m jobs.pipeline.outcomes`: post the true outcomes of the people that were scored."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp
import polars as pl

from cluster.entrypoint import job
from cluster.errors import Inconsistent, SourceError
from cluster.settings import PlatformConfig
from cluster.storage import exists, read_parquet, resolve
from jobs.pipeline.census.client import edge_access

BATCH_SIZE = 500
"""Outcomes per request."""


@dataclass(kw_only=True, slots=True)
class OutcomesConfig(PlatformConfig):
    """Configuration of one run of the outcome client."""

    name: str = "???"
    """Model name."""
    answers: str = "???"
    """Parquet file that `jobs.pipeline.traffic` wrote."""
    people: str = "???"
    """Parquet file with the entity key and the true label."""
    key: str = "???"
    """Entity key column."""
    label: str = "???"
    """Label column."""
    observed_at: str = "???"
    """ISO 8601 time at which the outcomes became known."""
    purpose: str = ""
    """Purpose of the client's token."""


@job("outcomes", OutcomesConfig)
def main(config: OutcomesConfig) -> None:
    """Join answers with true labels and post the outcomes in batches."""
    for uri in (resolve(config.answers), resolve(config.people)):
        if not exists(uri):
            raise SourceError(f"{uri} does not exist. Run `python -m jobs.pipeline.traffic` first.")
    outcomes = match_outcomes(config, _read(config.answers), _read(config.people))
    accepted = asyncio.run(_post(config, outcomes))
    print(f"posted {accepted} outcomes")
    if accepted != len(outcomes):
        raise Inconsistent(f"Only {accepted} of {len(outcomes)} outcomes were accepted.")


def match_outcomes(
    config: OutcomesConfig, answers: pl.DataFrame, people: pl.DataFrame
) -> list[dict[str, Any]]:
    """Return one outcome for each person whose request got an answer, in the format of `/v1/outcomes`."""
    answered = answers.drop_nulls("prediction_id").join(people.unique(config.key), on=config.key, how="inner")
    return [
        {"prediction_id": prediction_id, "outcome": outcome, "observed_at": config.observed_at}
        for prediction_id, outcome in answered.select("prediction_id", config.label).iter_rows()
    ]


def _read(path: str) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(read_parquet(resolve(path))))


async def _post(config: OutcomesConfig, outcomes: list[dict[str, Any]]) -> int:
    """Post the outcomes and return the number of accepted outcomes."""
    access = edge_access(config, purpose=config.purpose)
    accepted = 0
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=access.ssl_context), headers=access.headers
    ) as client:
        for start in range(0, len(outcomes), BATCH_SIZE):
            body = {"model": config.name, "outcomes": outcomes[start : start + BATCH_SIZE]}
            async with client.post(f"{access.url}/v1/outcomes", json=body) as response:
                content = await response.json(content_type=None)
                if response.status != 200:
                    raise Inconsistent(f"/v1/outcomes answered {response.status}: {content}.")
                accepted += int(content["accepted"])
    return accepted


if __name__ == "__main__":
    main()
