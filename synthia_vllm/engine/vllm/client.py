"""The seam over vLLM, which `engine/vllm/launch.py` starts: only these two modules know `vllm`.

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
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Final

from synthia_vllm.engine.base import Grammar, Traits
from synthia_vllm.engine.grammar_checker import GrammarChecker
from synthia_vllm.engine.vllm.detokenizer import TableDetokenizer, table
from synthia_vllm.engine.vllm.launch import (
    CLOSING_SECONDS,
    Processors,
    Seat,
    arrange_processes,
    begin,
    engine_args,
    kill_all,
    plain_words,
    shared_config,
    versions,
)
from synthia_vllm.errors import (
    ApiError,
    EngineDead,
    EngineFault,
    InvalidRequest,
    StartupError,
    Unavailable,
)
from synthia_vllm.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from synthia_vllm.engine.base import PromptLogprobs, Sampling, Sink, Work

logger = logging.getLogger(__name__)

# Characters that are tokenised in so short a time (0.1 ms, of Japanese 0.45) that a thread would
# cost more.
_SHORT_TEXT: Final = 1000


class VllmEngine:
    """vLLM, started with `model` (a hub name or directory) and `options` of `AsyncEngineArgs`.

    With a `seat`, it is one of several clients of engine cores that run already. vLLM's series
    call it by `name`. `on_runs` is called with vLLM's ids of a request when it has been taken,
    `on_ran` when it is over.
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        seat: Seat | None = None,
        *,
        name: str | None = None,
        on_runs: Callable[[Sequence[str]], None] = lambda _ids: None,
        on_ran: Callable[[Sequence[str]], None] = lambda _ids: None,
    ) -> None:
        self._model = model
        self._options = dict(options)
        self._seat = seat
        self._name = name
        self._on_runs = on_runs
        self._on_ran = on_ran
        self._llm: Any = None
        self._traits: Traits | None = None
        self._grammars: GrammarChecker | None = None
        self._takes_priority = False
        self._closed = False
        self._numbers = itertools.count()
        self._run_directory: str | None = None
        self._processors: Processors | None = None
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
        with plain_words():
            # A thread that lives as long as the process: the engine's processes are its children.
            await loop.run_in_executor(self._threads, self._start, progress)
        self._grammars = self._grammar_checker()
        try:
            await self._grammars.check(Grammar("regex", "a", ""), 0)
        except ApiError as error:
            raise StartupError("The process that checks grammars does not start.") from error
        if self._seat is not None:
            for pid in self._seat.engine_pids:
                ended = os.pidfd_open(pid)
                self._watched.append(ended)
                loop.add_reader(ended, self._engine_ended)

    def _start(self, progress: Callable[[str], None]) -> None:
        if self._seat is None:
            self._run_directory = begin(self._options)
        progress("loading vLLM")
        from vllm import envs
        from vllm.v1.engine.async_llm import AsyncLLM

        arrange_processes()
        args = engine_args(self._model, self._options, self._name)
        if self._closed:
            raise StartupError("The server was stopped while it started.")
        progress("starting the engine process, reading weights, allocating the KV cache")
        loggers = [_stat_logger()]
        # Not kept in a variable here: something of torch's remembers this frame, and an engine
        # that is still referred to at exit complains when it is finalised.
        if self._seat is None:
            self._processors = Processors(self._options)
            with self._processors.told():
                self._llm = AsyncLLM.from_engine_args(args, stat_loggers=loggers)
        else:
            self._llm = AsyncLLM.from_vllm_config(
                shared_config(args, self._seat.seats, self._seat.number),
                stat_loggers=loggers,
                client_addresses=dict(self._seat.addresses),
                client_count=self._seat.seats,
                client_index=self._seat.number,
            )
        self._look_around()
        # vLLM asks the environment for its switches with every token, unless told to remember.
        envs.enable_envs_cache()  # vLLM internal

    def _grammar_checker(self) -> GrammarChecker:
        """What checks grammars in place of vLLM, which would do so in this process.

        vLLM internal: `InputProcessor.structured_outputs_config`, by which it checks.
        """
        llm = self._llm
        llm.input_processor.structured_outputs_config = None
        tokenizer = llm.get_tokenizer()
        return GrammarChecker(
            self._encoders[True].to_str(),
            max(llm.model_config.get_vocab_size(), len(tokenizer)),
            tokenizer.eos_token_id,
        )

    def _look_around(self) -> None:
        """Learn what the loaded model and its tokenizer are."""
        llm = self._llm
        scheduler = llm.vllm_config.scheduler_config
        self._takes_priority = scheduler.policy == "priority"
        tokenizer = llm.get_tokenizer()
        if llm.output_processor.tracing_enabled:
            _trace_phases(llm.output_processor)
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
            special_tokens={
                token_id: str(self._token(token_id)) for token_id in tokenizer.all_special_ids
            },
            bos=tokenizer.bos_token,
            eos=tokenizer.eos_token,
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

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        loop = asyncio.get_running_loop()
        decode = self._encoders[True].decode
        text: str = await loop.run_in_executor(
            self._threads, partial(decode, list(token_ids), skip_special_tokens=False)
        )
        return text

    @asynccontextmanager
    async def submit(self, work: Work, sink: Sink) -> AsyncGenerator[None, None]:
        from vllm.inputs import tokens_input

        self.check()
        llm = self._llm
        # Two clients may send the same id; what is aborted by it must be ours alone.
        request_id = f"{work.request_id}-{next(self._numbers)}"
        if work.sampling.grammar is not None and self._grammars is not None:
            await self._grammars.check(work.sampling.grammar, work.priority)
        run = _Run(sink, work.on_prompt)
        try:
            try:
                collector = await llm.add_request(
                    request_id,
                    tokens_input(work.prompt_token_ids, cache_salt=work.cache_salt),
                    _sampling_params(work),
                    priority=work.priority if self._takes_priority else 0,
                    trace_headers=work.trace_headers,
                )
            except Exception as error:
                run.over = True
                raise _meaning(error) from error
            ids = list(llm.output_processor.external_req_ids.get(request_id, ()))  # vLLM internal
            self._on_runs(ids)
            run.take_over(llm, request_id, collector, self._table, work.sampling)
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
        if self._grammars is not None:
            await self._grammars.close()
        llm, self._llm = self._llm, None
        if llm is None:
            self.kill()
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, llm.shutdown, CLOSING_SECONDS)
            del llm
            gc.collect()  # see `_start`
        self._threads.shutdown(wait=False)
        self._tidy()

    def kill(self) -> None:
        kill_all(set(multiprocessing.active_children()) - self._others)
        self._tidy()

    def _tidy(self) -> None:
        if self._processors is not None:
            self._processors.release()
        if self._run_directory is not None:
            shutil.rmtree(self._run_directory, ignore_errors=True)


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


