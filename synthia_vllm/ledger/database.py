"""The ledger's tables, in SQLite or PostgreSQL.

What is added comes in batches, each with its writer's name and a number that grows. Both are noted
in the transaction that adds, so a batch whose commit was never answered can be sent again.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Double,
    MetaData,
    NullPool,
    Table,
    Text,
    create_engine,
    delete,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, ProgrammingError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from synthia_vllm.ledger.rows import COUNTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import URL, Connection

    from synthia_vllm.ledger.rows import Rows

_SECONDS: Final = 5  # for a connection, and again for a transaction
_LOCK: Final = 0x53594E54  # PostgreSQL's, for one at a time to make the tables

_metadata = MetaData()
_usage = Table(
    "synthia_usage",
    _metadata,
    Column("user_name", Text, primary_key=True),
    Column("hour", DateTime(timezone=True), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in COUNTS[:-1]),
    Column(COUNTS[-1], Double, nullable=False),
)
_writers = Table(
    "synthia_usage_writers",
    _metadata,
    Column("writer", Text, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
)


class Away(Exception):
    """The database does not do it now; it may later. The message is for the operator."""


class Unusable(Away):
    """The database will not do it until somebody has changed something."""


class Database:
    """The ledger at `url`; connects when it is used. For one thread at a time, but for `totals`."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self._file = Path(url.database or "") if url.drivername == "sqlite" else None
        self._made = False
        if self._file is not None:
            # A connection each time: a file that was moved away is not written on.
            self._insert: Any = sqlite.insert
            self._engine = create_engine(
                url, poolclass=NullPool, connect_args={"timeout": _SECONDS}
            )
        else:
            self._insert = postgresql.insert
            self._engine = create_engine(
                url,
                pool_size=1,
                max_overflow=0,
                pool_timeout=_SECONDS,
                # Statements prepared in a connection are not there in a pooler's next one.
                connect_args={"connect_timeout": _SECONDS, "prepare_threshold": None},
            )

    def __str__(self) -> str:
        return str(self._file) if self._file else self.url.render_as_string(hide_password=True)

    def make(self) -> None:
        """Make what is not there yet. Raises `Away`."""
        with self._transaction() as connection:
            self._make(connection)

    def add(self, writer: str, sequence: int, rows: Rows) -> None:
        """Add `rows`, unless a batch of this `writer` with this number or a higher one has been.

        Raises `Away`; it is then not known whether they were added.
        """
        with self._transaction() as connection:
            self._make(connection)
            mark = self._insert(_writers).values(writer=writer, sequence=sequence)
            mark = mark.on_conflict_do_update(
                index_elements=["writer"],
                set_={"sequence": sequence},
                where=_writers.c.sequence < sequence,
            )
            counted = {"preserve_rowcount": True}
            if connection.execute(mark.inline(), execution_options=counted).rowcount == 0:
                return
            adding = self._insert(_usage)
            adding = adding.on_conflict_do_update(
                index_elements=list(_usage.primary_key.columns),
                set_={name: _usage.c[name] + adding.excluded[name] for name in COUNTS},
            )
            # In one order: two writers would else wait for each other's rows.
            values = [
                {
                    "user_name": key.user,
                    "model": key.model,
                    "route": key.route,
                    "hour": datetime.fromtimestamp(key.hour, UTC),
                    **dict(zip(COUNTS, counts, strict=True)),
                }
                for key, counts in sorted(rows.items())
            ]
            connection.execute(adding, values)

    def forget(self, writer: str) -> None:
        """This writer has nothing more to send. Raises `Away`."""
        with self._transaction() as connection:
            self._make(connection)
            connection.execute(delete(_writers).where(_writers.c.writer == writer))

    def totals(
        self,
        by: Sequence[str],
        *,
        since: int | None = None,
        until: int | None = None,
        user: str | None = None,
        most: int | None = None,
    ) -> list[dict[str, Any]]:
        """Sums by the names of `by`, of hours from `since` and before `until`. Raises `Away`."""
        columns: dict[str, Any] = {
            "user": _usage.c.user_name,
            "model": _usage.c.model,
            "route": _usage.c.route,
            "day": func.date(_usage.c.hour),
            "hour": _usage.c.hour,
        }
        groups = [columns[name] for name in by]
        query = select(*groups, *(func.coalesce(func.sum(_usage.c[name]), 0) for name in COUNTS))
        query = query.group_by(*groups).order_by(*groups).limit(most)
        if since is not None:
            query = query.where(_usage.c.hour >= datetime.fromtimestamp(since, UTC))
        if until is not None:
            query = query.where(_usage.c.hour < datetime.fromtimestamp(until, UTC))
        if user is not None:
            query = query.where(_usage.c.user_name == user)
        with self._transaction() as connection:
            found = connection.execute(query).all()
        return [
            {name: _plain(value) for name, value in zip(by, row, strict=False)}
            | {name: int(value) for name, value in zip(COUNTS[:-1], row[len(by) :], strict=False)}
            | {COUNTS[-1]: round(float(row[-1]), 3)}
            for row in found
        ]

    def close(self) -> None:
        """Let go of the connections."""
        self._engine.dispose()

    def _make(self, connection: Connection) -> None:
        if self._made:
            return
        if self._file is not None:
            # Readers and a writer do not wait for each other.
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        else:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        there = inspect(connection).get_table_names()
        for table in _metadata.sorted_tables:
            if table.name not in there:  # somebody with the right to may have made it
                connection.execute(CreateTable(table, if_not_exists=True))
        self._made = True

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """A transaction that is committed at the end. Raises `Away`."""
        try:
            with self._engine.connect() as connection, self._bounded(connection):
                yield connection
                connection.commit()
        except SQLAlchemyError as error:
            self._made = False  # somebody may have taken the tables away
            raise _explained(error) from error

    @contextmanager
    def _bounded(self, connection: Connection) -> Iterator[None]:
        """Break a transaction off that a server does not answer in time, as one that hangs."""
        if self._file is not None:
            yield
            return
        driver: Any = connection.connection.driver_connection
        with socket.socket(fileno=os.dup(driver.fileno())) as line:
            timer = threading.Timer(_SECONDS, _cut, (line,))
            timer.daemon = True
            timer.start()
            try:
                connection.execute(text("SET LOCAL timezone = 'UTC'"))
                yield
            finally:
                timer.cancel()
                timer.join()


def _cut(line: socket.socket) -> None:
    with suppress(OSError):  # cut already, by the other side
        line.shutdown(socket.SHUT_RDWR)


def _plain(value: Any) -> str:
    if isinstance(value, datetime):  # without a zone from SQLite, where all are of UTC
        moment = value if value.tzinfo is None else value.astimezone(UTC)
        return f"{moment:%Y-%m-%dT%H:%MZ}"
    return str(value)


def _explained(error: SQLAlchemyError) -> Away:
    """What is wrong in the driver's own words: the library's have statements and values in them."""
    if not isinstance(error, DBAPIError) or error.orig is None:
        return Away(str(error).partition("\n")[0])
    origin = error.orig
    why = str(origin).strip().partition("\n")[0] or type(origin).__name__
    if isinstance(origin, sqlite3.Error):
        code = getattr(origin, "sqlite_errorname", "").split("_")[:2]
        lasting = code[-1:] in (["NOTADB"], ["CORRUPT"], ["CANTOPEN"], ["READONLY"], ["PERM"])
        return (Unusable if lasting else Away)(why)
    return (Unusable if isinstance(error, ProgrammingError) else Away)(why)
