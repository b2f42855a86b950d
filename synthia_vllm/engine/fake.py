"""An engine without a model: it says what it is told to, when it is told to.

For tests whose subject is the edge itself (exact pieces, faults that no real engine can be made
to have on demand) and for measuring the edge alone. It keeps the same promises as the real one;
`tests/contract.py` holds both to them. Its tokens are bytes, numbered as Mistral's byte tokens.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from synthia_vllm.engine.base import ModelInfo
from synthia_vllm.errors import ApiError, EngineDead, EngineFault

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from synthia_vllm.engine.base import EngineRequest, Sink

BOS = 1
FIRST_BYTE = 3


@dataclass(frozen=True, slots=True)
class FakeLogprob:
    """A certain token."""

    logprob: float = 0.0
    rank: int = 1


@dataclass(slots=True)
class FakeOutput:
    """One delta of one choice."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, FakeLogprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class FakeEngine:
    """Says `pieces`, each as one step, to every request, pausing `delay` seconds before each."""

    pieces: Sequence[str] = (" Hello", ".", "\nUSER:", " more")
    delay: float = 0.0
    ends_with: str = "stop"
    """The reason with which the last of `pieces` ends, where nothing else did."""
    fault: ApiError | None = None
    """Raised instead of the step number `fault_at`."""
    fault_at: int = 0
    model_info: ModelInfo = field(
        default_factory=lambda: ModelInfo(
            max_model_len=2048,
            vocab_size=32000,
            longest_token=1,
            special_tokens={0: "<unk>", BOS: "<s>", 2: "</s>"},
        )
    )
    seen: list[EngineRequest] = field(default_factory=list)
    """All that was submitted, oldest first."""
    aborted: list[str] = field(default_factory=list)
    """Ids of the requests that were closed before their end."""
    dead: bool = False

    async def start(self, progress: Callable[[str], None]) -> None:
        progress("starting the fake engine")

    async def tokenize(
        self, text: str, *, special_tokens: bool = False, cache_salt: str | None = None
    ) -> list[int]:
        return [BOS, *(FIRST_BYTE + byte for byte in text.encode())]

    def token_bytes(self, token_id: int) -> bytes:
        known = FIRST_BYTE <= token_id < FIRST_BYTE + 256
        return bytes([token_id - FIRST_BYTE]) if known else b""

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        names = self.model_info.special_tokens
        return b"".join(
            names[token].encode() if token in names else self.token_bytes(token)
            for token in token_ids
        ).decode(errors="replace")

    @asynccontextmanager
    async def submit(self, request: EngineRequest, sink: Sink) -> AsyncGenerator[None, None]:
        self.check()
        self.seen.append(request)
        made: list[list[FakeOutput]] = []
        speaking = asyncio.create_task(self._speak(request, sink, made))
        try:
            yield
        finally:
            if not speaking.done():
                speaking.cancel()
                self.aborted.append(request.request_id)
                _tell(made, sink)

    async def _speak(
        self, request: EngineRequest, sink: Sink, made: list[list[FakeOutput]]
    ) -> None:
        """Say it, a step after the other; those that are `made` are told to be."""
        steps = self._steps(request)
        prompt = [{token: FakeLogprob()} for token in request.prompt_token_ids[1:]]
        try:
            for position, step in enumerate(steps):
                await asyncio.sleep(self.delay)
                self.check()
                if self.fault is not None and position == self.fault_at:
                    raise self.fault
                if position == 0 and request.on_prompt is not None:
                    request.on_prompt([None, *prompt])
                made.append(step)
                if request.deltas:
                    for output in step:
                        sink.put(output, 0)
            if not request.deltas:
                for choice in zip(*steps, strict=True):
                    sink.put(_joined(choice), 0)
        except Exception as error:
            _tell(made, sink)
            sink.fail(error if isinstance(error, ApiError) else EngineFault())

    def _steps(self, request: EngineRequest) -> list[list[FakeOutput]]:
        """The steps of `request`, each with an output for every choice, to its first end."""
        said, spent, steps = "", 0, []
        # Held back without `stop_in_text`: as much as may turn out to be a stop string's.
        held, longest = "", 0
        if not request.sampling.stop_in_text:
            longest = max((len(stop) - 1 for stop in request.sampling.stop), default=0)
        for position, piece in enumerate(self.pieces, 1):
            said += piece
            reason = found = None
            if spent >= request.sampling.min_tokens:
                ends = [
                    (said.find(stop) + len(stop), stop)
                    for stop in request.sampling.stop
                    if stop in said
                ]
                if ends:
                    end, found = min(ends)
                    reason = "stop"
                    piece = piece[: len(piece) - (len(said) - end)]  # noqa: PLW2901
            data = piece.encode()
            if reason is None and spent + len(data) >= request.sampling.max_tokens:
                data = data[: request.sampling.max_tokens - spent]
                reason = "length"
            spent += len(data)
            if reason is None and position == len(self.pieces):
                reason = self.ends_with
            tokens = [FIRST_BYTE + byte for byte in data]
            logprobs = None
            if request.sampling.logprobs is not None:
                logprobs = [{token: FakeLogprob()} for token in tokens]
            held += data.decode(errors="ignore")
            sure = len(held) if reason is not None else max(0, len(held) - longest)
            text, held = held[:sure], held[sure:]
            if found is not None and not request.sampling.stop_in_text:
                text = text.removesuffix(found)
            steps.append(
                [
                    FakeOutput(index, text, tokens, logprobs, reason, found)
                    for index in range(request.sampling.n)
                ]
            )
            if reason is not None:
                break
        return steps

    def check(self) -> None:
        if self.dead:
            raise EngineDead

    async def close(self) -> None:
        self.dead = True

    def kill(self) -> None:
        self.dead = True


def _tell(made: Sequence[Sequence[FakeOutput]], sink: Sink) -> None:
    """Tell `sink` of all tokens of the steps that were made."""
    for choice in zip(*made, strict=True):
        sink.ran(choice[0].index, sum(len(output.token_ids) for output in choice), 0)


def _joined(outputs: Sequence[FakeOutput]) -> FakeOutput:
    """One output of all the deltas of a choice."""
    last = outputs[-1]
    logprobs = [place for output in outputs for place in output.logprobs or ()]
    return FakeOutput(
        last.index,
        "".join(output.text for output in outputs),
        [token for output in outputs for token in output.token_ids],
        logprobs if last.logprobs is not None else None,
        last.finish_reason,
        last.stop_reason,
    )
