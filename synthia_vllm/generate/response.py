"""One request for text, valid and ready to run, and the answers to it while they arrive.

Both the streamed and the plain answer go through `Reply`, so they cannot differ.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from synthia_vllm.generate.protocol import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from synthia_vllm.engine.base import Engine, Output, Sink, TokenLogprob, Work
    from synthia_vllm.errors import ApiError
    from synthia_vllm.generate.protocol import StreamOptions


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is valid, tokenised, and fits the context."""

    works: tuple[Work, ...]
    """One for each prompt, all with the same sampling."""
    model: str
    """The served name the client asked for."""
    stream: bool
    usage: Literal["never", "last", "each"]
    """Which events of a stream have the token counts."""
    question: str
    """What the user said last, as it was sent."""
    conversation: bool = True
    """Whether question and answer are a turn of a conversation, to be kept as such."""
    escaped_markers: int = 0
    dropped_messages: int = 0
    ignored: tuple[str, ...] = ()
    """Fields of the request that changed nothing."""
    show_token_ids: bool = False
    """Whether the client wants the tokens themselves, too."""

    def prompt_of(self, choice: int) -> list[int]:
        """The tokens that choice number `choice` is an answer to."""
        return self.works[choice // self.works[0].sampling.n].prompt_token_ids

    def submit(self, engine: Engine, sink: Sink) -> AbstractAsyncContextManager[None]:
        """Run all of it while the context lasts, as `Engine.submit` does one work."""
        if len(self.works) == 1:
            return engine.submit(self.works[0], sink)
        return self._submit_all(engine, sink)

    @asynccontextmanager
    async def _submit_all(self, engine: Engine, sink: Sink) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as running:
            for number, work in enumerate(self.works):
                part = _Part(sink, number * work.sampling.n)
                await running.enter_async_context(engine.submit(work, part))
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

    def put(self, output: Output, cached_tokens: int) -> None:
        moved = _Moved(
            self._first + output.index,
            output.text,
            output.token_ids,
            output.logprobs,
            output.finish_reason,
            output.stop_reason,
        )
        self._sink.put(moved, cached_tokens)

    def fail(self, error: ApiError) -> None:
        self._sink.fail(error)

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        self._sink.ran(self._first + index, tokens, cached_tokens)


class Piece(NamedTuple):
    """What one output, or several in a row, add to one choice's answer."""

    choice: int
    """Which of all choices, from 0; those of the first prompt come first."""
    text: str
    logprobs: list[Any] | None
    finish_reason: str | None
    """``stop`` or ``length`` with the last piece of the choice."""
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    """Those that ran for it, where they are asked for."""
    prompt_logprobs: list[Any] | None = None
    """vLLM's form of those of the prompt, with a choice's first piece, where they are asked for."""

    def then(self, more: Piece) -> Piece:
        """Both pieces as one."""
        logprobs = self.logprobs
        if logprobs is not None or more.logprobs is not None:
            logprobs = [*(logprobs or ()), *(more.logprobs or ())]
        token_ids = self.token_ids
        if token_ids is not None or more.token_ids is not None:
            token_ids = [*(token_ids or ()), *(more.token_ids or ())]
        return Piece(
            self.choice,
            self.text + more.text,
            logprobs,
            more.finish_reason,
            more.stop_reason,
            token_ids,
            self.prompt_logprobs,
        )


def wanted_usage(options: StreamOptions | None) -> Literal["never", "last", "each"]:
    """Which events of a stream shall have the token counts."""
    if options is None or not options.include_usage:
        return "never"
    return "each" if options.continuous_usage_stats else "last"


class Choice(Protocol):
    """The rule for what of the engine's output is one answer."""

    def take(self, output: Output) -> Piece | None:
        """What `output` adds to the answer, if anything; no more after a piece with the end.

        Raises `EngineFault` if the engine ended it for a reason that no client asked for.
        """


class WithTokens:
    """A `Choice` that gives the tokens along with the pieces they came to."""

    __slots__ = ("_choice", "_waiting")

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._waiting: list[int] = []

    def take(self, output: Output) -> Piece | None:
        self._waiting += output.token_ids
        piece = self._choice.take(output)
        if piece is None:
            return None
        token_ids, self._waiting = self._waiting, []
        return piece._replace(token_ids=token_ids)


class Reply:
    """The answers to one prepared request while they arrive, and the tokens they took."""

    __slots__ = (
        "_begun",
        "_choices",
        "_on_begin",
        "_prepared",
        "_texts",
        "_tokens",
        "began_at",
        "cached_tokens",
        "finish_reasons",
        "open_choices",
        "prompt_tokens",
    )

    def __init__(
        self,
        prepared: Prepared,
        choices: Sequence[Choice],
        *,
        began: Callable[[], None] = lambda: None,
        keep_text: bool = False,
    ) -> None:
        self._prepared = prepared
        self._choices: list[Choice | None] = list(choices)
        self._begun = [False] * len(choices)
        self._on_begin = began
        self._texts: list[list[str]] | None = [[] for _ in choices] if keep_text else None
        self.began_at: float | None = None
        """When the first of the answer came, which is when the prompt had run."""
        self.prompt_tokens = 0
        """Of the prompts that have run."""
        self._tokens = [0] * len(choices)
        self.finish_reasons: list[str] = []
        """One for each choice that has ended."""
        self.cached_tokens = 0
        self.open_choices = len(choices)
        """Choices whose end has not come; at 0 the engine need not go on."""

    def take(self, output: Output, cached_tokens: int) -> Piece | None:
        """What `output` adds to its choice's answer, if anything. Raises `EngineFault`."""
        index = output.index
        if not self._begun[index]:
            self._begin(index, cached_tokens)
        self._tokens[index] += len(output.token_ids)
        choice = self._choices[index]
        if choice is None:
            return None
        piece = choice.take(output)
        if piece is None:
            return None
        if piece.finish_reason is not None:
            self._choices[index] = None
            self.open_choices -= 1
            self.finish_reasons.append(piece.finish_reason)
        if self._texts is not None:
            self._texts[index].append(piece.text)
        return piece

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        """As `Sink.ran`: tokens that ran are counted, whoever is there to read them."""
        if not self._begun[index]:
            self._begin(index, cached_tokens)
        self._tokens[index] = tokens

    def _begin(self, index: int, cached_tokens: int) -> None:
        """The prompt of choice `index` has run, and with it all choices of that prompt begin."""
        n = self._prepared.works[0].sampling.n
        first = index - index % n
        self._begun[first : first + n] = [True] * n
        self.prompt_tokens += len(self._prepared.prompt_of(index))
        self.cached_tokens += cached_tokens
        if self.began_at is None:
            self.began_at = time.perf_counter()
            self._on_begin()

    @property
    def answer_tokens(self) -> int:
        """Of all choices, so far."""
        return sum(self._tokens)

    @property
    def texts(self) -> list[str]:
        """The answers so far, if they are kept."""
        return ["".join(pieces) for pieces in self._texts or ()]

    def usage(self) -> Usage:
        """Counts of the tokens that ran."""
        answer_tokens = self.answer_tokens
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=answer_tokens,
            total_tokens=self.prompt_tokens + answer_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=self.cached_tokens,
                dropped_messages=self._prepared.dropped_messages,
            ),
        )
