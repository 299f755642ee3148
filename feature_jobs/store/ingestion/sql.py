"""Read the rows of a SQL source once, in chunks, with a digest that does not depend on their order.

A query returns its rows in any order, so the digest is the sum of the rows' hashes. The source is read only once, so
the digest describes exactly the rows that are ingested.
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
from feature_jobs.store.definitions.names import first_repeated_name
from feature_jobs.store.definitions.sources import SqlSource

CHUNK_ROWS = 50_000
_MODULO = 2**256


class RowDigest:
    """A hash over rows that does not depend on their order: the sum of each row's SHA-256."""

    def __init__(self) -> None:
        self._sum = 0
        self.rows = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add rows to the digest."""
        for row in rows:
            text = orjson.dumps(row, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
            self._sum += int.from_bytes(hashlib.sha256(text).digest())
        self.rows += len(rows)

    def hexdigest(self) -> str:
        """Return the digest in hexadecimal."""
        return hashlib.sha256(f"{self.rows}:{self._sum % _MODULO}".encode()).hexdigest()


def read_chunks(
    source: SqlSource, environment: Mapping[str, str] = os.environ, *, columns: list[str] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in chunks of at most `CHUNK_ROWS`.

    Args:
        source: table or query to read.
        environment: environment variables, for `url_env`.
        columns: list to which the column names are added. They are added even if there are no rows.

    Raises:
        SourceError: the URL is missing, the connection fails, or the query fails.
    """
    url = database_url(source, environment)
    masked_url = url.render_as_string(hide_password=True)
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    try:
        with engine.connect().execution_options(stream_results=True, max_row_buffer=CHUNK_ROWS) as connection:
            result = connection.execute(_statement(source))
            names = list(result.keys())
            if (duplicate := first_repeated_name(names)) is not None:
                raise SourceError(
                    f"The query on {masked_url} gives two columns '{duplicate}'. Rename one of them."
                )
            if columns is not None:
                columns += names
            for part in result.partitions(CHUNK_ROWS):
                yield [dict(zip(names, row, strict=True)) for row in part]
    except sa.exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        message = (str(cause).splitlines() or [type(cause).__name__])[0]
        if url.password:
            message = message.replace(str(url.password), "***")
        raise SourceError(f"Source {masked_url} cannot be read: {message}") from error
    finally:
        engine.dispose()


def _statement(source: SqlSource) -> sa.Executable:
    if source.table is None:
        return sa.text(str(source.query))
    schema, _, name = source.table.rpartition(".")
    return sa.select(sa.text("*")).select_from(sa.table(name, schema=schema or None))


def database_url(source: SqlSource, environment: Mapping[str, str]) -> sa.URL:
    """Return the database's URL, from the source itself, an environment variable or a file.

    Raises:
        SourceError: the variable or file is missing, empty, or contains no URL.
    """
    text, origin = source.url, "url"
    if source.url_env is not None:
        text, origin = environment.get(source.url_env), f"the environment variable {source.url_env}"
    elif source.url_file is not None:
        path = Path(resolve(source.url_file))
        text, origin = path.read_text().strip() if path.is_file() else None, f"the file {path}"
    if not text:
        raise SourceError(f"A SqlSource's URL should be in {origin}, which is missing or empty.")
    try:
        url = sa.engine.make_url(text)
    except sa.exc.ArgumentError as error:
        raise SourceError(f"The content of {origin} is not a SQLAlchemy URL.") from error
    if url.drivername.startswith("sqlite") and url.database:
        path = Path(resolve(url.database))
        if not path.exists():
            raise SourceError(f"There is no SQLite database at {path}.")
        url = url.set(database=str(path))
    return url
