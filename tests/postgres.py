"""Debian's PostgreSQL as a process of a test, on a port of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from serving import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Postgres:
    """A server that can be stopped, and started again with what it had."""

    programs: Path
    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"postgresql://ledger:secret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.programs / "postgres", "-D", self.directory, "-p", str(self.port),
                 "-h", "127.0.0.1", "-k", self.directory, "-c", "fsync=off"],
                stderr=log, start_new_session=True, **_nobody(),
            )  # fmt: skip
        wait_until(self._answers)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait()

    def tell(self, what: signal.Signals) -> None:
        """Send a signal to all of its processes, those of connections too."""
        assert self.process is not None
        below = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in (self.process.pid, *map(int, below.split())):
            with suppress(ProcessLookupError):  # one whose connection has ended meanwhile
                os.kill(pid, what)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.address) as connection:
            cursor = connection.execute(query)
            return list(cursor.fetchall()) if cursor.description else []

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "log").read_text()
        try:
            return bool(self.ask("SELECT 1"))
        except psycopg.OperationalError:
            return False


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A new server; nothing of it is left behind."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "PostgreSQL is not installed: on Debian, apt-get install postgresql"
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        password = directory / "password"
        password.write_text("secret")
        if os.getuid() == 0:  # as whom it refuses to run
            for path in (directory, password):
                shutil.chown(path, "nobody")
        data = directory / "data"
        subprocess.run(
            [found[-1], "-D", data, "-U", "ledger", "--pwfile", password, "-A", "scram-sha-256",
             "--no-sync", "-E", "UTF8", "--locale", "C"],
            check=True, stdout=subprocess.DEVNULL, **_nobody(),
        )  # fmt: skip
        here = Postgres(found[-1].parent, data, free_port())
        here.start()
        try:
            yield here
        finally:
            if here.process is not None and here.process.poll() is None:
                here.tell(signal.SIGCONT)
                here.stop()
    finally:
        shutil.rmtree(directory)


def _nobody() -> dict[str, Any]:
    if os.getuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
