"""Files and batches on disk, where they outlive the server.

::

    DIRECTORY/USER/files/FILE_ID/        file.json, content
    DIRECTORY/USER/batches/BATCH_ID/     batch.json, input, output, errors, lock, cancel

What is written whole is written beside its place and renamed to it. `output` and `errors` grow by
whole lines; of what a dead server left of a last line nothing counts. A batch is run by who holds
its lock, which the system takes back from a process that ends in whatever way: so several servers
can share a directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from codecs import BOM_UTF8
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Final, TypeVar

from pydantic import BaseModel, ValidationError

from synthia_vllm.api.batches.protocol import (
    ENDED,
    MAX_ERRORS,
    Batch,
    BatchError,
    BatchErrors,
    File,
    Line,
)
from synthia_vllm.errors import InvalidRequest, StartupError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

_FILE_ID: Final = re.compile(r"file-[0-9a-f]{32}")
_BATCH_ID: Final = re.compile(r"batch_[0-9a-f]{32}")
_WINDOW_S: Final = 24 * 3600
_BLOCK: Final = 1 << 20
# Lines looked at in a row: a thread that checks a large file lets the event loop have its turn.
_LINES_AT_ONCE: Final = 32
_PAUSE_S: Final = 0.0005

Record = TypeVar("Record", bound=BaseModel)


class NotStored(InvalidRequest):
    """This user has no such file or batch."""

    status = 404

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"You have no {kind} {name[:64]!r}.", code="not_found")


class StorageFull(Unavailable):
    """The disk takes no more."""

    retry_after = 60.0

    def __init__(self) -> None:
        super().__init__("The server's disk is full; nothing was stored.", code="storage_full")


class Store:
    """All files and batches in `directory`; a line of a batch has at most `max_line_bytes`.

    Raises `StartupError` if the directory cannot be used.
    """

    def __init__(self, directory: Path, *, max_line_bytes: int = 1 << 20) -> None:
        self._root = directory
        self.max_line_bytes = max_line_bytes
        self._ended: set[str] = set()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f".probe-{os.getpid()}").write_bytes(b"")
            (directory / f".probe-{os.getpid()}").unlink()
        except OSError as error:
            raise StartupError(
                f"Cannot keep batches in {directory} (batches.directory): "
                f"{error.strerror or error}."
            ) from None

    # --- Files ---

    def add_file(self, user: str, filename: str, content: BinaryIO, size: int) -> File:
        """Keep a copy of `content`. Raises `StorageFull`."""
        record = File(
            id=f"file-{secrets.token_hex(16)}",
            bytes=size,
            created_at=int(time.time()),
            filename=filename,
            purpose="batch",
        )
        place = self._root / user / "files" / record.id
        try:
            with _building(place) as building:
                with (building / "content").open("wb") as copy:
                    shutil.copyfileobj(content, copy, _BLOCK)
                    copy.flush()
                    os.fsync(copy.fileno())
                _write(building / "file.json", record)
        except OSError:
            raise StorageFull from None
        return record

    def file(self, user: str, file_id: str) -> File:
        """One of the user's files. Raises `NotStored`."""
        return _read(File, self._place(user, file_id) / "file.json", "file", file_id)

    def content(self, user: str, file_id: str) -> Path:
        """Where a file's lines are. Raises `NotStored`."""
        self.file(user, file_id)
        return self._place(user, file_id) / "content"

    def files(self, user: str) -> list[File]:
        """The user's files, newest first."""
        return _all(File, (self._root / user / "files").glob("file-*/file.json"))

    def delete_file(self, user: str, file_id: str) -> None:
        """Forget a file; a batch that was made of it has its own. Raises `NotStored`."""
        self.file(user, file_id)
        shutil.rmtree(self._place(user, file_id), ignore_errors=True)

    def stored_bytes(self, user: str) -> int:
        """What the user's files take."""
        return sum(file.bytes for file in self.files(user))

    # --- Batches ---

    def add_batch(
        self, user: str, file: File, endpoint: str, metadata: dict[str, str] | None
    ) -> Batch:
        """A new batch, to be run by whoever sees it first. Raises `StorageFull`, `NotStored`."""
        now = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            endpoint=endpoint,
            input_file_id=file.id,
            created_at=now,
            expires_at=now + _WINDOW_S,
            metadata=metadata,
        )
        place = self._root / user / "batches" / batch.id
        try:
            with _building(place) as building:
                # The same bytes under a second name: they stay if the file is deleted.
                _link(self.content(user, file.id), building / "input")
                _write(building / "batch.json", batch)
        except OSError:
            raise StorageFull from None
        return batch

    def batch(self, user: str, batch_id: str) -> Batch:
        """One of the user's batches. Raises `NotStored`."""
        place = self._batch_place(user, batch_id)
        batch = _read(Batch, place / "batch.json", "batch", batch_id)
        if batch.status not in ENDED and (place / "cancel").exists():
            batch.status = "cancelling"
        return batch

    def batches(self, user: str) -> list[Batch]:
        """The user's batches, newest first."""
        return _all(Batch, (self._root / user / "batches").glob("batch_*/batch.json"))

    def cancel(self, user: str, batch_id: str) -> Batch:
        """Ask for the end of a batch. Raises `NotStored`, and `InvalidRequest` if it has ended."""
        batch = self.batch(user, batch_id)
        if batch.status in ENDED:
            raise InvalidRequest(
                f"The batch has ended: it is {batch.status}.", code="batch_has_ended"
            )
        (self._batch_place(user, batch_id) / "cancel").touch()
        return self.batch(user, batch_id)

    def unfinished(self) -> list[tuple[str, str]]:
        """User and id of each batch that is to be run, by whoever runs it; oldest first."""
        found = []
        for place in self._root.glob("*/batches/batch_*"):
            if place.name in self._ended:
                continue
            with suppress(NotStored):
                batch = _read(Batch, place / "batch.json", "batch", place.name)
                if batch.status in ENDED:
                    self._ended.add(batch.id)
                else:
                    found.append((batch.created_at, place.parts[-3], batch.id))
        return [(user, batch_id) for _, user, batch_id in sorted(found)]

    def lock_of(self, server: str) -> IO[str]:
        """A file to be locked by the one of a server's processes that runs batches."""
        return (self._root / f".{server}.lock").open("a")

    def take(self, user: str, batch_id: str) -> Job | None:
        """The batch, to be run; `None` if another process runs it, or it has ended meanwhile."""
        place = self._batch_place(user, batch_id)
        try:
            lock = (place / "lock").open("a")
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            batch = _read(Batch, place / "batch.json", "batch", batch_id)
        except (OSError, NotStored):
            lock.close()
            return None
        if batch.status in ENDED:
            lock.close()
            return None
        return Job(self, user, batch, place, lock)

    def remove_old(self, seconds: float) -> None:
        """Forget files, and batches that have ended, that are older than that."""
        before = time.time() - seconds
        for place in (*self._root.glob("*/files/*"), *self._root.glob("*/batches/*")):
            with suppress(OSError, NotStored):
                if place.stat().st_mtime > before:
                    continue
                if place.parent.name == "batches" and not place.name.startswith("."):
                    batch = _read(Batch, place / "batch.json", "batch", place.name)
                    if batch.status not in ENDED:
                        continue
                shutil.rmtree(place)

    def keep_output(self, user: str, batch: Batch, kind: str, content: Path) -> str | None:
        """Make what a batch wrote a file of its user's; return its id, or `None` if it is empty.

        The id is always the same for one batch: who is killed in the middle begins again.
        """
        file_id = f"file-{batch.id[6:38][::-1] if kind == 'errors' else batch.id[6:38]}"
        place = self._root / user / "files" / file_id
        if place.exists():
            return file_id
        if not content.exists() or not content.stat().st_size:
            return None
        with _building(place) as building:
            _link(content, building / "content")
            _write(
                building / "file.json",
                File(
                    id=file_id,
                    bytes=content.stat().st_size,
                    created_at=int(time.time()),
                    filename=f"{batch.id}_{kind}.jsonl",
                    purpose="batch_output",
                ),
            )
        return file_id

    def _place(self, user: str, file_id: str) -> Path:
        if not _FILE_ID.fullmatch(file_id):
            raise NotStored("file", file_id)
        return self._root / user / "files" / file_id

    def _batch_place(self, user: str, batch_id: str) -> Path:
        if not _BATCH_ID.fullmatch(batch_id):
            raise NotStored("batch", batch_id)
        return self._root / user / "batches" / batch_id


