"""Several API processes on one engine: started, watched, replaced and stopped by this one.

This process owns the port, the engine's processes and the users' accounts (`admission/remote.py`).
Each API process has a listening socket of its own on the one port, among which the kernel spreads
the connections, and a client of its own on the engine. vLLM's engine knows a fixed number of
clients from its start, so there are some spare ones: an API process that dies is replaced by the
next.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from synthia_vllm.admission.remote import AdmissionClient, AdmissionServer
from synthia_vllm.admission.users import new_cache_secret
from synthia_vllm.engine.vllm import watchdog
from synthia_vllm.engine.vllm.client import VllmEngine
from synthia_vllm.engine.vllm.launch import EngineClientConfig, EngineCores, api_process
from synthia_vllm.errors import EngineDead, StartupError
from synthia_vllm.http.state import own_admission
from synthia_vllm.ledger.writer import open_database
from synthia_vllm.serve.server import Server, listen
from synthia_vllm.telemetry import logs, metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

    from synthia_vllm.settings import Settings

logger = logging.getLogger(__name__)

_SPARE_CLIENTS: Final = 4
_TICK_SECONDS: Final = 0.25
_NOTIFY_SECONDS: Final = 5.0  # for API processes to tell their clients that the engine died


@dataclass(frozen=True, slots=True)
class _Job:
    """All an API process is given."""

    settings: Settings
    model: str
    client: EngineClientConfig
    port: socket.socket
    admission: socket.socket
    """To the supervisor's `AdmissionServer`."""
    replaces: bool
    """Another API process, while the others serve."""
    cache_secret: bytes | None
    """The same for all: they share the engine, and its prefix cache."""


@dataclass(eq=False, slots=True)
class _Worker:
    """An API process, as its supervisor sees it."""

    process: BaseProcess
    admission: AdmissionServer
    serves: bool = False
    """Or could, if all did."""


class Supervisor:
    """Runs the server that `settings` describe in ``settings.api_workers`` API processes.

    Raises `StartupError` if the port, the key file or the ledger cannot be used.
    """

    def __init__(self, settings: Settings, model: str, progress: Callable[[str], None]) -> None:
        self._settings = settings
        self._model = model
        self._progress = progress
        self.admission = own_admission(settings)
        self.admission.on_accounts = self._note_accounts
        self._accounts: tuple[bool, int] | None = None
        """Whether the accounts can be asked, and the replicas, where there are others."""
        ledger = open_database(settings.ledger)  # each API process has one of its own
        if ledger is not None:
            ledger.close()
        self._cache_secret = new_cache_secret() if settings.cache_per_user else None
        self._phase: Literal["starting", "serving", "stopping"] = "starting"
        self._cores = EngineCores(model, settings.engine, settings.base_name)
        # The engine's processes are children of this thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._clients: list[EngineClientConfig] = []
        self._workers: list[_Worker] = []
        self._abandoned: list[str] = []
        # Held but never listened on: the port is ours, and connections go to the others.
        # First alone: another server that shares its port would share it with us, too.
        with listen(settings.host, settings.port) as alone:
            family, address = alone.family, alone.getsockname()
        self._port = _bind(family, address)

    def run(self) -> int:
        """Serve until told to stop; returns the exit code. Raises `StartupError`."""
        try:
            return asyncio.run(self._run())
        finally:
            self._port.close()

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._want_keys)
        clients = self._settings.api_workers + _SPARE_CLIENTS
        self.admission.start()
        try:
            self._clients = await loop.run_in_executor(
                self._thread, self._cores.launch, clients, self._progress
            )
            for _ in range(self._settings.api_workers):
                await self._spawn_worker()
            started = loop.run_in_executor(self._thread, self._cores.wait)
            started.add_done_callback(lambda future: future.exception())  # it has been seen
            await self._watch(started)
            if not started.done():  # no API process is left to serve what would start
                self._cores.kill()
        except StartupError:
            if self._phase != "stopping":  # which is why the engine did not start
                raise
        except EngineDead as error:
            if self._phase != "stopping":  # Ctrl-C reaches the engine's processes too
                await self._notify_clients()
                logs.tell_end(error)
                return 1
        finally:
            for worker in self._workers:
                worker.process.kill()
            await loop.run_in_executor(self._thread, self._cores.close)
            self._thread.shutdown()
            await self.admission.close()
        if self._phase == "stopping":
            return 0
        logs.tell_end("No API process is left.")
        return 1

    async def _watch(self, started: asyncio.Future[None]) -> None:
        """Look after all until no API process is left. Raises `StartupError` or `EngineDead`."""
        while self._workers:
            if started.done():
                started.result()
                self._cores.check()
            elif self._phase == "stopping":
                self._cores.kill()  # also what was started since
            self._reload_keys()
            for _ in range(self._replace_workers()):
                await self._spawn_worker()
            if self._workers:
                self._note_ready()  # one that all waited for may have ended
            await asyncio.sleep(_TICK_SECONDS)

    async def _notify_clients(self) -> None:
        """Let the API processes tell their clients that the engine died, which they see too."""
        self._phase = "stopping"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _NOTIFY_SECONDS
        while self._workers and loop.time() < deadline:
            self._replace_workers()
            await asyncio.sleep(_TICK_SECONDS)

    async def _spawn_worker(self) -> None:
        """Start another API process."""
        client = self._clients.pop(0)
        here, there = socket.socketpair()
        port = _bind(self._port.family, self._port.getsockname())
        settings = self._settings.model_copy(update={"port": port.getsockname()[1]})
        replaces = self._phase == "serving"
        job = _Job(settings, self._model, client, port, there, replaces, self._cache_secret)
        process = api_process(run_worker, job, f"API process {client.number}")
        process.start()
        client.close_sockets()
        there.close()
        port.close()

        def ready(batch: int) -> None:
            worker.serves = True
            if self._accounts is not None:
                admission.tell("accounts", *self._accounts)
            self.admission.set_batch(batch)
            if self._phase == "serving":
                admission.tell("serve")
            self._note_ready()
            if self._abandoned:
                worker.admission.tell("abort", self._abandoned)
                self._abandoned = []

        def gone(runs: list[str]) -> None:
            if self._phase != "stopping":
                worker.process.kill()  # without admission it can serve nobody
            self._abandoned += runs
            for other in self._workers:
                if other is not worker and other.serves and self._abandoned:
                    other.admission.tell("abort", self._abandoned)
                    self._abandoned = []

        admission = AdmissionServer(self.admission, on_batch=ready, on_gone=gone)
        worker = _Worker(process, admission)
        self._workers.append(worker)
        await asyncio.get_running_loop().create_connection(lambda: admission, sock=here)

    def _note_accounts(self, reachable: bool, replicas: int) -> None:
        self._accounts = reachable, replicas
        for worker in self._workers:
            worker.admission.tell("accounts", reachable, replicas)

    def _note_ready(self) -> None:
        if self._phase == "starting" and all(worker.serves for worker in self._workers):
            self._phase = "serving"
            for worker in self._workers:
                worker.admission.tell("serve")
            settings = self._settings
            host, port = settings.host, self._port.getsockname()[1]
            names = ", ".join(settings.served)
            self._progress(
                f"ready: {names} at http://{host}:{port}/v1, {settings.api_workers} API processes"
            )

    def _replace_workers(self) -> int:
        """Take note of API processes that have ended; returns how many to start in their place."""
        replacements = 0
        for worker in list(self._workers):
            code = worker.process.exitcode
            if code is None:
                continue
            self._workers.remove(worker)
            metrics.forget(worker.process.pid or 0)
            if self._phase == "stopping":
                continue
            replaced = replacements < len(self._clients)
            replacements += replaced
            logger.error(
                "%s ended with %d; what it was answering is lost. %s",
                worker.process.name,
                code,
                "Another takes its place."
                if replaced
                else f"Restart the server to replace it: {len(self._workers)} are left.",
            )
        return replacements

    def _reload_keys(self) -> None:
        """Read the key file again if it has changed, and have the API processes do the same."""
        outcome = self.admission.reload_changed()
        # One that cannot be used is counted by the first of them.
        told = {"unchanged": 0, "failed": 1, "read": len(self._workers)}[outcome]
        for worker in self._workers[:told]:
            worker.admission.tell("reload")

    def _want_keys(self) -> None:
        self.admission.reload_wanted = True

    def _stop(self) -> None:
        """Drain at the first signal; end at the second, or before anything is served."""
        phase, self._phase = self._phase, "stopping"
        if phase == "serving":
            for worker in self._workers:
                worker.process.terminate()
            return
        self._cores.kill()  # the API processes with them
        if phase == "stopping":
            self._cores.cleanup()
            os._exit(1)


