"""Servers of a fleet, over an engine that needs no model, as processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
from processes import status
from serving import free_port, wait_until

_FAKE_SERVER = Path(__file__).with_name("fake_server.py")


class Clients:
    """Threads that each ask until the context ends."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


@dataclass
class Replica:
    """One that can be ended, killed, and started again at the same port."""

    place: Path
    settings: dict[str, Any]
    step_seconds: float = 0.15
    """Of its engine: an answer takes four."""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.place.mkdir()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.place / "log").read_text()

    def start(self) -> None:
        with (self.place / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(_FAKE_SERVER), str(self.port), str(self.place),
                 str(self.step_seconds), json.dumps(self.settings)],
                stderr=log,
            )  # fmt: skip

    def wait_ready(self) -> None:
        wait_until(lambda: status(f"{self.url}/ready") == 200)

    def stop(self) -> None:
        """End it as an orchestrator does; it has to end well."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def gauge(self, name: str) -> float:
        """Its series of this name, which has one sample."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        [value] = [line.split()[-1] for line in lines if line.startswith(name + "{")]
        return float(value)
