"""A real server under load, and a real Prometheus that scrapes it."""

from __future__ import annotations

import asyncio
import subprocess
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from lib.monitored import FLAGS, USERS, Scrape, offer, prometheus
from processes import COMMAND, command
from valkey_server import valkey_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


POD = {"namespace": "synthia", "pod": "synthia-vllm-0"}
"""What a PodMonitor says of a target, and a static one has not."""


@pytest.fixture(scope="session")
def scrape(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrape]:
    """Server and Prometheus run on while the tests do."""
    place = tmp_path_factory.mktemp("scrape")
    keys = {name: _new_key(name, limits, place / "keys.yaml") for name, limits in USERS.items()}
    flags = [*FLAGS, "--set", f"keys_file={place / 'keys.yaml'}"]
    flags += ["--set", f"transcripts.directory={place / 'transcripts'}"]
    with (
        valkey_server() as valkey,
        command(demo, place / "log", *flags, "--set", f"accounts={valkey.url}") as (process, url),
    ):
        with prometheus(url, place, pods=(POD,)) as source:
            begin = time.time()
            statuses = asyncio.run(offer(url, keys, 25))
            end = time.time()
            text = httpx.get(f"{url}/metrics").text
            yield Scrape(source, text, source.names, statuses, begin, end)
        process.terminate()
        assert process.wait(60) == 0, (place / "log").read_text()


def _new_key(name: str, limits: dict[str, Any], file: Path) -> str:
    """A new user's key, made as an operator makes it."""
    flags = ["--file", str(file)]
    for limit, value in limits.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{limit.replace('_', '-')}", *map(str, values)]
    made = subprocess.run(
        [COMMAND, "keys", "new", name, *flags], capture_output=True, text=True, check=True
    )
    [key] = [word for word in made.stdout.split() if word.startswith("sk-")]
    return key
