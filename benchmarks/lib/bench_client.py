"""Conversations put on a server, each request sent by the code of `vllm bench serve`.

`offer` is the whole of it: many conversations in, a `Run` with an `Answer` for each turn out.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from lib.report import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import SimpleNamespace

    from lib.workloads import Conversation

REFUSALS: Final = (429, 503)


@dataclass
class Answer:
    """What became of one request."""

    asked_tokens: int
    """That its messages, without the template, should come to."""
    late: float
    """Seconds between the moment it was due and the one it was sent."""
    status: int = 0
    """Of HTTP; 0 if no response came."""
    refusal: str = ""
    """What the response says if the status is not 200."""
    output: Any = None
    """vLLM's `RequestFuncOutput`; times in seconds."""

    @property
    def outcome(self) -> str:
        """``answered``, ``refused`` or ``failed``."""
        if self.output.success:
            return "answered"
        return "refused" if self.status in REFUSALS else "failed"

    @property
    def error(self) -> str:
        """Status and the last line of what went wrong."""
        lines = self.output.error.strip().splitlines()
        return f"{self.status or 'no response'}: {lines[-1] if lines else 'no reason given'}"


@dataclass(frozen=True)
class Server:
    """Whom to ask."""

    session: aiohttp.ClientSession
    url: str
    model: str
    body: Mapping[str, Any]
    """Further fields of each request."""


_asking: ContextVar[Answer] = ContextVar("asking")


async def _note_status(
    session: aiohttp.ClientSession, context: SimpleNamespace, end: aiohttp.TraceRequestEndParams
) -> None:
    if (answer := _asking.get(None)) is not None:
        answer.status = end.response.status
        if answer.status != 200:
            answer.refusal = await end.response.text(errors="replace")


def open_session(timeout: float) -> aiohttp.ClientSession:
    """With the key in OPENAI_API_KEY, and `timeout` seconds for an answer."""
    # vLLM's function keeps the status to itself. aiohttp tells of it in the task that asks.
    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(_note_status)
    key = os.environ.get("OPENAI_API_KEY")
    return aiohttp.ClientSession(
        # Servers close an idle connection after five seconds (uvicorn's default) or later; the
        # request that is just then sent on it would count as an error.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        trace_configs=[trace],
    )


async def ask(
    server: Server, messages: list[dict[str, str]], output_tokens: int, answer: Answer
) -> None:
    """Send one request and read its answer to the end. Never raises for what the server does."""
    from vllm.benchmarks.lib.endpoint_request_func import (
        RequestFuncInput,
        async_request_openai_chat_completions,
    )

    _asking.set(answer)
    request = RequestFuncInput(
        prompt="",
        chat_messages=list(messages),
        api_url=f"{server.url}/v1/chat/completions",
        prompt_len=0,  # the usage says how long it was
        output_len=output_tokens,
        model=server.model,
        extra_body=dict(server.body),
    )
    output = await async_request_openai_chat_completions(request, server.session)
    if output.success and not output.prompt_len:
        output.success, output.error = False, "The stream ended without its usage."
    answer.output = output


@dataclass
class Run:
    """A load while it runs and after."""

    expected: int
    answers: list[Answer] = field(default_factory=list)
    open: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Answers by outcome, and the tokens in them."""
    begun: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    client_cpu: float = 0.0
    """Seconds of this process."""

    async def tell(self) -> None:
        """Show how far it is, until cancelled."""
        while True:
            seconds = time.perf_counter() - self.begun
            done = self.counts
            say(
                f"{seconds:.0f} s: {done['answered']} of {self.expected} answered, {self.open} "
                f"open, {done['refused']} refused, {done['failed']} failed, "
                f"{done['tokens'] / seconds:.0f} tokens/s"
            )
            await asyncio.sleep(0.5)

    def note(self, answer: Answer) -> None:
        """Take in an answer that is over."""
        self.answers.append(answer)
        self.counts[answer.outcome] += 1
        self.counts["tokens"] += answer.output.output_tokens or 0


async def converse(server: Server, conversation: Conversation, due: float, run: Run) -> None:
    """Ask the turns of `conversation`, each once the last is answered; end at one that is not."""
    messages: list[dict[str, str]] = []
    tokens = 0
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
        tokens += conversation.system.count(" ") + 1
    run.open += 1
    for turn in conversation.turns:
        messages.append({"role": "user", "content": turn.text})
        tokens += turn.input_tokens
        answer = Answer(tokens, time.perf_counter() - due)
        await ask(server, messages, turn.output_tokens, answer)
        run.note(answer)
        if answer.outcome != "answered":
            break
        messages.append({"role": "assistant", "content": answer.output.generated_text})
        tokens += answer.output.output_tokens
        due = time.perf_counter()
    run.open -= 1


async def offer(
    server: Server,
    asked: Sequence[Conversation],
    *,
    concurrency: int = 0,
    moments: Sequence[float] = (),
) -> Run:
    """Start `asked` at `moments`, in seconds from now, or if there are none, `concurrency` at a
    time. Returns when all are over."""
    run = Run(expected=sum(len(conversation.turns) for conversation in asked))
    teller = asyncio.create_task(run.tell())
    cpu = time.process_time()

    async def one_by_one(rest: Iterable[Conversation]) -> None:
        for conversation in rest:
            await converse(server, conversation, time.perf_counter(), run)

    try:
        async with asyncio.TaskGroup() as group:
            if moments:
                for moment, conversation in zip(moments, asked, strict=True):
                    due = run.begun + moment
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    group.create_task(converse(server, conversation, due, run))
            else:
                rest = iter(asked)
                for _ in range(concurrency):
                    group.create_task(one_by_one(rest))
    finally:
        teller.cancel()
        say("")
    run.seconds = time.perf_counter() - run.begun
    run.client_cpu = time.process_time() - cpu
    return run