class Job:
    """A batch that this process runs, for as long as it holds the lock.

    The methods do what a disk does, which may take its time: they are for a thread, one at a time.
    """

    def __init__(self, store: Store, user: str, batch: Batch, place: Path, lock: IO[str]) -> None:
        self._store = store
        self.user = user
        self.batch = batch
        self._place = place
        self._lock = lock
        self._lines: Iterator[bytes] | None = None
        self._done: set[str] = set()

    def cancelled(self) -> bool:
        """Whether its user wants it to end."""
        return (self._place / "cancel").exists()

    def validate(self) -> None:
        """Look at each line of the input, and at what has been answered before.

        Then the batch is in progress, or has failed. Raises `OSError` if the disk is full.
        """
        batch = self.batch
        seen: set[str] = set()
        errors: list[BatchError] = []
        for number, raw in enumerate(self._input_lines(), 1):
            if number % _LINES_AT_ONCE == 0:
                time.sleep(_PAUSE_S)
            if len(raw) > self._store.max_line_bytes:
                error: BatchError | None = BatchError(
                    code="line_too_long",
                    message=f"A line may have {self._store.max_line_bytes} bytes.",
                )
            else:
                error = _fault(raw, batch.endpoint, seen)
            if error is not None:
                error.line = number
                errors.append(error)
                if len(errors) == MAX_ERRORS or error.code == "line_too_long":
                    break
        if not seen and not errors:
            errors.append(BatchError(code="empty_file", message="The file has no line."))
        now = int(time.time())
        if errors:
            batch.errors = BatchErrors(data=errors)
            batch.status, batch.failed_at = "failed", now
        else:
            counts = batch.request_counts
            counts.total = len(seen)
            completed = self._recover("output")
            failed = self._recover("errors")
            self._done = completed | failed
            counts.completed, counts.failed = len(completed), len(failed)
            batch.status = "in_progress"
            batch.in_progress_at = batch.in_progress_at or now
        self.save()

    def read(self, most: int) -> list[Line]:
        """The next lines that have no answer yet; none at the end."""
        if self._lines is None:
            self._lines = self._input_lines()
        found: list[Line] = []
        for raw in self._lines:
            line = Line.model_validate_json(raw)
            if line.custom_id not in self._done:
                found.append(line)
                if len(found) == most:
                    break
        return found

    def write(self, kind: str, lines: Iterable[bytes]) -> None:
        """Add whole lines to ``output`` or ``errors``: all of them, or it raises `OSError`."""
        path = self._place / kind
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            data = b"".join(lines)
            try:
                while data:  # a disk that gets full takes a part
                    data = data[file.write(data) :]
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise

    def save(self) -> None:
        """Write down how far the batch is. Raises `OSError`."""
        _write(self._place / "batch.json", self.batch)

    def finish(self) -> None:
        """Give the user what was answered; to be called in the status ``finalizing``.

        Raises `OSError`.
        """
        batch = self.batch
        for kind in ("output", "errors"):
            path = self._place / kind
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        batch.output_file_id = self._store.keep_output(
            self.user, batch, "output", self._place / "output"
        )
        batch.error_file_id = self._store.keep_output(
            self.user, batch, "errors", self._place / "errors"
        )

    def release(self) -> None:
        """Let others have it."""
        self._lines = None
        self._lock.close()

    def _input_lines(self) -> Iterator[bytes]:
        """All lines but blank ones; of one that is too long, as much as shows that it is."""
        with (self._place / "input").open("rb") as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:  # which some editors write
                file.seek(0)
            while line := file.readline(self._store.max_line_bytes + 1):
                if line.strip():
                    yield line

    def _recover(self, kind: str) -> set[str]:
        """The ids that are answered in ``output`` or ``errors``; a torn last line is cut off."""
        path = self._place / kind
        if not path.exists():
            return set()
        done: set[str] = set()
        whole = 0
        with path.open("rb") as file:
            for number, raw in enumerate(file):
                if number % _LINES_AT_ONCE == 0:
                    time.sleep(_PAUSE_S)
                if not raw.endswith(b"\n"):
                    break
                done.add(json.loads(raw)["custom_id"])
                whole += len(raw)
        os.truncate(path, whole)
        return done


