"""Killed materialisations: readers see all rows of one materialisation, and the next one is complete."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from cluster.security.keys.keyring import Keyring
from cluster.settings import OnlineConfig
from feature_jobs.store.online import lmdb_engine as online_lmdb
from feature_jobs.store.online import redis_engine as online_redis
from feature_jobs.store.online.rows import Horizon, OnlineRow
from feature_jobs.store.types.schema import PROVISIONAL
from tests.processes import forks
from tests.projects.online import online_keys, open_store
from tests.projects.views import make_spec

KILLS = int(os.environ.get("FALAJ_KILLS", "1"))
PEOPLE, PUSHED = 400, 401
VIEW = make_spec("v", ["id"], amount="int64")
KEY_TYPES = {"id": "int64"}


def rows(value: int) -> Iterator[OnlineRow]:
    """Return rows of all entities for one materialisation."""
    for person in range(PEOPLE):
        yield OnlineRow(keys=(person,), event_us=value, created_us=value, seq=0, values=(value,))


def materialise(config: OnlineConfig, root: str, first: int, began: Connection) -> None:
    """Materialise repeatedly in small pieces, until the process is killed."""
    online_lmdb.PIECE_ROWS = online_redis.PIECE_ROWS = 20
    store = open_store(Path(root), Keyring(Path(root) / "keyring.json", bytes(32)), config)
    began.send("began")
    for value in range(first, 10**6):
        store.replace(VIEW, KEY_TYPES, rows(value), horizon=Horizon(0, -1))


def test_killed_materialisation_leaves_the_previous_one(config: OnlineConfig, tmp_path: Path) -> None:
    """All values are of one materialisation. Pushed rows stay until a materialisation covers them."""
    reader = open_store(tmp_path, online_keys(tmp_path, "v"), config)
    reader.replace(VIEW, KEY_TYPES, rows(1))
    pushed = OnlineRow(keys=(PUSHED,), event_us=5, created_us=5, seq=PROVISIONAL, values=(5,))
    reader.put(VIEW, KEY_TYPES, [pushed])
    context = forks.context()
    last = 1
    for _ in range(KILLS):
        ours, jobs = context.Pipe()
        job = context.Process(target=materialise, args=(config, str(tmp_path), last + 1, jobs))
        job.start()
        ours.recv()
        job.join(random.uniform(0.0, 0.15))
        job.kill()
        job.join()
        rows_found = reader.get(VIEW, [(person,) for person in (*range(PEOPLE), PUSHED)])
        values = {row_found[3][0] for row_found in rows_found[:-1] if row_found is not None}
        assert len(values) == 1
        assert None not in rows_found
        last = values.pop()
    reader.replace(VIEW, KEY_TYPES, rows(last + 1))
    assert [row_found[3][0] for row_found in reader.get(VIEW, [(0,), (PUSHED,)]) if row_found] == [last + 1]
    reader.close()
