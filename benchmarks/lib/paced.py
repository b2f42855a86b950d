"""The edge over a fake engine that talks at a fixed pace, as a server to be measured."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
import urllib.request
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import psutil

from lib.servers import Running, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FAKE_RATE: Final = 6000
"""Tokens a second of all streams of the fake engine together; enough streams provided."""
FAKE_FASTEST: Final = 0.005
"""Seconds between two tokens of one stream of the fake engine, at least."""


def _fake_server(port: int, delay: float, tokens: int) -> None:
    """Serve a fake engine that gives a token every `delay` seconds to each stream; never returns.

    To be run in a process of its own.
    """
    from prometheus_client import CollectorRegistry

    from synthia_vllm.engine.base import ModelInfo
    from synthia_vllm.engine.fake import FakeEngine
    from synthia_vllm.serve.app import create_app
    from synthia_vllm.serve.server import Server
    from synthia_vllm.settings import Settings
    from synthia_vllm.telemetry.metrics import Metrics

    engine = FakeEngine(
        pieces=("o",) * 2 * tokens,  # one byte is one token
        delay=delay,
        model_info=ModelInfo(
            max_model_len=4096, vocab_size=32000, longest_token=1, max_num_seqs=4096
        ),
    )
    limits = {"max_requests": 4096, "max_queue_seconds": 1000}
    settings = Settings.model_validate({"model": "demo", "port": port, "limits": limits})
    app = create_app(engine, settings, Metrics(CollectorRegistry()))
    Server(app, settings).run()


@asynccontextmanager
async def start_fake(streams: int, tokens: int) -> AsyncIterator[Running]:
    """The edge over a fake engine that paces `streams` streams, with `tokens` as in `Meter`."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=_fake_server, args=(port, _delay(streams), tokens), daemon=True
    )
    process.start()
    assert process.pid is not None
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not await asyncio.to_thread(_ready, url):
            if not process.is_alive() or time.monotonic() > deadline:
                raise SystemExit("The server with the fake engine did not start.")
            await asyncio.sleep(0.1)
        itself = psutil.Process(process.pid)
        yield Running("edge + fake engine", url, itself, (itself,))
    finally:
        process.terminate()
        await asyncio.to_thread(process.join, 30)
        if process.is_alive():
            process.kill()


def _delay(streams: int) -> float:
    """Seconds between two tokens of each of `streams` streams of the fake engine."""
    return max(streams / FAKE_RATE, FAKE_FASTEST)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except OSError:
        return False
