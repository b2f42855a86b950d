"""What every engine promises, as checks that run against the real one and against the fake.

Each takes an engine that is started, on its event loop, and a prompt of its tokens.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from synthia_vllm.engine.base import EngineRequest, Sampling

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from synthia_vllm.engine.base import Engine, Output, PromptLogprobs
    from synthia_vllm.errors import ApiError

PROMPT = "USER: What is the difference between an Orca, Dolphin and a Seal?\nASSISTANT:"


async def outputs_of(
    engine: Engine,
    request: EngineRequest,
    came: Counter[int] | None = None,
    told: Counter[int] | None = None,
) -> AsyncGenerator[Output, None]:
    """Run `request`; its outputs as they come, to the end of the last choice.

    `came` gets the tokens of each choice that were put out; `told` those that ran of one that is
    left before its end.
    """
    queue: asyncio.Queue[Output | ApiError] = asyncio.Queue()

    class Arrived:
        def put(self, output: Output, cached_tokens: int) -> bool:
            assert 0 <= cached_tokens < len(request.prompt_token_ids)
            queue.put_nowait(output)
            if came is not None:
                came[output.index] += len(output.token_ids)
            return True

        def fail(self, error: ApiError) -> None:
            queue.put_nowait(error)

        def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
            if told is not None:
                told[index] = tokens

    open_choices = request.sampling.n
    async with engine.submit(request, Arrived()):
        while open_choices:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            open_choices -= found.finish_reason is not None
            yield found


async def outputs(engine: Engine, *, deltas: bool = True, **sampling: Any) -> list[Output]:
    """All outputs of one request, with greedy sampling."""
    tokens = await engine.tokenize(PROMPT)
    asked = Sampling(**{"max_tokens": 40, "temperature": 0.0, "stop": ("USER:",), **sampling})
    request = EngineRequest(
        request_id="contract", prompt_token_ids=tokens, sampling=asked, deltas=deltas
    )
    async with aclosing(outputs_of(engine, request)) as found:
        return [output async for output in found]


async def tokens_carry_the_text(engine: Engine) -> None:
    """The first token begins the text; the bytes of the others are the text."""
    text = "USER: Où est l'orque? 鯨 </s>\n\nASSISTANT:"
    ids = await engine.tokenize(text)
    assert engine.token_bytes(ids[0]) == b""
    # SentencePiece puts a space in front of a text.
    assert b"".join(engine.token_bytes(i) for i in ids[1:]).decode().strip() == text.strip()
    assert len(ids) > 10
    assert all(0 <= i < engine.model_info.vocab_size for i in ids)


async def deltas_add_up(engine: Engine) -> None:
    """Streamed outputs, joined, are the whole output: text, tokens and end."""
    streamed = await outputs(engine)
    [whole] = await outputs(engine, deltas=False)
    assert len(streamed) > 1
    assert "".join(o.text for o in streamed) == whole.text
    assert [t for o in streamed for t in o.token_ids] == list(whole.token_ids)
    assert [o.finish_reason for o in streamed[:-1]] == [None] * (len(streamed) - 1)
    assert streamed[-1].finish_reason == whole.finish_reason
    assert streamed[-1].stop_reason == whole.stop_reason


async def length_ends(engine: Engine) -> None:
    """`max_tokens` ends the answer after exactly that many tokens."""
    seen = await outputs(engine, max_tokens=3)
    assert sum(len(o.token_ids) for o in seen) == 3
    assert (seen[-1].finish_reason, seen[-1].stop_reason) == ("length", None)


async def stop_is_the_end_of_the_text(engine: Engine) -> None:
    """A stop string ends the text, is the last of it, and is reported."""
    [whole] = await outputs(engine, max_tokens=400, deltas=False)
    assert whole.finish_reason == "stop"
    assert whole.stop_reason == "USER:"
    assert whole.text.endswith("USER:")
    assert whole.text.count("USER:") == 1


async def stop_can_be_held_back(engine: Engine) -> None:
    """Without `stop_in_text` no beginning of a stop string gets out, in deltas or at once."""
    inside = await outputs(engine, max_tokens=400, deltas=False)
    before = inside[0].text.removesuffix("USER:")
    streamed = await outputs(engine, max_tokens=400, stop_in_text=False)
    [whole] = await outputs(engine, max_tokens=400, stop_in_text=False, deltas=False)
    assert "".join(o.text for o in streamed) == whole.text == before
    assert streamed[-1].stop_reason == whole.stop_reason == "USER:"


async def choices_have_an_index(engine: Engine) -> None:
    """Each of `n` choices comes under its index and ends once."""
    seen = await outputs(engine, n=3, temperature=0.75, max_tokens=4)
    for index in range(3):
        mine = [o for o in seen if o.index == index]
        assert sum(len(o.token_ids) for o in mine) <= 4
        assert [o.finish_reason is not None for o in mine].count(True) == 1


async def logprobs_name_their_token(engine: Engine) -> None:
    """With logprobs, each token has a place, and is in it."""
    seen = await outputs(engine, logprobs=2, max_tokens=4)
    places = [place for o in seen for place in o.logprobs or ()]
    tokens = [t for o in seen for t in o.token_ids]
    assert len(places) == len(tokens) == 4
    for token, place in zip(tokens, places, strict=True):
        assert place[token].logprob <= 0
    assert all(o.logprobs is None for o in await outputs(engine, max_tokens=2))


async def prompt_can_be_scored(engine: Engine) -> None:
    """With `on_prompt` the prompt's log-probabilities come once, before the first output."""
    tokens = await engine.tokenize(PROMPT)
    for deltas in (True, False):
        told: list[PromptLogprobs] = []
        request = EngineRequest(
            request_id="scored",
            prompt_token_ids=tokens,
            sampling=Sampling(max_tokens=2, temperature=0.0, prompt_logprobs=1),
            deltas=deltas,
            on_prompt=told.append,
        )
        async with aclosing(outputs_of(engine, request)) as found:
            async for _ in found:
                assert len(told) == 1
        [(first, *others)] = told
        assert first is None
        for token, place in zip(tokens[1:], others, strict=True):
            assert place is not None
            assert place[token].logprob <= 0


