"""One request for text, valid and ready to run, and the answers to it while they arrive.

Both the streamed and the plain answer go through `ResponseState`, so they cannot differ.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from synthia_vllm.generate.protocol import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from synthia_vllm.engine.base import Engine, EngineRequest, Output, Sink, TokenLogprob
    from synthia_vllm.errors import ApiError
    from synthia_vllm.generate.protocol import SamplingRequest, UsageEvents


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is valid, tokenised, and fits the context."""

    request: SamplingRequest
    """What was asked, in the form of its route."""
    engine_requests: tuple[EngineRequest, ...]
    """One for each prompt, all with the same sampling."""
    choices: tuple[Choice, ...]
    """The rule for each answer; those to the first prompt come first."""
    usage: UsageEvents
    question: str
    """What the user said last, as it was sent."""
    conversation: bool = True
    """Whether question and answer are a turn of a conversation, to be kept as such."""
    escaped_markers: int = 0
    dropped_messages: int = 0

    @property
    def model(self) -> str:
        """The served name the client asked for."""
        return self.request.model

    @property
    def stream(self) -> bool:
        """Whether the answer is sent as it is made."""
        return bool(self.request.stream)

    def prompt_of(self, choice: int) -> list[int]:
        """The tokens that choice number `choice` is an answer to."""
        return self.engine_requests[choice // self.engine_requests[0].sampling.n].prompt_token_ids

    def submit(self, engine: Engine, sink: Sink) -> AbstractAsyncContextManager[None]:
        """Run all of it while the context lasts, as `Engine.submit` does one."""
        if len(self.engine_requests) == 1:
            return engine.submit(self.engine_requests[0], sink)
        return self._submit_all(engine, sink)

    @asynccontextmanager
    async def _submit_all(self, engine: Engine, sink: Sink) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as running:
            for number, request in enumerate(self.engine_requests):
                part = _Part(sink, number * request.sampling.n)
                await running.enter_async_context(engine.submit(request, part))
            yield


@dataclass(slots=True)
class _Moved:
    """An `Output` under the index its choice has in the whole request."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, TokenLogprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


class _Part:
    """The sink of one of several prompts."""

    def __init__(self, sink: Sink, first: int) -> None:
        self._sink = sink
        self._first = first

    def put(self, output: Output, cached_tokens: int) -> bool:
        moved = _Moved(
            self._first + output.index,
            output.text,
            output.token_ids,
            output.logprobs,
            output.finish_reason,
            output.stop_reason,
        )
        return self._sink.put(moved, cached_tokens)

    def fail(self, error: ApiError) -> None:
        self._sink.fail(error)

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        self._sink.ran(self._first + index, tokens, cached_tokens)


class Delta(NamedTuple):
    """What one output, or several in a row, add to one choice's answer."""

    choice: int
    """Which of all choices, from 0; those of the first prompt come first."""
    text: str
    logprobs: list[Any] | None
    finish_reason: str | None
    """``stop`` or ``length`` with the last delta of the choice."""
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    """Those that ran for it, where they are asked for."""
    prompt_logprobs: list[Any] | None = None
    """vLLM's form of those of the prompt, with a choice's first delta, where they are asked for."""

    def then(self, more: Delta) -> Delta:
        """Both as one."""
        logprobs = self.logprobs
        if logprobs is not None or more.logprobs is not None:
            logprobs = [*(logprobs or ()), *(more.logprobs or ())]
        token_ids = self.token_ids
        if token_ids is not None or more.token_ids is not None:
            token_ids = [*(token_ids or ()), *(more.token_ids or ())]
        return Delta(
            self.choice,
            self.text + more.text,
            logprobs,
            more.finish_reason,
            more.stop_reason,
            token_ids,
            self.prompt_logprobs,
        )


class Choice(Protocol):
    """The rule for what of the engine's output is one answer."""

    def take(self, output: Output) -> Delta | None:
        """What `output` adds to the answer, if anything; no more after one with the end.

        Raises `EngineFault` if the engine ended it for a reason that no client asked for.
        """


class WithTokens:
    """A `Choice` that gives the tokens along with the deltas they came to."""

    __slots__ = ("_choice", "_waiting")

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._waiting: list[int] = []

    def take(self, output: Output) -> Delta | None:
        self._waiting += output.token_ids
        delta = self._choice.take(output)
        if delta is None:
            return None
        token_ids, self._waiting = self._waiting, []
        return delta._replace(token_ids=token_ids)


class ResponseState:
    """The answers to one prepared request while they arrive, and the tokens they took.

    `began` is called when the first prompt has run.
    """

    __slots__ = (
        "_began_at",
        "_choices",
        "_on_begin",
        "_texts",
        "_tokens",
        "begun",
        "cached_tokens",
        "created",
        "fingerprint",
        "finish_reasons",
        "first_text_at",
        "open_choices",
        "prepared",
        "prompt_tokens",
        "request_id",
        "token_seconds",
    )

    def __init__(
        self,
        prepared: Prepared,
        request_id: str,
        *,
        began: Callable[[], None] = lambda: None,
        keep_text: bool = False,
        fingerprint: str = "",
    ) -> None:
        choices = prepared.choices
        self.prepared = prepared
        self.request_id = request_id
        self.created = int(time.time())
        """Seconds since 1970."""
        self.fingerprint = fingerprint
        """What the same request may be answered otherwise by when it is another."""
        self._choices: list[Choice | None] = list(choices)
        self._began_at: list[float | None] = [None] * len(choices)
        self._on_begin = began
        self._texts: list[list[str]] | None = [[] for _ in choices] if keep_text else None
        self.begun = False
        """Whether a prompt has run."""
        self.first_text_at: float | None = None
        """When the first text of a stream was there to be sent (`time.perf_counter`)."""
        self.prompt_tokens = 0
        """Of the prompts that have run."""
        self._tokens = [0] * len(choices)
        self.finish_reasons: list[str] = []
        """One for each choice that has ended."""
        self.token_seconds: list[float] = []
        """The mean time between two tokens, of each choice that has ended and has two."""
        self.cached_tokens = 0
        self.open_choices = len(choices)
        """Choices whose end has not come; at 0 the engine need not go on."""

    def take(self, output: Output, cached_tokens: int) -> Delta | None:
        """What `output` adds to its choice's answer, if anything. Raises `EngineFault`."""
        index = output.index
        if self._began_at[index] is None:
            self._begin(index, cached_tokens)
        self._tokens[index] += len(output.token_ids)
        choice = self._choices[index]
        if choice is None:
            return None
        delta = choice.take(output)
        if delta is None:
            return None
        if delta.finish_reason is not None:
            self._choices[index] = None
            self.open_choices -= 1
            self.finish_reasons.append(delta.finish_reason)
            self._note_pace(index)
        if self._texts is not None:
            self._texts[index].append(delta.text)
        return delta

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        """As `Sink.ran`: tokens that ran are counted, whoever is there to read them."""
        if self._began_at[index] is None:
            self._begin(index, cached_tokens)
        self._tokens[index] = tokens

    def _begin(self, index: int, cached_tokens: int) -> None:
        """The prompt of choice `index` has run, and with it all choices of that prompt begin."""
        n = self.prepared.engine_requests[0].sampling.n
        first = index - index % n
        self._began_at[first : first + n] = [time.perf_counter()] * n
        self.prompt_tokens += len(self.prepared.prompt_of(index))
        self.cached_tokens += cached_tokens
        if not self.begun:
            self.begun = True
            self._on_begin()

    def _note_pace(self, index: int) -> None:
        """Choice `index` is whole. Its first token is the prompt's time, and not the pace's."""
        began, tokens = self._began_at[index], self._tokens[index]
        if began is not None and tokens > 1:
            self.token_seconds.append((time.perf_counter() - began) / (tokens - 1))

    @property
    def answer_tokens(self) -> int:
        """Of all choices, so far."""
        return sum(self._tokens)

    @property
    def texts(self) -> list[str]:
        """The answers so far, if they are kept."""
        return ["".join(texts) for texts in self._texts or ()]

    def usage(self) -> Usage:
        """Counts of the tokens that ran."""
        answer_tokens = self.answer_tokens
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=answer_tokens,
            total_tokens=self.prompt_tokens + answer_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=self.cached_tokens,
                dropped_messages=self.prepared.dropped_messages,
            ),
        )


class ResponseCollector:
    """The plain answer: a sink that puts together what a stream would have sent."""

    def __init__(self, state: ResponseState) -> None:
        self._state = state
        self._deltas: dict[int, Delta] = {}
        self._error: Exception | None = None
        self._over = asyncio.Event()

    def put(self, output: Output, cached_tokens: int) -> bool:
        """Take what the engine says next."""
        try:
            delta = self._state.take(output, cached_tokens)
        except Exception as error:  # the caller serves every other request, too
            self._end(error)
            return False
        if delta is not None:
            before = self._deltas.get(delta.choice)
            self._deltas[delta.choice] = delta if before is None else before.then(delta)
        if not self._state.open_choices:
            self._over.set()
        return False

    def fail(self, error: ApiError) -> None:
        """End with `error`."""
        self._end(error)

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        """Count what ran."""
        self._state.ran(index, tokens, cached_tokens)

    async def choices(self) -> list[Delta]:
        """Each choice, whole. Raises what ended the request before."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return [self._deltas[choice] for choice in sorted(self._deltas)]

    def _end(self, error: Exception) -> None:
        self._error = error
        self._over.set()
