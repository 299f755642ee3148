"""Reserves numbers in the ledger's database, before the events that use them.

Reservations are neither events nor a projection. They ensure that no number is given out twice, even if a number was
never used.
"""

from __future__ import annotations

import sqlalchemy as sa

from cluster.ledger.store import Ledger

_METADATA = sa.MetaData()
_RESERVED = sa.Table(
    "reserved_numbers",
    _METADATA,
    sa.Column("name", sa.String(256), primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
)


def reserve_number(ledger: Ledger, name: str, *, above: int) -> int:
    """Reserve the next number for a name. No other caller on any machine gets the same number.

    Args:
        ledger: The ledger whose database stores the reservations.
        name: Name of what is numbered, such as `models/<name>`.
        above: The greatest number in use. It is needed because numbers of older releases have no reservation.
    """
    of_name = _RESERVED.c.name == name
    with ledger.writing() as connection:
        _METADATA.create_all(connection)
        reserved = connection.execute(sa.select(_RESERVED.c.number).where(of_name)).scalar_one_or_none()
        number = max(reserved or 0, above) + 1
        if reserved is None:
            connection.execute(_RESERVED.insert().values(name=name, number=number))
        else:
            connection.execute(_RESERVED.update().where(of_name).values(number=number))
    return number