def run_worker(job: _Job) -> None:
    """The API process: the server as it is, but for the engine and the accounts."""
    watchdog.attach()
    os.setpgid(0, 0)  # a Ctrl-C is for the supervisor, who passes it on
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    settings = job.settings
    logs.configure(settings.log_level, settings.log_format)

    from prometheus_client import REGISTRY

    from synthia_vllm.serve.app import create_app

    admission = AdmissionClient(
        settings.keys_file,
        max_requests=settings.limits.max_requests,
        cache_secret=job.cache_secret,
    )
    engine = VllmEngine(
        job.model,
        settings.engine,
        job.client,
        name=settings.base_name,
        stream_pace=settings.stream_pace_ms / 1000,
        on_runs=lambda ids: admission.tell("runs", ids),
        on_ran=lambda ids: admission.tell("ran", ids),
    )
    own = metrics.Metrics(REGISTRY)
    admission.on_abort = engine.abort
    admission.on_bad_keys = own.key_reload_failures.inc
    server: _WorkerServer | None = None

    def stop() -> None:
        if server is not None:
            server.should_exit = True

    app = create_app(
        engine,
        settings,
        own,
        admission=admission,
        progress=lambda _step: None,
        on_failure=stop,
        open_when_ready=job.replaces,
    )
    server = _WorkerServer(app, _share_of(settings))
    server.admission, server.to_supervisor = admission, job.admission
    server.run([job.port])
    failure = app.server_state.failure
    if isinstance(failure, StartupError):
        logs.tell_end(failure)
    sys.exit(1 if failure is not None or server.forced_exit else 0)


class _WorkerServer(Server):
    """A server that connects to the supervisor's accounts before it opens."""

    admission: AdmissionClient
    to_supervisor: socket.socket

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self.admission, sock=self.to_supervisor)
        await super().startup(sockets)


def _share_of(settings: Settings) -> Settings:
    """The settings of one API process: of what is counted in each, its share."""
    limits = settings.limits
    share = math.ceil(limits.max_connections / settings.api_workers)
    return settings.model_copy(
        update={"limits": limits.model_copy(update={"max_connections": share})}
    )


def _bind(family: int, address: Any) -> socket.socket:
    """One of several sockets bound to the same address."""
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound
