"""A text is tokenised as a whole would be, whatever of it was there before."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.tokenizers import get_tokenizer

from synthia_vllm.engine.vllm.token_cache import Piece, TokenCache, breaks_at_lines, pieces, size
from synthia_vllm.engine.vllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LONG = "The seal is an animal that lives in the sea, and likes to lie on the warm sand of a shore."
# What may stand at a seam: breaks of all kinds, blanks, what is written in bytes, special tokens.
LINES = st.lists(
    st.text("ab \n\r\t\v\u2028\u2581é日\U0001f600<>/s", max_size=8)
    | st.sampled_from(["USER: ", LONG, "\n\n", " \n", "<0x0A>", "</s>", "\u2581\n", "\r\n" * 40]),
    max_size=12,
).map("\n".join)


@pytest.fixture(scope="module")
def files(demo: Path) -> Any:
    return get_tokenizer(str(demo))


@pytest.fixture(scope="module")
def tokenizer(files: Any) -> Iterator[Tokenizer]:
    made = Tokenizer(files)
    yield made
    made.close()


def described(files: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files.backend_tokenizer.to_str())
    return found


@settings(max_examples=300)
@given(text=LINES, more=LINES)
def test_a_text_and_one_that_goes_on_have_the_tokens_of_the_whole(
    tokenizer: Tokenizer, text: str, more: str
) -> None:
    assert "".join(pieces(text)) == text

    async def check() -> None:
        for asked in (text, text + more, text, f"{text}\n{more}"):
            whole = tokenizer._encoders[False].encode(asked).ids
            assert await tokenizer.encode(asked, special_tokens=False, cache_salt="s") == whole

    asyncio.run(check())


def test_what_was_there_before_is_not_tokenised_again(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(files)
    asked: list[list[str]] = []
    own = tokenizer._encode

    async def watched(texts: list[str], *, special_tokens: bool) -> list[list[int]]:
        asked.append(texts)
        return await own(texts, special_tokens=special_tokens)

    monkeypatch.setattr(tokenizer, "_encode", watched)
    first = f"SYSTEM: {LONG}\nUSER: {LONG}\nASSISTANT:"
    then = f"{first} {LONG}\nUSER: And then?\nASSISTANT:"

    async def ask() -> None:
        await tokenizer.encode(first, special_tokens=False, cache_salt="one")
        await tokenizer.encode(then, special_tokens=False, cache_salt="one")
        await tokenizer.encode(first, special_tokens=False, cache_salt="two")
        await tokenizer.encode(first, special_tokens=False)
        await tokenizer.encode(first, special_tokens=True, cache_salt="one")

    asyncio.run(ask())
    tokenizer.close()
    everything = pieces(first)
    assert len(everything) == 3
    assert asked == [
        everything,
        pieces(then)[2:],
        everything,  # another's
        everything,  # nobody's
        [first],  # special tokens may be written across a seam
    ]


def test_no_more_is_kept_than_may_be() -> None:
    def piece(number: int, salt: str = "a") -> Piece:
        return salt, False, str(number)

    tokens = [1, 2, 3, 4]
    cache = TokenCache(100, limit=2 * size(piece(0), tokens))
    for number in range(4):
        cache.keep(piece(number), tokens)
        cache.keep(piece(number), tokens)
    assert [cache.get(piece(number)) for number in range(4)] == [None, None, tokens, tokens]
    cache.get(piece(2))
    cache.keep(piece(4, "b"), tokens)
    assert cache.get(piece(2)) == tokens
    assert cache.get(piece(3)) is None
    assert cache.get(piece(4, "a")) is None
    assert cache.get(piece(4, "b")) == tokens
    cache.keep(piece(5), tokens * 1000)
    assert cache.get(piece(5)) is None


def test_a_tokenizer_that_reaches_across_line_breaks_is_known(files: Any) -> None:
    right = described(files)
    assert breaks_at_lines(right)
    changes: list[Callable[[Any], Any]] = [
        lambda it: it["model"]["vocab"].update({"\n\n": 40_000}),
        lambda it: it["model"]["vocab"].update({"<0x0A><0x0A>": 40_000}),
        lambda it: it["model"].update(byte_fallback=False),
        lambda it: it["model"].update(dropout=0.1),
        lambda it: it.update(normalizer=None),
        lambda it: it.update(pre_tokenizer={"type": "Metaspace"}),
        lambda it: it["added_tokens"].append({"content": "\n#", "special": False}),
    ]
    for change in changes:
        wrong = copy.deepcopy(right)
        change(wrong)
        assert not breaks_at_lines(wrong)