def _trace_phases(processor: Any) -> None:
    """Make spans of a request's phases, whose lengths vLLM puts into attributes of its one span.

    vLLM internal: `OutputProcessor.do_tracing`, and the times in `RequestState.stats`, which are
    the engine core's monotonic clock: the system's, so they can be told in this process.
    """
    from opentelemetry import trace
    from vllm.tracing import extract_trace_context

    own = processor.do_tracing
    tracer = trace.get_tracer("synthia_vllm.engine")

    def do_tracing(output: Any, state: Any, iteration: Any) -> None:
        own(output, state, iteration)
        context = extract_trace_context(output.trace_headers)
        at = state.stats
        began = time.time_ns() - time.monotonic_ns()
        marks = (at.queued_ts, at.scheduled_ts, at.first_token_ts, at.last_token_ts)
        times = [began + int(1e9 * mark) for mark in marks]
        for name, (start, end) in zip(("queue", "prefill", "decode"), pairwise(times), strict=True):
            tracer.start_span(name, context, start_time=start).end(end)

    processor.do_tracing = do_tracing


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
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        StructuredOutputsParams,
    )

    asked: Sampling = work.sampling
    structured = None
    if asked.grammar is not None:
        structured = StructuredOutputsParams(**{asked.grammar.kind: asked.grammar.text})
        structured._backend = "guidance"  # vLLM internal: its check would set it
    repetition = None
    if asked.repetition is not None:
        repetition = RepetitionDetectionParams(*asked.repetition)
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
        # For chat the answer rule decides what of a stop string is sent; with it in the text vLLM
        # holds nothing back: a token is delivered when it is made, not four characters later.
        include_stop_str_in_output=asked.stop_in_text,
        max_tokens=asked.max_tokens,
        min_tokens=asked.min_tokens,
        ignore_eos=asked.ignore_eos,
        stop_token_ids=list(asked.stop_token_ids),
        bad_words=list(asked.bad_words),
        allowed_token_ids=None
        if asked.allowed_token_ids is None
        else list(asked.allowed_token_ids),
        skip_special_tokens=asked.skip_special_tokens,
        spaces_between_special_tokens=asked.spaces_between_special_tokens,
        repetition_detection=repetition,
        stream_interval=asked.stream_interval,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs if work.on_prompt is not None else None,
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

    __slots__ = ("_id", "_on_prompt", "_processor", "_sink", "_state", "over")

    def __init__(self, sink: Sink, on_prompt: Callable[[PromptLogprobs], None] | None) -> None:
        self._sink = sink
        self._on_prompt = on_prompt
        self._processor: Any = None
        self._id = ""
        self._state: Any = None
        self.over = False

    def take_over(
        self,
        llm: Any,
        request_id: str,
        collector: Any,
        table: Mapping[int, str],
        asked: Sampling,
    ) -> None:
        """Stand in for `collector`, in which vLLM's output handler puts what it has.

        vLLM internal: `RequestOutputCollector.put`; for a request of one choice, its detokenizer;
        and for a stream without log-probabilities, which most are,
        `RequestState.make_request_output`.
        """
        from vllm.sampling_params import RequestOutputKind

        self._processor, self._id = llm.output_processor, request_id
        collector.put = self.put
        state = llm.output_processor.request_states.get(collector.request_id)
        # What a table does not do: hold back or leave out stops, show special tokens.
        others = not asked.skip_special_tokens or (
            not asked.stop_in_text and (asked.stop or asked.stop_token_ids)
        )
        if state is not None and state.prompt_token_ids[-1] in table and not others:
            own = state.detokenizer
            # With `min_tokens` stops are not looked for at first, which is vLLM's to know.
            if not own.token_ids and not own.min_tokens:
                state.detokenizer = TableDetokenizer(table, own.stop, own)
        if (
            state is not None
            and state.parent_req is None
            and state.output_kind == RequestOutputKind.DELTA
            and state.stream_interval == 1
            and self._on_prompt is None
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
            self.stop()
            self._sink.fail(_meaning(output))
            return
        if output.finished:
            self.end()
        if self._on_prompt is not None and output.prompt_logprobs:
            self._on_prompt(output.prompt_logprobs)
            self._on_prompt = None
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

    def stop(self) -> None:
        """End before the end: tell of the tokens that ran.

        vLLM internal: the states of its `OutputProcessor`, which counts the same tokens in its
        metrics; and of several choices the outputs that `ParentRequest` keeps until all are there.
        """
        processor = self._processor
        ids = processor.external_req_ids.get(self._id, ()) if processor is not None else ()
        for state in [processor.request_states[one] for one in ids]:
            if not state.is_prefilling:
                tokens = state.detokenizer.num_output_tokens()
                self._sink.ran(state.request_index, tokens, state.num_cached_tokens)
            for kept in state.parent_req.output_aggregator if state.parent_req is not None else ():
                if kept is not None:
                    self._sink.ran(kept.index, len(kept.token_ids), state.num_cached_tokens)
        self.end()

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


def _meaning(error: Exception) -> ApiError:
    """The error of our tree that `error` of vLLM means."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError  # vLLM internal
    from vllm.v1.engine.exceptions import EngineDeadError  # vLLM internal

    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return EngineDead()
    if isinstance(error, GracefulHTTPError):
        return Unavailable("The server is full. Try again in a moment.", code="server_full")
    if isinstance(error, VLLMClientError):
        return InvalidRequest(str(error)[:500], code="invalid_value")
    logger.error("a request failed in the engine", exc_info=error)
    return EngineFault()
