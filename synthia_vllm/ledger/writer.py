"""Who used what: counted in memory as requests end, written once a second by one thread.

    add ──> rows of this second ──> batches that wait ──> the database
                                          └──> the journal, while the database is away

Nobody who is served waits for any of it. What a process that is killed had not written is in the
log: its line of a request comes before the request is counted here.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
import time
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import URL

from synthia_vllm.errors import StartupError
from synthia_vllm.ledger.database import Away, Database, Unusable
from synthia_vllm.ledger.journal import Batch, Journal
from synthia_vllm.ledger.place import DEFAULT, NONE, default_file, parse, state_directory
from synthia_vllm.ledger.rows import HOUR, Key, Rows, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from synthia_vllm.ledger.journal import Adopted
    from synthia_vllm.ledger.rows import Used

logger = logging.getLogger(__name__)

_EVERY_S: Final = 1.0
_CLOSING_S: Final = 15.0  # longer than a database that hangs is waited for
MAX_ROWS: Final = 20_000
"""That may wait in one process; more are lost, and counted."""


class Ledger:
    """Counts, and writes to `database`.

    `on_waiting` is told how many rows a write has failed for, `on_lost` of rows that there was no
    room for. Without a `journal` directory rows wait in memory only.
    """

    def __init__(
        self,
        database: Database,
        *,
        journal: Path | None,
        on_waiting: Callable[[int], None],
        on_lost: Callable[[int], None],
    ) -> None:
        self._database = database
        self._reader = Database(database.url)
        self._on_waiting = on_waiting
        self._on_lost = on_lost
        self._writer = uuid.uuid4().hex
        self._sequence = 0
        self._journal = Journal(journal, str(database), self._writer) if journal else None
        self._rows: Rows = {}
        self._taking = threading.Lock()  # guards the one above, for as long as it takes to swap it
        self._waiting: list[Batch] = []
        self._adopted: list[Adopted] = []
        self._saved = True
        """Whether the journal has what waits."""
        self._away = False
        self._unsaved = False
        self.written_until = int(time.time())
        """What ended here before that (seconds since 1970) is in the database."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def add(self, used: Used) -> None:
        """A request has ended. Returns at once; from any thread."""
        user, model, route, refused, *tokens, seconds = used
        key = Key(user, model, route, int(time.time()) // HOUR * HOUR)
        counts = [1, int(refused), *tokens, seconds]
        with self._taking:
            lost = merge(self._rows, {key: counts}, MAX_ROWS)
        if lost:
            self._on_lost(lost)

    def totals(
        self,
        by: Sequence[str],
        *,
        since: int | None,
        until: int | None,
        user: str,
        most: int,
    ) -> list[dict[str, Any]]:
        """As `Database.totals`. Raises `Away`."""
        wanted = partial(self._reader.totals, by, since=since, until=until, user=user, most=most)
        try:
            return wanted()
        except Away:  # the connection may have been closed since it was used last
            return wanted()

    def close(self) -> None:
        """Write what is left: to the database, or else to the journal."""
        self._closing.set()
        self._thread.join(_CLOSING_S)
        if self._thread.is_alive():
            logger.warning("The ledger's last rows were not written in time.")

    def _run(self) -> None:
        while not self._closing.wait(_EVERY_S):
            self._flush()
        self._flush()
        self._end()

    def _flush(self) -> None:
        now = int(time.time())
        with self._taking:
            rows, self._rows = self._rows, {}
        if rows:
            self._put(rows)
        if self._away:
            self._save()  # the next try may take long
        try:
            self._send()
        except (Away, OSError) as error:
            if not self._away:
                logger.warning("The ledger %s cannot be written: %s.", self._database, error)
            self._away = True
        except Exception:  # the thread goes on, and so do the others' rows
            logger.exception("The ledger: a fault of the server's own")
            self._away = True
        else:
            if self._away:
                logger.warning("The ledger %s is written again.", self._database)
            self._away = False
            self.written_until = now
        self._save()
        adopted = (batch for it in self._adopted for batch in it.batches)
        self._on_waiting(sum(len(batch.rows) for batch in (*self._waiting, *adopted)))

    def _put(self, rows: Rows) -> None:
        """Have `rows` wait: with those that were not sent yet, if there are any."""
        room = MAX_ROWS - sum(len(batch.rows) for batch in self._waiting)
        if not self._waiting or self._waiting[-1].tried:
            self._sequence += 1
            self._waiting.append(Batch(self._writer, self._sequence, {}))
        last = self._waiting[-1].rows
        lost = merge(last, rows, len(last) + room)
        if lost:
            self._on_lost(lost)
        self._saved = False

    def _send(self) -> None:
        """Write what waits, that of processes that have died as well. Raises `Away`."""
        if self._journal is not None and not self._adopted:
            self._adopted = self._journal.adopt()
        while self._adopted:
            for batch in self._adopted[0].batches:
                self._database.add(batch.writer, batch.sequence, batch.rows)
            self._adopted.pop(0).done()
        while self._waiting:
            batch = self._waiting[0]
            batch.tried = True
            if batch.rows:
                self._database.add(batch.writer, batch.sequence, batch.rows)
            del self._waiting[0]
            self._saved = False

    def _save(self) -> None:
        """Have the journal say what waits, as far as the disk does it."""
        if self._saved or self._journal is None:
            return
        try:
            self._journal.save(self._waiting)
            self._saved, self._unsaved = True, False
        except OSError as error:
            if not self._unsaved:
                logger.warning(
                    "What the ledger %s does not take waits in memory alone: %s.",
                    self._database,
                    error,
                )
            self._unsaved = True

    def _end(self) -> None:
        for left in (*self._adopted, *([self._journal] if self._journal else ())):
            left.leave()
        try:
            # What a journal still has must stay known as added.
            gone = self._saved or self._journal is None
            if gone and not self._waiting and self._sequence:
                self._database.forget(self._writer)
        except Away:
            pass  # one line too many
        finally:
            self._database.close()
            self._reader.close()


def open_database(setting: str) -> Database | None:
    """The database that the setting `ledger` names; `None` if there is to be none, or can be none.

    A database that is away may come back: that is no error. Raises `StartupError`.
    """
    if setting == NONE:
        return None
    if setting == DEFAULT:
        file = default_file()
        url = URL.create("sqlite", database=str(file))
    else:
        url = parse(setting)
        file = Path(url.database or "") if url.drivername == "sqlite" else None
    try:
        if file is not None:
            _make_file(file)
        elif setting == DEFAULT:
            raise FileNotFoundError(errno.ENOENT, "there is no home directory")
    except OSError as error:
        why = f"{file or 'usage.sqlite'} cannot be written: {error.strerror}"
        if setting == DEFAULT:
            logger.warning(
                "Who used what is not kept: %s. Set XDG_STATE_HOME to a directory that can be "
                "written to, or the setting `ledger` to an address, or to `none`.",
                why,
            )
            return None
        raise StartupError(
            f"The ledger {why}. Make its directory one that this user may write to, or set "
            "`ledger` to another, or to `none`."
        ) from None
    database = Database(url)
    try:
        database.make()
    except Unusable as error:
        database.close()
        raise StartupError(
            f"The ledger {database} cannot be used: {error}. Mend it, move it away (a new one is "
            "made), or set `ledger` to another, or to `none`."
        ) from None
    except Away as error:
        logger.warning("The ledger %s cannot be reached yet: %s.", database, error)
    return database


def open_ledger(
    setting: str, *, on_waiting: Callable[[int], None], on_lost: Callable[[int], None]
) -> Ledger | None:
    """The ledger at the database that `open_database` opens. Raises `StartupError`."""
    database = open_database(setting)
    if database is None:
        return None
    return Ledger(database, journal=state_directory(), on_waiting=on_waiting, on_lost=on_lost)


def _make_file(path: Path) -> None:
    """Make sure of a file that only its owner reads, and of a place for those beside it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with tempfile.TemporaryFile(dir=path.parent):
        pass  # permissions do not tell all: the file system may be read-only
