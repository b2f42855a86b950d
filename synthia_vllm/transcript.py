"""Transcripts, where the operator asks for them: the model card's file, one for each user.

A line is ``{"prompt": ..., "answer": ...}``. One thread writes; nobody waits for the disk, and a
disk that fails costs lines, which are counted, but never an answer.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import threading
from typing import TYPE_CHECKING, Final, Literal

from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

_MAX_WAITING: Final = 10_000  # lines that wait for a slow disk; more are lost
_CLOSING_SECONDS: Final = 5.0


class Transcripts:
    """Appends whole lines to ``<directory>/<user>.jsonl``, from any number of processes.

    A file that would grow beyond `max_bytes` becomes ``<user>.jsonl.1``, that one ``.2`` and so
    on up to `keep`. `on_written` and `on_failed` are given numbers of lines. Raises
    `StartupError` if `directory` cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        keep: int,
        fsync: Literal["never", "always"],
        on_written: Callable[[int], None],
        on_failed: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._keep = keep
        self._fsync = fsync == "always"
        self._on_written = on_written
        self._on_failed = on_failed
        self._failing = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise StartupError(
                f"Transcripts cannot be kept in {directory}: {error.strerror}. Make it a directory "
                "this user may write to, or set `transcripts.directory` to another or to null."
            ) from error
        self._lines: queue.Queue[tuple[str, str, str] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="transcripts", daemon=True)
        self._thread.start()

    def add(self, user: str, prompt: str, answer: str) -> None:
        """Keep one exchange. Returns at once; `user` must be fit to name a file."""
        try:
            self._lines.put_nowait((user, prompt, answer))
        except queue.Full:
            self._on_failed(1)

    def close(self) -> None:
        """Write what waits, as far as the disk does it within some seconds."""
        try:
            self._lines.put(None, timeout=_CLOSING_SECONDS)
        except queue.Full:
            return
        self._thread.join(_CLOSING_SECONDS)

    def _run(self) -> None:
        while (entry := self._lines.get()) is not None:
            user, prompt, answer = entry
            line = json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n"
            try:
                self._append(user, line.encode(errors="replace"))
            except OSError as error:
                self._on_failed(1)
                if not self._failing:
                    logger.error("Transcripts cannot be written: %s. Lines are lost.", error)
                self._failing = True
            else:
                self._on_written(1)
                if self._failing:
                    logger.warning("Transcripts are written again.")
                self._failing = False

    def _append(self, user: str, line: bytes) -> None:
        """Append `line` as a whole or not at all."""
        path = self._directory / f"{user}.jsonl"
        while True:
            # Opened for each line: many users, few lines a second, and rotation by whatever
            # process does it first is seen by all.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(path, flags, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file, path):
                    continue  # another process has just rotated it
                size = _whole(file)
                if size and size + len(line) > self._max_bytes:
                    self._rotate(path)
                    continue
                os.fchmod(file, 0o600)
                try:
                    written = os.write(file, line)
                    if written != len(line):
                        raise OSError(28, "No space left on device")
                except OSError:
                    os.ftruncate(file, size)  # no half line stays
                    raise
                if self._fsync:
                    os.fsync(file)
                return
            finally:
                os.close(file)

    def _rotate(self, path: Path) -> None:
        for number in range(self._keep, 1, -1):
            older = path.with_name(f"{path.name}.{number - 1}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{number}"))
        path.replace(path.with_name(f"{path.name}.1"))


def _is_at(file: int, path: Path) -> bool:
    """Whether the open `file` is the one that `path` names now."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(file)
    return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)


def _whole(file: int) -> int:
    """The size of `file` up to its last whole line; a half one, left by a crash, is cut off."""
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - 4096)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end != size:
        os.ftruncate(file, end)
    return end
