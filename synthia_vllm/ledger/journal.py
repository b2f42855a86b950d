"""Batches that the database has not taken, on the disk of the machine they were counted on.

Each writer has a file of its own, which it puts in place whole, and a lock beside it while there is
something in it. A file whose lock is free is of a process that has died: whoever finds it sends its
batches on, under the name and the numbers they have, so that what had arrived is not added again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

from synthia_vllm.ledger.rows import COUNTS, Key, Rows

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

_FORMAT: Final = 1


@dataclass(slots=True)
class Batch:
    """Rows on their way."""

    writer: str
    sequence: int
    rows: Rows
    tried: bool = False
    """Whether it was sent, and so may have arrived: it stays as it is."""


class Journal:
    """The files in `directory` for the ledger at `address`; `writer` has one of them."""

    def __init__(self, directory: Path, address: str, writer: str) -> None:
        self._directory = directory
        self._ledger = f"usage-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
        self._path = directory / f"{self._ledger}-{writer}.json"
        self._lock: IO[bytes] | None = None

    def save(self, batches: list[Batch]) -> None:
        """Keep these and no others. Raises `OSError`; then those there were are kept."""
        if not batches:
            if self._lock is not None:
                _remove(self._path, self._lock)
                self._lock = None
            return
        if self._lock is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock_of(self._path).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # before there is a file, nobody looks at it
        beside = self._path.with_suffix(".part")
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"format": _FORMAT, "batches": [_written(it) for it in batches]}, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise

    def leave(self) -> None:
        """What is still there is for another to add."""
        if self._lock is not None:
            self._lock.close()

    def adopt(self) -> list[Adopted]:
        """What processes have left that are no more."""
        found = []
        for path in sorted(self._directory.glob(f"{self._ledger}-*.json")):
            adopted = None if path == self._path else _adopt(path)
            if adopted is not None:
                found.append(adopted)
        return found


@dataclass(slots=True)
class Adopted:
    """What a process has left."""

    batches: list[Batch]
    path: Path
    lock: IO[bytes]

    def done(self) -> None:
        """All of it has been added. Raises `OSError`."""
        _remove(self.path, self.lock)

    def leave(self) -> None:
        """Somebody else is to do it."""
        self.lock.close()


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _remove(path: Path, lock: IO[bytes]) -> None:
    for each in (path.with_suffix(".part"), path, _lock_of(path)):
        each.unlink(missing_ok=True)
    lock.close()


def _adopt(path: Path) -> Adopted | None:
    """What is at `path`, locked; `None` if somebody has it, or there is nothing to be read."""
    try:
        lock = _lock_of(path).open("ab")
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise ValueError("of another version")
        return Adopted([_read(it) for it in document["batches"]], path, lock)
    except OSError:  # somebody lives, or was faster
        lock.close()
    except (ValueError, LookupError, TypeError) as error:
        lock.close()
        aside = path.with_suffix(".unreadable")
        logger.error("Rows of the ledger in %s cannot be read (%s): see %s.", path, error, aside)
        with suppress(OSError):
            path.replace(aside)
    return None


def _written(batch: Batch) -> dict[str, Any]:
    return {
        "writer": batch.writer,
        "sequence": batch.sequence,
        "rows": [[*key, *counts] for key, counts in batch.rows.items()],
    }


def _read(document: dict[str, Any]) -> Batch:
    size = len(Key._fields)
    rows: Rows = {}
    for row in document["rows"]:
        if len(row) != size + len(COUNTS):
            raise ValueError("a row is cut short")
        rows[Key(*row[:size])] = row[size:]
    return Batch(str(document["writer"]), int(document["sequence"]), rows, tried=True)
