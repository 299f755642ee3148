"""The rows of a SQL source, read once and in chunks, with a digest that does not depend on their order.

A query gives its rows in any order, so the digest is the sum of the rows' hashes. Reading once means that what is
ingested is what the digest was taken of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa

from cluster.errors import SourceError
from cluster.storage import resolve
from feature_jobs.store.definitions.names import repeated_name
from feature_jobs.store.definitions.sources import SqlSource

CHUNK_ROWS = 50_000
_MODULO = 2**256


class RowDigest:
    """A hash over rows, whatever their order: the sum of each row's SHA-256."""

    def __init__(self) -> None:
        self._sum = 0
        self.rows = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take in some rows."""
        for row in rows:
            text = orjson.dumps(row, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
            self._sum += int.from_bytes(hashlib.sha256(text).digest())
        self.rows += len(rows)

    def hexdigest(self) -> str:
        """In hex."""
        return hashlib.sha256(f"{self.rows}:{self._sum % _MODULO}".encode()).hexdigest()


def read_chunks(
    source: SqlSource, environment: Mapping[str, str] = os.environ, *, columns: list[str] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """The rows, some at a time.

    Args:
        source: what is asked for.
        environment: where `url_env` is looked up.
        columns: gets the names of the columns, which a query without rows has too.

    Raises:
        SourceError: no address, no connection, or a query that fails.
    """
    url = address(source, environment)
    where = url.render_as_string(hide_password=True)
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    try:
        with engine.connect().execution_options(stream_results=True, max_row_buffer=CHUNK_ROWS) as connection:
            result = connection.execute(statement(source))
            names = list(result.keys())
            if (twice := repeated_name(names)) is not None:
                raise SourceError(f"The query on {where} gives two columns '{twice}'. Name one otherwise.")
            if columns is not None:
                columns += names
            for part in result.partitions(CHUNK_ROWS):
                yield [dict(zip(names, row, strict=True)) for row in part]
    except sa.exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        said = (str(cause).splitlines() or [type(cause).__name__])[0]
        if url.password:
            said = said.replace(str(url.password), "***")
        raise SourceError(f"Source {where} cannot be read: {said}") from error
    finally:
        engine.dispose()


def statement(source: SqlSource) -> sa.Executable:
    """What is asked of the database."""
    if source.table is None:
        return sa.text(str(source.query))
    schema, _, name = source.table.rpartition(".")
    return sa.select(sa.text("*")).select_from(sa.table(name, schema=schema or None))


def address(source: SqlSource, environment: Mapping[str, str]) -> sa.URL:
    """The database's URL, from where the source says.

    Raises:
        SourceError: the variable or file is missing, or holds no URL.
    """
    text, where = source.url, "url"
    if source.url_env is not None:
        text, where = environment.get(source.url_env), f"the environment variable {source.url_env}"
    elif source.url_file is not None:
        path = Path(resolve(source.url_file))
        text, where = path.read_text().strip() if path.is_file() else None, f"the file {path}"
    if not text:
        raise SourceError(f"A SqlSource's URL should be in {where}, which is missing or empty.")
    try:
        url = sa.engine.make_url(text)
    except sa.exc.ArgumentError as error:
        raise SourceError(f"What is in {where} is no SQLAlchemy URL.") from error
    if url.drivername.startswith("sqlite") and url.database:
        path = Path(resolve(url.database))
        if not path.exists():
            raise SourceError(f"There is no SQLite database at {path}.")
        url = url.set(database=str(path))
    return url
