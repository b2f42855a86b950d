"""Starting vLLM, and the processes it runs in.

Names of vLLM used outside its documented API are marked ``vLLM internal`` and each has a test that
fails when vLLM moves it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.engine.vllm import cores, forkserver, watchdog
from synthia_vllm.engine.vllm.errors import translate_startup_errors
from synthia_vllm.engine.vllm.options import engine_args, prepare_environment, shared_config
from synthia_vllm.engine.vllm.tokenizer_files import settle_tokenizer
from synthia_vllm.errors import EngineDead, StartupError
from synthia_vllm.settings import gpu_present
from synthia_vllm.telemetry import logs, metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from multiprocessing.process import BaseProcess

# Seconds that the engine core gets to end by itself. What it holds is of no use to anyone then.
CLOSING_SECONDS: Final = 1.0

# What vLLM's processes on a CPU import, all together most of their time to start.
_FORKED_WITH: Final = (
    "synthia_vllm.engine.vllm.forked_first",
    "synthia_vllm.engine.vllm.client",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.mistral",
)


_BINDING: Final = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True, slots=True)
class EngineClientConfig:
    """A process's way to engine cores that another process has started (`EngineCores`)."""

    number: int
    """Of `clients`, from 0."""
    clients: int
    """How many there are."""
    addresses: Mapping[str, Any]
    """vLLM's, with the sockets that the engine cores connect to."""
    engine_pids: tuple[int, ...]
    """When one of these ends, the engine is dead."""
    tokenizer: str | None
    """Where it is, if not with the model (`settle_tokenizer`)."""

    def close_sockets(self) -> None:
        """Close the sockets here: the process that was given them has its own."""
        self.addresses["input_listener"].close()
        self.addresses["output_listener"].close()


class EngineCores:
    """vLLM's engine processes by themselves, for a number of clients in other processes.

    vLLM internal: the functions with which `vllm serve` starts several API processes,
    `vllm.v1.engine.utils.launch_core_engines` and
    `vllm.v1.engine.utils.bind_engine_zmq_listeners`.

    All of this blocks; `launch` and `wait` are for one thread, which lives as long as the process.
    """

    def __init__(self, model: str, options: Mapping[str, Any], name: str | None = None) -> None:
        self._model = model
        self._options = dict(options)
        self._name = name
        self._run_directory: str | None = None
        self._launching: Any = None
        self._launch: Any = None
        self._processes: tuple[Any, ...] = ()
        self._listeners: Any = None
        self._processors = Processors(options)
        self._closed = False

    def launch(self, clients: int, progress: Callable[[str], None]) -> list[EngineClientConfig]:
        """Start the processes; return what each client needs. Raises `StartupError`."""
        with translate_startup_errors():
            self._run_directory = prepare_process(self._options, share_metrics=True)
            progress("loading vLLM")
            from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
            from vllm.v1.executor import Executor

            arrange_processes()
            args = engine_args(self._model, self._options, self._name)
            settle_tokenizer(args, self._run_directory, progress)
            config = shared_config(args, clients, -1)
            if self._closed:
                raise StartupError("The server was stopped while it started.")
            progress("starting the engine process, reading weights, allocating the KV cache")
            # Not in a variable: see `VllmEngine`. It closes itself when it is forgotten.
            self._listeners = bind_engine_zmq_listeners(config, clients)
            self._launching = launch_core_engines(
                config, Executor.get_class(config), True, self._listeners.addresses
            )
            with self._processors.told():
                self._launch = self._launching.__enter__()
            more: dict[str, Any] = {}
            processes = [*self._launch.engine_manager.processes]
            coordinator = self._launch.coordinator  # of several engine cores
            if coordinator is not None:
                more["stats_update_address"] = coordinator.get_stats_publish_address()
                processes.append(coordinator.proc)
            self._processes = tuple(processes)
            return [
                EngineClientConfig(
                    number,
                    clients,
                    {
                        "input_address": taking.address,
                        "output_address": giving.address,
                        "input_listener": taking.socket,
                        "output_listener": giving.socket,
                        **more,
                    },
                    tuple(process.pid for process in processes),
                    args.tokenizer,
                )
                for number, (taking, giving) in enumerate(
                    zip(self._listeners.inputs, self._listeners.outputs, strict=True)
                )
            ]

    def wait(self) -> None:
        """Return when the engine can run requests. Raises `StartupError`."""
        with translate_startup_errors():
            self._launching.__exit__(None, None, None)

    def check(self) -> None:
        """Return if the processes run; raise `EngineDead` if not."""
        if any(process.exitcode is not None for process in self._processes):
            raise EngineDead

    def close(self) -> None:
        """Stop the processes; wait until they are gone."""
        self._closed = True
        if self._launch is not None:
            self._launch.engine_manager.shutdown(CLOSING_SECONDS)
            if self._launch.coordinator is not None:
                self._launch.coordinator.shutdown()
        self.cleanup()

    def kill(self) -> None:
        """End the processes at once; also while they start. `close` is still to be called."""
        self._closed = True
        kill_all(multiprocessing.active_children())

    def cleanup(self) -> None:
        """Leave nothing behind but, perhaps, processes that are about to end."""
        self._listeners = None
        self._processors.release()
        if self._run_directory is not None:
            shutil.rmtree(self._run_directory, ignore_errors=True)


