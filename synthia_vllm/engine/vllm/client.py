"""The seam over vLLM: `Engine` as `AsyncLLM` has it.

The engine core runs in processes of its own; here is its front: `AsyncLLM`, which takes token
ids, batches, streams and aborts. Names of vLLM used outside its documented API are marked
``vLLM internal`` and each has a test that fails when vLLM moves it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from synthia_vllm.engine.base import Grammar, ModelInfo
from synthia_vllm.engine.examples import examples
from synthia_vllm.engine.grammar_checker import GrammarChecker
from synthia_vllm.engine.vllm.errors import translate_error, translate_startup_errors
from synthia_vllm.engine.vllm.hub import revision_of
from synthia_vllm.engine.vllm.launch import (
    CLOSING_SECONDS,
    EngineClientConfig,
    Processors,
    arrange_processes,
    kill_all,
    prepare_process,
)
from synthia_vllm.engine.vllm.options import engine_args, shared_config, versions
from synthia_vllm.engine.vllm.outputs import OutputPath
from synthia_vllm.engine.vllm.pace import Pace
from synthia_vllm.engine.vllm.request import RunningRequest
from synthia_vllm.engine.vllm.sampling_params import sampling_params
from synthia_vllm.engine.vllm.telemetry import stat_logger, trace_phases
from synthia_vllm.engine.vllm.tokenizer import BOS, Tokenizer
from synthia_vllm.engine.vllm.tokenizer_files import settle_tokenizer
from synthia_vllm.errors import ApiError, EngineDead, StartupError, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from synthia_vllm.engine.base import EngineRequest, Sink


class VllmEngine:
    """vLLM, started with `model` (a hub name or directory) and `options` of `AsyncEngineArgs`.

    With a `client_config`, it is one of several clients of engine cores that run already. vLLM's
    series call it by `name`. `stream_pace` is `Pace.seconds`. `on_runs` is called with vLLM's ids
    of a request when it has been taken, `on_ran` when it is over.
    """

    _tokenizer: Tokenizer  # as soon as the model is loaded, as is
    _path: OutputPath

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        client_config: EngineClientConfig | None = None,
        *,
        name: str | None = None,
        stream_pace: float = 0.0,
        on_runs: Callable[[Sequence[str]], None] = lambda _ids: None,
        on_ran: Callable[[Sequence[str]], None] = lambda _ids: None,
    ) -> None:
        self._model = model
        self._options = dict(options)
        self._client_config = client_config
        self._name = name
        self._stream_pace = stream_pace
        self._on_runs = on_runs
        self._on_ran = on_ran
        self._llm: Any = None
        self._model_info: ModelInfo | None = None
        self._grammars: GrammarChecker | None = None
        self._takes_priority = False
        self._closed = False
        self._numbers = itertools.count()
        self._run_directory: str | None = None
        self._processors: Processors | None = None
        self._watched: list[int] = []  # file descriptors of engine cores that are not our children
        self._others = set(multiprocessing.active_children())
        # Loading blocks; the engine's processes are children of the thread in which it did.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    @property
    def model_info(self) -> ModelInfo:
        if self._model_info is None:
            raise Unavailable("The engine is still starting.", code="starting")
        return self._model_info

    async def start(self, progress: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        with translate_startup_errors():
            # A thread that lives as long as the process: the engine's processes are its children.
            await loop.run_in_executor(self._thread, self._start, progress)
        self._grammars = self._grammar_checker()
        try:
            await self._grammars.check(Grammar("regex", "a", ""), 0)
        except ApiError as error:
            raise StartupError("The process that checks grammars does not start.") from error
        if self._client_config is not None:
            for pid in self._client_config.engine_pids:
                ended = os.pidfd_open(pid)
                self._watched.append(ended)
                loop.add_reader(ended, self._engine_ended)

    def _start(self, progress: Callable[[str], None]) -> None:
        if self._client_config is None:
            self._run_directory = prepare_process(self._options)
        progress("loading vLLM")
        from vllm import envs
        from vllm.v1.engine.async_llm import AsyncLLM

        arrange_processes()
        args = engine_args(self._model, self._options, self._name)
        if self._run_directory is not None:
            settle_tokenizer(args, self._run_directory, progress)
        elif self._client_config is not None:
            args.tokenizer = self._client_config.tokenizer
        if self._closed:
            raise StartupError("The server was stopped while it started.")
        progress("starting the engine process, reading weights, allocating the KV cache")
        loggers = [stat_logger()]
        # Not kept in a variable here: something of torch's remembers this frame, and an engine
        # that is still referred to at exit complains when it is finalised.
        if self._client_config is None:
            self._processors = Processors(self._options)
            with self._processors.told():
                self._llm = AsyncLLM.from_engine_args(args, stat_loggers=loggers)
        else:
            self._llm = AsyncLLM.from_vllm_config(
                shared_config(args, self._client_config.clients, self._client_config.number),
                stat_loggers=loggers,
                client_addresses=dict(self._client_config.addresses),
                client_count=self._client_config.clients,
                client_index=self._client_config.number,
            )
        self._inspect()
        # vLLM asks the environment for its switches with every token, unless told to remember.
        # vLLM internal: `vllm.envs.enable_envs_cache`.
        envs.enable_envs_cache()

    def _grammar_checker(self) -> GrammarChecker:
        """What checks grammars in place of vLLM, which would do so in this process.

        vLLM internal: `vllm.v1.engine.input_processor.InputProcessor.structured_outputs_config`,
        by which it checks.
        """
        llm, tokenizer = self._llm, self._tokenizer
        llm.input_processor.structured_outputs_config = None
        return GrammarChecker(
            tokenizer.serialized(),
            max(llm.model_config.get_vocab_size(), tokenizer.vocab_size),
            tokenizer.eos_id,
        )

    def _inspect(self) -> None:
        """Learn what the loaded model and its tokenizer are."""
        llm = self._llm
        scheduler = llm.vllm_config.scheduler_config
        self._takes_priority = scheduler.policy == "priority"
        if llm.output_processor.tracing_enabled:
            trace_phases(llm.output_processor)
        self._path = OutputPath(llm, Pace(self._stream_pace))
        # Asked for with each request, and found anew by transformers, in 20 µs.
        # vLLM internal: `vllm.renderers.base.BaseRenderer.get_eos_token_id`.
        end_of_text = llm.renderer.get_eos_token_id()
        llm.renderer.get_eos_token_id = lambda: end_of_text
        tokenizer = self._tokenizer = Tokenizer(llm.get_tokenizer())
        self._model_info = ModelInfo(
            max_model_len=llm.model_config.max_model_len,
            vocab_size=llm.model_config.get_vocab_size(),
            longest_token=tokenizer.longest_token,
            special_tokens=tokenizer.special_tokens,
            bos=BOS,
            eos=tokenizer.eos,
            max_logprobs=llm.model_config.max_logprobs,
            max_num_seqs=scheduler.max_num_seqs
            * llm.vllm_config.parallel_config.data_parallel_size,
            versions=versions(),
            # transformers keeps there which commit of the hub it read.
            revision=revision_of(
                llm.model_config.model,
                getattr(llm.model_config.hf_config, "_commit_hash", None),
            ),
            examples=examples(self._model),
        )

    async def tokenize(
        self, text: str, *, special_tokens: bool = False, cache_salt: str | None = None
    ) -> list[int]:
        return await self._tokenizer.encode(
            text, special_tokens=special_tokens, cache_salt=cache_salt
        )

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._tokenizer.decode(token_ids)

    @asynccontextmanager
    async def submit(self, request: EngineRequest, sink: Sink) -> AsyncGenerator[None, None]:
        from vllm.inputs import tokens_input

        self.check()
        llm = self._llm
        # Two clients may send the same id; what is aborted by it must be ours alone.
        request_id = f"{request.request_id}-{next(self._numbers)}"
        if request.sampling.grammar is not None and self._grammars is not None:
            await self._grammars.check(request.sampling.grammar, request.priority)
        run = RunningRequest(self._path, sink, request.on_prompt)
        try:
            try:
                collector = await llm.add_request(
                    request_id,
                    tokens_input(request.prompt_token_ids, cache_salt=request.cache_salt),
                    sampling_params(request),
                    priority=request.priority if self._takes_priority else 0,
                    trace_headers=request.trace_headers,
                )
            except Exception as error:
                run.over = True
                raise translate_error(error) from error
            # vLLM internal: `vllm.v1.engine.output_processor.OutputProcessor.external_req_ids`.
            ids = list(llm.output_processor.external_req_ids.get(request_id, ()))
            self._on_runs(ids)
            run.intercept(request_id, collector, self._tokenizer.texts, request.sampling)
            try:
                yield
            finally:
                self._on_ran(ids)
        finally:
            if not run.over:
                run.stop()
                await llm.abort(request_id)

    def check(self) -> None:
        if self._llm is None or self._llm.errored:
            raise EngineDead

    async def abort(self, ids: Sequence[str]) -> None:
        """Free requests by vLLM's ids that another client of the engine has left behind.

        vLLM internal: `vllm.v1.engine.core_client.AsyncMPClient._send_input`, and its
        `vllm.v1.engine.core_client.MPClient.core_engines`; its own `abort` knows only its own
        requests.
        """
        from vllm.v1.engine import EngineCoreRequestType

        if self._llm is None or self._llm.errored:
            return
        client = self._llm.engine_core
        for core in client.core_engines:
            await client._send_input(EngineCoreRequestType.ABORT, list(ids), core)

    def _engine_ended(self) -> None:
        """Do what vLLM does when it sees the end of an engine core that is its child.

        vLLM internal: `vllm.v1.engine.core_client.MPClient.resources`,
        `vllm.v1.engine.core_client.BackgroundResources.engine_dead`,
        `vllm.v1.engine.core_client.MPClient.shutdown`.
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
        if self._grammars is not None:
            await self._grammars.close()
        llm, self._llm = self._llm, None
        if llm is None:
            self.kill()
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, llm.shutdown, CLOSING_SECONDS)
            del llm
            gc.collect()  # see `_start`
        self._thread.shutdown(wait=False)
        if self._model_info is not None:
            self._tokenizer.close()
        self._cleanup()

    def kill(self) -> None:
        kill_all(set(multiprocessing.active_children()) - self._others)
        self._cleanup()

    def _cleanup(self) -> None:
        if self._processors is not None:
            self._processors.release()
        if self._run_directory is not None:
            shutil.rmtree(self._run_directory, ignore_errors=True)
