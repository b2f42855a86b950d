"""The seam: all the server knows of an inference engine.

One engine takes valid requests and streams what it generates. There are two: `VllmEngine`
(`engine/vllm/client.py`), and `FakeEngine` (`engine/fake.py`) for tests of the edge; one contract
test holds both to what is written here.

What flows out per token has the attribute names of vLLM's own `CompletionOutput`, so that the real
engine's objects pass through unchanged: nothing is copied per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from synthia_vllm.errors import ApiError


@dataclass(frozen=True, slots=True)
class Grammar:
    """Only text that it admits is generated, and where it ends, the answer does."""

    kind: Literal["json", "regex", "grammar"]
    """A JSON schema, a regular expression, or EBNF (Lark's, or GBNF)."""
    text: str
    param: str
    """The field of the request that brought it, for errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens and when to stop. Names, meanings and units are vLLM's."""

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_in_text: bool = True
    """Whether a stop string found ends the text; if not, it and its beginnings are held back."""
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    repetition: tuple[int, int, int] | None = None
    """End an answer that repeats itself: the longest and the shortest pattern, and how often."""
    stream_interval: int | None = None
    """Tokens to an output, after the first one."""
    logprobs: int | None = None
    """How many of the most likely tokens to report at each place; `None` for no report at all."""
    prompt_logprobs: int | None = None
    """The same for the prompt, see `EngineRequest.on_prompt`."""
    logit_bias: Mapping[int, float] | None = None
    grammar: Grammar | None = None


class TokenLogprob(Protocol):
    """The log-probability (natural, before temperature) of one token at one place."""

    @property
    def logprob(self) -> float: ...

    @property
    def rank(self) -> int | None: ...


PromptLogprobs = Sequence[Mapping[int, TokenLogprob] | None]
"""By token id, for each token of a prompt; `None` for the first, which nothing comes before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One request as the engine gets it: valid, tokenised, and within the context."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: Sampling
    deltas: bool = True
    """Whether each step is delivered as it is made, or only the whole at the end."""
    cache_salt: str | None = None
    """Only requests with the same one find what the prefix cache has of this one's prompt."""
    priority: int = 0
    """Of those that wait, the smallest goes first; among equals, the one that came first."""
    trace_headers: Mapping[str, str] | None = None
    """W3C trace context that the engine's own spans are put below."""
    on_prompt: Callable[[PromptLogprobs], None] | None = None
    """Called before the first output, as a `Sink` is, with the prompt's log-probabilities, of as
    many tokens a place as `Sampling.prompt_logprobs`. It costs memory by the prompt's length, and
    the prefix cache is not read.
    """


class Output(Protocol):
    """What one step, or the whole of a request without `deltas`, brought for one choice."""

    @property
    def index(self) -> int:
        """Which of the `n` choices."""

    @property
    def text(self) -> str:
        """The new text. It ends with the stop string found, if `Sampling.stop_in_text`."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The new tokens."""

    @property
    def logprobs(self) -> Sequence[Mapping[int, TokenLogprob]] | None:
        """By token id, for each new token; the token itself is always among them."""

    @property
    def finish_reason(self) -> str | None:
        """With the last output of a choice, else `None`.

        One of ``stop``, ``length``, ``repetition``, ``abort``, ``error``.
        """

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or stop token found, whose text ends the output's if `stop_in_text`;
        `None` for the end-of-text token.
        """


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the loaded model can do."""

    max_model_len: int
    """Tokens of prompt and answer together."""
    vocab_size: int
    longest_token: int
    """The most characters one token can stand for."""
    special_tokens: Mapping[int, str] = field(default_factory=dict)
    """The names of tokens that stand for no text, by id: ``</s>`` and the like."""
    bos: str = "<s>"
    """The special token that begins a prompt."""
    eos: str = "</s>"
    """The one that ends an answer."""
    max_logprobs: int = 20
    max_num_seqs: int = 256
    """Answers that are generated at the same time; more wait."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the software below the seam, by package name."""
    revision: str = ""
    """What the weights and the tokenizer are another of when it is another."""
    examples: tuple[str, ...] = ()
    """Questions that the model was made to answer; none for one that answers any."""


class Sink(Protocol):
    """Where the outputs of one request go.

    Pushed and not pulled: all requests of the engine's step are served in one go, without a task
    to wake up for each. The methods are called on the event loop, return at once and never raise.
    """

    def put(self, output: Output, cached_tokens: int) -> bool:
        """Take the next output; the last one of each choice carries its `finish_reason`.

        `cached_tokens` is how many of the prompt's tokens the prefix cache served. Returns whether
        a reader has text of it: what comes next for that choice may then wait for more.
        """

    def fail(self, error: ApiError) -> None:
        """Nothing more comes, because of `error`: `EngineDead` or `EngineFault`."""

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        """The request ends before choice `index` is complete: so many `tokens` of it ran in all.

        Without `deltas` that is the first that is heard of them. Of a choice whose prompt has not
        run nothing is said.
        """


class Engine(Protocol):
    """An inference engine in its own process or machine."""

    @property
    def model_info(self) -> ModelInfo:
        """Known once `start` has returned."""

    async def start(self, progress: Callable[[str], None]) -> None:
        """Load the model, telling `progress` of each step. Raises `StartupError`."""

    async def tokenize(
        self, text: str, *, special_tokens: bool = False, cache_salt: str | None = None
    ) -> list[int]:
        """The prompt's token ids: the beginning-of-text token, then those of `text`.

        With `special_tokens`, what looks like a special token in `text` (``</s>``) becomes that
        token; without, it is text like any other. What was tokenised under the same `cache_salt`
        (see `EngineRequest`) may be remembered. Never blocks the event loop.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to the text; none for a special token."""

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones by their names. Never blocks the event loop."""

    def submit(self, request: EngineRequest, sink: Sink) -> AbstractAsyncContextManager[None]:
        """Run `request` while the context lasts; what it says goes to `sink`.

        Leaving the context before the end, or cancelling the task in it, frees the request in
        the engine. Entering it raises `EngineDead`, `Unavailable`, or `InvalidRequest` where only
        the engine can tell (a JSON schema it cannot compile).
        """

    def check(self) -> None:
        """Return if the engine's processes run; raise `EngineDead` if not."""

    async def close(self) -> None:
        """Stop the engine's processes; wait until they are gone."""

    def kill(self) -> None:
        """End the engine's processes at once, for want of time to `close`."""