def kill_all(processes: Iterable[BaseProcess]) -> None:
    """End `processes` and all below them, and wait until they are gone."""
    for process in processes:
        from vllm.utils.system_utils import kill_process_tree

        if process.pid is not None:
            kill_process_tree(process.pid)
        process.join(CLOSING_SECONDS)


def api_process(target: Callable[[Any], None], job: object, name: str) -> BaseProcess:
    """A process that is not yet started, for a client of `EngineCores`: calls `target(job)`."""
    context: Any = multiprocessing.get_context("spawn")
    if not gpu_present():
        context = forkserver.Context()
    process: BaseProcess = context.Process(target=target, args=(job,), name=name)
    return process


def prepare_process(options: Mapping[str, Any], *, share_metrics: bool = False) -> str:
    """What comes before vLLM is imported. Returns a directory, to be removed at the end.

    With `share_metrics`, the processes that are started later keep their metrics in it, too.
    """
    prepare_environment(options)
    # A directory of our own for vLLM's sockets, which it leaves behind; and for its processes the
    # PID whose exit must end them (see `watchdog.py`).
    directory = tempfile.mkdtemp(prefix="synthia-vllm-")
    os.environ["VLLM_RPC_BASE_PATH"] = directory
    os.environ[watchdog.DIRECTORY] = directory
    os.environ[watchdog.SERVER] = str(os.getpid())
    if share_metrics:
        metrics.share_in(directory)
    if logs.is_json():
        _have_json_logged(Path(directory, "logging.json"))
    if not gpu_present():
        forkserver.begin(_FORKED_WITH)
    return directory


def _have_json_logged(file: Path) -> None:
    """Have vLLM's processes log as this one does. What the user has set stands."""
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"log": {"()": "synthia_vllm.telemetry.logs.json_handler"}},
        "root": {"handlers": ["log"]},
        "loggers": {"vllm": {"level": os.environ["VLLM_LOGGING_LEVEL"]}},
    }
    file.write_text(json.dumps(config))
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(file))
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars are no lines


class Processors:
    """Those that an engine on a CPU is bound to: such as no other server has.

    What the user has set stands; several engine processes are vLLM's to distribute.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        several = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        left = _BINDING in os.environ or any(options.get(name, 1) != 1 for name in several)
        self._claim: cores.Claim | None = None
        if not left and not gpu_present():
            self._claim = cores.Claim(cores.physical_cores())

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell processes that are started now, and nobody else."""
        if self._claim is None or self._claim.mine is None:
            yield
            return
        # Another server runs here; with nothing left, Linux may divide what there is.
        os.environ[_BINDING] = ",".join(map(str, self._claim.mine)) or "nobind"
        try:
            yield
        finally:
            del os.environ[_BINDING]

    def release(self) -> None:
        """The engine is gone."""
        if self._claim is not None:
            self._claim.release()


def arrange_processes() -> None:
    """Have a say in how vLLM starts its processes.

    Its engine core is forked from the fork server, on a CPU. The coordinator of several engine
    cores loads no plugins, so it is given its watchdog here.

    vLLM internal: `vllm.v1.engine.coordinator.get_mp_context`,
    `vllm.v1.engine.utils.get_mp_context`.
    """
    from vllm.v1.engine import coordinator, utils

    coordinator.get_mp_context = lambda: forkserver.Context(watchdog.attach)
    if not gpu_present():
        utils.get_mp_context = lambda: forkserver.Context(_fork_worker)


def _fork_worker() -> None:
    """In the engine core: let vLLM fork the worker from it.

    vLLM internal: `vllm.v1.executor.multiproc_executor.get_mp_context`.
    """
    from vllm.v1.executor import multiproc_executor

    os.register_at_fork(after_in_child=_begin_worker)
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")


def _begin_worker() -> None:
    forkserver.use_processors()
    watchdog.attach()  # vLLM loads its plugins once, and believes it has
