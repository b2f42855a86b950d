"""The table says what vLLM's own detokenizer says, whatever the tokens are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from synthia_vllm.engine.vllm.detokenizer import TableDetokenizer, table

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "USER: What is a seal?\nASSISTANT:"
SPACES = 28705  # "▁"
LINE = 13  # "<0x0A>"
MARKER = "�"


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Any:
    return get_tokenizer(str(demo))


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> dict[int, str]:
    backend = tokenizer.backend_tokenizer
    decoder = json.loads(backend.decoder.__getstate__())
    return table(decoder, backend.get_vocab(), backend.get_added_tokens_decoder())


def vllms(tokenizer: Any, stops: list[str], prompt: str = PROMPT) -> FastIncrementalDetokenizer:
    """vLLM's detokenizer for a new request."""
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=tokenizer.encode(prompt),
        mm_features=None,
        sampling_params=SamplingParams(stop=stops, include_stop_str_in_output=True),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return FastIncrementalDetokenizer(tokenizer, request)


def said(detokenizer: Any, steps: list[list[int]], *, delta: bool, ended: bool) -> list[Any]:
    """All that `detokenizer` lets see, step by step, until a stop."""
    seen: list[Any] = []
    for number, step in enumerate(steps, start=1):
        last = number == len(steps)
        stop = detokenizer.update(list(step), ended and last)
        over = last or stop is not None
        text = detokenizer.get_next_output_text(over, delta) if delta or over else ""
        seen.append((stop, text, list(detokenizer.output_token_ids)))
        assert detokenizer.num_output_tokens() == len(detokenizer.output_token_ids)
        if stop is not None:
            break
    return seen


WORDS = st.integers(259, 31999)
BYTES = st.integers(3, 258)
CHARACTERS = st.characters(min_codepoint=1, codec="utf-8").map(
    lambda c: [3 + byte for byte in c.encode()]
)
TOKENS = st.one_of(
    WORDS.map(lambda token: [token]),
    WORDS.map(lambda token: [token]),
    st.sampled_from([SPACES, LINE, 29137, 28723]).map(lambda token: [token]),
    CHARACTERS,
    BYTES.map(lambda token: [token]),
    st.just([2]),
)


@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_the_table_is_right(data: st.DataObject, tokenizer: Any, texts: dict[int, str]) -> None:
    """Same texts, stops and tokens as vLLM's, for any tokens, steps, and stops in them."""
    pieces = data.draw(st.lists(TOKENS, min_size=1, max_size=12))
    tokens = [token for piece in pieces for token in piece]
    steps = []
    while tokens:
        size = data.draw(st.sampled_from([1, 1, 1, 2, 3]))
        steps.append(tokens[:size])
        tokens = tokens[size:]
    whole = tokenizer.decode([token for step in steps for token in step])
    stops = []
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, max(0, len(whole) - 1)))
        stop = whole[start : start + data.draw(st.integers(1, 6))]
        if stop:
            stops.append(stop)
    delta = data.draw(st.booleans())
    ended = data.draw(st.booleans())
    if ended:
        steps[-1][-1] = 2  # what ends a request is the end-of-text token
    ours = TableDetokenizer(texts, stops, vllms(tokenizer, stops))
    theirs = vllms(tokenizer, stops)
    try:
        expected = said(theirs, steps, delta=delta, ended=ended)
    except Exception as error:
        with pytest.raises(type(error)):
            said(ours, steps, delta=delta, ended=ended)
    else:
        assert said(ours, steps, delta=delta, ended=ended) == expected


def test_every_token_by_itself_and_after_another(tokenizer: Any, texts: dict[int, str]) -> None:
    """The table's text of every token is the decoder's, at the beginning and after a word."""
    assert len(texts) == 32000 - 3 - 128 - 1
    first = vllms(tokenizer, [])
    for token, text in texts.items():
        first.update([272, token], False)
        assert first.get_next_output_text(False, True) == texts[272] + text
        if len(first.token_ids) > 500:
            first = vllms(tokenizer, [])


def test_the_table_is_what_is_used(tokenizer: Any, texts: dict[int, str]) -> None:
    """Ordinary text, with lines and marks, never asks the other; a character of bytes does."""

    class Untouched:
        token_ids: list[int] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    text = " Orcas hunt:\n  seals (and fish).\tThe end"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    ours = TableDetokenizer(texts, ["USER:"], Untouched())
    seen = said(ours, [[token] for token in tokens] + [[2]], delta=True, ended=True)
    assert "".join(part for _, part, _ in seen).lstrip() == text.lstrip()
    assert seen[-1][2] == [*tokens, 2]
    seal = tokenizer.encode("🦭", add_special_tokens=False)
    with pytest.raises(AssertionError, match="update"):
        said(ours, [[token] for token in seal], delta=True, ended=False)


def test_another_decoder_has_no_table(tokenizer: Any) -> None:
    """A tokenizer of another kind is left to vLLM."""
    backend = tokenizer.backend_tokenizer
    assert table({"type": "ByteLevel"}, backend.get_vocab(), {}) == {}
