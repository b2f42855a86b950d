"""Runs the real application on a real socket, inside the test process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import httpx
from openai import OpenAI
from prometheus_client import CollectorRegistry

from synthia_vllm.serve.app import create_app
from synthia_vllm.serve.server import Server
from synthia_vllm.settings import Settings
from synthia_vllm.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from synthia_vllm.engine.base import Engine
    from synthia_vllm.http.application import Application


@dataclass
class Running:
    """A server that answers at `url`, and what is behind it."""

    url: str
    app: Application
    engine: Engine
    metrics: Metrics
    loop: asyncio.AbstractEventLoop
    server: Server

    @cached_property
    def client(self) -> OpenAI:
        """The stock client, which does not try again by itself."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` on the server's own event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def value(self, series: str, **labels: str) -> float:
        """The current value of one sample of `/metrics`."""
        return self.metrics.registry.get_sample_value(series, labels) or 0.0


def running_gauge(live: Running) -> float:
    """The sum of vLLM's gauges of requests it has."""
    return sum(
        sample.value
        for family in live.metrics.registry.collect()
        if family.name in ("vllm:num_requests_running", "vllm:num_requests_waiting")
        for sample in family.samples
    )


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Return when `holds()` is true; fail if that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.01)


@contextmanager
def running(
    engine: Engine, *, registry: CollectorRegistry | None = None, ready: bool = True, **changes: Any
) -> Iterator[Running]:
    """Serve `engine` with the default settings and `changes`; wait until it is ready."""
    settings = Settings(**{"model": "demo", "port": free_port(), **changes})
    metrics = Metrics(registry or CollectorRegistry())
    app = create_app(engine, settings, metrics)
    server = Server(app, settings)
    loops: list[asyncio.AbstractEventLoop] = []

    def serve() -> None:
        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve()

        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(main())

    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        url = f"http://127.0.0.1:{settings.port}"
        here = Running(url, app, engine, metrics, loops[0], server)
        if ready:
            wait_until(lambda: app.server_state.phase != "starting", 300)
            assert httpx.get(f"{url}/ready").status_code == 200, app.server_state.failure
        yield here
        if "client" in vars(here):
            here.client.close()
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
