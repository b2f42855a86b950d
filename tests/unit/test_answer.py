"""The streamed answer is the card's answer, however tokens split it."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from synthia_vllm.template.answer import AnswerFilter, GrammarFilter
from synthia_vllm.template.formats import DOCUMENTED

STOPS = DOCUMENTED.stops

# Text made of what matters: pieces of the marker, white space, and other things.
PIECES = st.sampled_from(
    [
        "USER:",
        "U",
        "US",
        "USE",
        "USER",
        "SER:",
        ":",
        " ",
        "\n",
        "\n\n",
        "\u2003",
        "\x1f",
        "a",
        "Orca",
        "é",
        "STOP",
        "ST",
        "O",
    ]
)
TEXT = st.lists(PIECES, max_size=12).map("".join)


def card(raw: str) -> str:
    """The card's own line."""
    return raw.split("USER:")[0].strip()


def splits(text: str, cuts: list[int]) -> list[str]:
    """`text` cut at `cuts` (taken modulo its length), empty pieces included."""
    places = sorted(cut % (len(text) + 1) for cut in cuts)
    edges = [0, *places, len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


CUTS = st.lists(st.integers(0, 1000), max_size=30)


@given(TEXT, CUTS)
def test_streamed_is_the_cards_rule(raw: str, cuts: list[int]) -> None:
    """Joined deltas equal ``raw.split("USER:")[0].strip()`` for every text and every split."""
    answer = AnswerFilter(STOPS)
    sent = [answer.feed(piece) for piece in splits(raw, cuts)]
    sent.append(answer.finish())
    assert "".join(sent) == card(raw)


@given(TEXT, CUTS)
def test_nothing_is_sent_that_is_taken_back(raw: str, cuts: list[int]) -> None:
    """At every moment what was sent is a beginning of the final answer."""
    answer = AnswerFilter(STOPS)
    sent = ""
    for piece in splits(raw, cuts):
        sent += answer.feed(piece)
        assert card(raw).startswith(sent)


@given(TEXT, CUTS)
def test_held_back_no_longer_than_needed(raw: str, cuts: list[int]) -> None:
    """Only white space and a possible beginning of the marker are ever held back."""
    answer = AnswerFilter(STOPS)
    seen = sent = ""
    for piece in splits(raw, cuts):
        seen += piece
        sent += answer.feed(piece)
        if not answer.ended:
            held = seen.strip()[len(sent) :].strip()
            assert held in {"", "U", "US", "USE", "USER"}


def engine(raw: str, stop: str) -> tuple[str, str | None]:
    """What vLLM lets out with `include_stop_str_in_output`: all up to the end of the first stop."""
    ends = [(raw.find(s) + len(s), s) for s in ("USER:", stop) if s in raw]
    if not ends:
        return raw, None
    end, found = min(ends, key=lambda pair: pair[0])
    return raw[:end], found


@given(TEXT, CUTS, st.sampled_from(["STOP", "\n", "\nO", "\n\n", "R", "OrcaO", "a a"]))
def test_own_stops(raw: str, cuts: list[int], stop: str) -> None:
    """A request's own stop ends the answer too, and no part of it is sent."""
    text, found = engine(raw, stop)
    expected = card(text if found is None else text.removesuffix(found))
    answer = AnswerFilter(STOPS, [stop])
    *pieces, last = splits(text[:-1], cuts)
    sent = ""
    for piece in pieces:
        sent += answer.feed(piece)
        assert expected.startswith(sent)
    # The engine ends in the very step that completes the stop.
    sent += answer.finish(last + text[-1:], found)
    assert sent == expected


@given(TEXT, CUTS)
def test_a_stop_the_engine_passed_over_is_text(raw: str, cuts: list[int]) -> None:
    """While `min_tokens` holds, the engine ignores a request's stop: then it is part of the text.

    ``USER:`` ends the answer all the same.
    """
    answer = AnswerFilter(STOPS, ["STOP"])
    sent = [answer.feed(piece) for piece in splits(raw, cuts)]
    sent.append(answer.finish())
    assert "".join(sent) == card(raw)


@given(TEXT, CUTS)
def test_continued_answer_keeps_the_space_in_front(raw: str, cuts: list[int]) -> None:
    """The client's beginning and our continuation join to one text, white space included."""
    answer = AnswerFilter(STOPS, continued=True)
    sent = [answer.feed(piece) for piece in splits(raw, cuts)]
    sent.append(answer.finish())
    assert "".join(sent) == raw.split("USER:")[0].rstrip()


@given(TEXT, CUTS, st.sampled_from(["STOP", "\n", "R", " a"]))
def test_a_grammars_answer_is_whole(raw: str, cuts: list[int], stop: str) -> None:
    """Where a grammar rules, all that was said is the answer, up to a stop of the request's own."""
    before, found, _ = raw.partition(stop)
    rule = GrammarFilter([stop])
    # The engine ends with the piece in which it finds the stop.
    parts = [part for part in splits(before + found, cuts) if part] or [""]
    sent = [rule.feed(part) for part in parts[:-1]]
    assert not any(stop in text for text in sent)
    assert "".join(sent) + rule.finish(parts[-1], stop if found else None) == before