def _fault(raw: bytes, endpoint: str, seen: set[str]) -> BatchError | None:
    """What is wrong with a line, if anything; its id is added to those `seen`."""
    try:
        line = Line.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            return BatchError(
                code="invalid_json_line", message=f"This is not JSON: {problem['ctx']['error']}."
            )
        path = ".".join(str(part) for part in problem["loc"])
        return BatchError(
            code="invalid_request", message=f"`{path}`: {problem['msg']}.", param=path or None
        )
    if line.url != endpoint:
        return BatchError(
            code="mismatched_endpoint",
            message=f"`url` is {line.url[:64]!r}, but the batch's endpoint is {endpoint!r}.",
            param="url",
        )
    if line.custom_id in seen:
        return BatchError(
            code="duplicate_custom_id",
            message=f"`custom_id` {line.custom_id[:64]!r} is that of an earlier line.",
            param="custom_id",
        )
    seen.add(line.custom_id)
    return None


@contextmanager
def _building(place: Path) -> Iterator[Path]:
    """A directory that comes to be `place` if all went well, and else never was."""
    building = place.with_name(f".{place.name}")
    shutil.rmtree(building, ignore_errors=True)  # of one who was killed in the middle
    try:
        building.mkdir(parents=True)
        yield building
        building.rename(place)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _link(path: Path, second: Path) -> None:
    """Give a file that does not change any more a `second` name, or a copy where there are none."""
    try:
        os.link(path, second)
    except OSError:
        shutil.copyfile(path, second)


def _write(path: Path, record: BaseModel) -> None:
    """Write `record` to `path`, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(record.model_dump_json(), encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _read(model: type[Record], path: Path, kind: str, name: str) -> Record:
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise NotStored(kind, name) from None


def _all(model: type[Record], paths: Iterable[Path]) -> list[Record]:
    found = []
    for path in paths:
        with suppress(NotStored):
            found.append(_read(model, path, "", ""))
    return sorted(found, key=lambda it: (-it.created_at, it.id))  # type: ignore[attr-defined]
