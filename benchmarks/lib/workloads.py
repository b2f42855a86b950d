"""What a load run asks, and when: all of it made from a seed, none of it downloaded.

Texts are random common English words, each one token in the tokenizers of Mistral and Llama, so
that a text of n words is one of n tokens. The server adds its template, and another tokenizer may
cut otherwise; what really ran is read from the usage that the server reports.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COMMON = (
    "about after again all also an and any are as at back be because been before between but by "
    "came can city could day did do down each early even every few first for found from good great "
    "had hand has have he her here high him his home house if in into is it its just know large "
    "last life like little long made make man many may me might more most much must my name new "
    "next night no not now of off old on one only or other our out over own part people place "
    "point right said same see she should small so some state still such take than that the their "
    "them then there these they this those three through time to too two under up use was water "
    "way we well were what when where which who will with work world would year years you your"
)
WORDS: Final = _COMMON.split()


@dataclass(frozen=True)
class Turn:
    """One message of a user, and how long an answer it asks for."""

    text: str
    output_tokens: int

    @property
    def input_tokens(self) -> int:
        """What the text alone should come to."""
        return self.text.count(" ") + 1


@dataclass(frozen=True)
class Conversation:
    """Turns that follow each other; the system prompt may be that of other conversations, too."""

    system: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens: of a user's message, of an answer, of the shared system prompt."""

    input_tokens: int = 128
    output_tokens: int = 128
    turns: int = 1
    system_tokens: int = 0
    like_sharegpt: bool = False
    """Lengths of messages and answers are drawn, see `sharegpt_lengths`."""


SHAPES: Final = {
    "fixed": Shape(),
    "sharegpt": Shape(like_sharegpt=True),
    "multiturn": Shape(64, 64, turns=4, system_tokens=256),
    "long": Shape(1536, 64),
}


def sharegpt_lengths(draw: random.Random) -> tuple[int, int]:
    """Lengths of a prompt and an answer, as vLLM's benchmark draws them from ShareGPT.

    Published: 1,000 prompts of vLLM's benchmark come to 215,196 tokens, their answers to some
    198,000 (its result blocks in many reports); in a sample of 100 the medians are 142 and 165
    ("Hands-On LLM Serving and Optimization", chapter 9). Modelled: two independent lognormal
    variables with medians of 150 and 140 and sigmas of 1.2 and 0.85, kept if vLLM's own filter
    keeps them. That makes means of 214 and 198 and medians of 138 and 140. Real lengths are less
    smooth, and those of a prompt and its answer depend on each other.
    """
    while True:
        asked = round(draw.lognormvariate(math.log(150), 1.2))
        answered = round(draw.lognormvariate(math.log(140), 0.85))
        # `is_valid_sequence` of vllm.benchmarks.datasets
        if 4 <= asked <= 1024 and answered >= 4 and asked + answered <= 2048:
            return asked, answered


def text(draw: random.Random, tokens: int) -> str:
    """Random words that come to `tokens` tokens."""
    return " ".join(draw.choices(WORDS, k=tokens))


def conversations(shape: Shape, count: int, seed: int) -> list[Conversation]:
    """`count` conversations of `shape`. Two seeds have no prefix in common."""
    draw = random.Random(seed)
    system = text(draw, shape.system_tokens)

    def turns() -> Iterator[Turn]:
        for _ in range(shape.turns):
            asked, answered = shape.input_tokens, shape.output_tokens
            if shape.like_sharegpt:
                asked, answered = sharegpt_lengths(draw)
            yield Turn(text(draw, asked), answered)

    return [Conversation(system, tuple(turns())) for _ in range(count)]


def arrivals(
    count: int, rate: float, burstiness: float = 1.0, seed: int = 0, *, ramp_to: float | None = None
) -> list[float]:
    """When each of `count` requests comes, in seconds from the start; `rate` is per second.

    As in `vllm bench serve`: gaps follow a gamma distribution of shape `burstiness` (1 is a
    Poisson process, less comes in bursts, infinity at even intervals). They are stretched so that
    the last request comes at ``count / rate``. With `ramp_to`, the rate goes from `rate` to it,
    linearly over the requests, and nothing is stretched.
    """
    rates = np.linspace(rate, rate if ramp_to is None else ramp_to, count)
    gaps = 1 / rates
    if math.isfinite(burstiness):
        gaps = np.random.default_rng(seed).gamma(burstiness, gaps / burstiness)
    moments = np.cumsum(gaps)
    if ramp_to is None:
        moments *= count / rate / moments[-1]
    return [float(moment) for moment in moments]


def read_trace(
    file: Path, shape: Shape, seed: int, unit: float = 1.0
) -> tuple[list[float], list[Conversation]]:
    """The moments of arrival in a trace, in seconds from its first, and what arrives.

    A line is a JSON object with `timestamp` (in units of `unit` seconds), `input_length` and
    `output_length`, as of vLLM's timed traces and Mooncake's; other fields are not looked at.
    System prompt and number of turns are those of `shape`. Raises `ValueError`, naming the line.
    """
    entries: list[tuple[float, Conversation]] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            moment = unit * float(entry["timestamp"])
            lengths = replace(
                shape,
                input_tokens=max(1, int(entry["input_length"])),
                output_tokens=max(1, int(entry["output_length"])),
                like_sharegpt=False,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}, line {number}: expected an object with the numbers `timestamp`, "
                f"`input_length` and `output_length`, found {line[:80]!r}."
            ) from error
        entries.append((moment, conversations(lengths, 1, seed + number)[0]))
    if not entries:
        raise ValueError(f"{file} holds no request.")
    entries.sort(key=lambda entry: entry[0])
    first = entries[0][0]
    return [moment - first for moment, _ in entries], [asked for _, asked in entries]
