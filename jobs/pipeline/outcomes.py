"""`python -m jobs.pipeline.outcomes`: post what came true for the people that were scored."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any

import aiohttp
import polars as pl

from cluster.entrypoint import job
from cluster.errors import Inconsistent, SourceError
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.session import require_record
from cluster.settings import PlatformConfig
from cluster.storage import exists, layout, read_parquet, resolve

BATCH = 500


@dataclass(kw_only=True, slots=True)
class OutcomesConfig(PlatformConfig):
    """Which answers get their outcomes from where."""

    name: str = "employment"
    """Of the model."""
    answers: str = "???"
    people: str = "???"
    """Parquet with the entity key and the true label."""
    key: str = "person_id"
    label: str = "employed"
    observed_at: str = "???"
    """ISO 8601 instant at which the outcomes became known."""
    purpose: str = "employment_statistics"


@job("outcomes", OutcomesConfig)
def main(config: OutcomesConfig) -> None:
    """Join answers with true labels and post them in batches."""
    for uri in (resolve(config.answers), resolve(config.people)):
        if not exists(uri):
            raise SourceError(f"{uri} does not exist. Run `python -m jobs.pipeline.traffic` first.")
    outcomes = match(config, _read(config.answers), _read(config.people))
    accepted = asyncio.run(_post(config, outcomes))
    print(f"posted {accepted} outcomes")
    if accepted != len(outcomes):
        raise Inconsistent(f"Only {accepted} of {len(outcomes)} outcomes were accepted.")


def match(config: OutcomesConfig, answers: pl.DataFrame, people: pl.DataFrame) -> list[dict[str, Any]]:
    """One outcome per answered person, as `/v1/outcomes` takes it."""
    answered = answers.drop_nulls("prediction_id").join(people.unique(config.key), on=config.key, how="inner")
    return [
        {"prediction_id": prediction_id, "outcome": outcome, "observed_at": config.observed_at}
        for prediction_id, outcome in answered.select("prediction_id", config.label).iter_rows()
    ]


def _read(path: str) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(read_parquet(resolve(path))))


async def _post(config: OutcomesConfig, outcomes: list[dict[str, Any]]) -> int:
    record = require_record(config)
    context = ssl.create_default_context(cafile=f"{layout(config.storage).tls}/ca.pem")
    token = mint_token(
        layout(config.storage), subject="demo-app", role=Role.service, purpose=config.purpose, ttl_s=900
    )
    accepted = 0
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context), headers={"Authorization": f"Bearer {token}"}
    ) as client:
        for batch in (outcomes[start : start + BATCH] for start in range(0, len(outcomes), BATCH)):
            body = {"model": config.name, "outcomes": batch}
            async with client.post(f"{record.edge_url}/v1/outcomes", json=body) as response:
                content = await response.json(content_type=None)
                if response.status != 200:
                    raise Inconsistent(f"/v1/outcomes answered {response.status}: {content}.")
                accepted += int(content["accepted"])
    return accepted


if __name__ == "__main__":
    main()