async def tokens_have_a_text(engine: Engine) -> None:
    """What was tokenised is the text again; special tokens have their names."""
    text = "USER: Où est l'orque? 鯨"
    ids = await engine.tokenize(text)
    assert (await engine.detokenize(ids[1:])).strip() == text
    assert await engine.detokenize(ids[:1]) == engine.model_info.bos == "<s>"
    assert engine.model_info.special_tokens[ids[0]] == engine.model_info.bos


async def leaving_is_allowed(engine: Engine) -> None:
    """Closing the stream half-way, or cancelling a task in it, ends the request quietly."""
    tokens = await engine.tokenize(PROMPT)
    request = EngineRequest(
        request_id="left", prompt_token_ids=tokens, sampling=Sampling(max_tokens=400)
    )
    async with aclosing(outputs_of(engine, request)) as steps:
        await anext(steps)

    async def consume() -> None:
        async with aclosing(outputs_of(engine, request)) as steps:
            async for _ in steps:
                pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait((task,))
    engine.check()


async def what_ran_is_told_of_what_is_left(engine: Engine) -> None:
    """Left before the end, streamed or not, a request says how many tokens of each choice ran."""
    tokens = await engine.tokenize(PROMPT)
    asked = Sampling(max_tokens=400, n=2, temperature=0.75)
    plain = EngineRequest(request_id="plain", prompt_token_ids=tokens, sampling=asked, deltas=False)
    of_plain: Counter[int] = Counter()
    waiting = asyncio.ensure_future(anext(outputs_of(engine, plain, None, of_plain)))
    request = EngineRequest(request_id="streamed", prompt_token_ids=tokens, sampling=asked)
    came: Counter[int] = Counter()
    told: Counter[int] = Counter()
    async with aclosing(outputs_of(engine, request, came, told)) as steps:
        async for _ in steps:
            if min(came[0], came[1]) >= 3:  # the other one began before
                break
    assert told == came
    waiting.cancel()
    await asyncio.wait((waiting,))
    assert set(of_plain) == {0, 1}
    assert all(0 < ran < 400 for ran in of_plain.values())


async def what_is_complete_is_not_told(engine: Engine) -> None:
    """A request that came to its end has nothing to add to its outputs."""
    tokens = await engine.tokenize(PROMPT)
    told: Counter[int] = Counter()
    for deltas in (True, False):
        asked = Sampling(max_tokens=3)
        request = EngineRequest(
            request_id="all", prompt_token_ids=tokens, sampling=asked, deltas=deltas
        )
        async with aclosing(outputs_of(engine, request, None, told)) as steps:
            async for _ in steps:
                pass
    assert not told


CHECKS = [
    tokens_carry_the_text,
    deltas_add_up,
    length_ends,
    stop_is_the_end_of_the_text,
    stop_can_be_held_back,
    choices_have_an_index,
    prompt_can_be_scored,
    tokens_have_a_text,
    logprobs_name_their_token,
    leaving_is_allowed,
    what_ran_is_told_of_what_is_left,
    what_is_complete_is_not_told,
]
