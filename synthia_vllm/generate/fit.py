"""A conversation that is too long, cut to what the context holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthia_vllm.errors import ContextOverflow
from synthia_vllm.template.prompt import Markers, drop_turn_pairs, render, turn_pair_starts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from synthia_vllm.engine.base import Engine
    from synthia_vllm.settings import Settings
    from synthia_vllm.template.prompt import Message


async def fit(
    messages: Sequence[Message],
    max_tokens: int,
    engine: Engine,
    settings: Settings,
    *,
    cache_salt: str | None = None,
    may_drop: bool = False,
) -> tuple[str, list[int], int]:
    """The prompt and its tokens, with as few of the oldest turn pairs dropped as it takes to fit.

    Pairs are dropped where the setting `overflow` or `may_drop` allows it. Also returns the number
    of messages dropped. An answer needs one token; where pairs may be dropped it gets
    `answer_reserve`, so that a long conversation is not answered in a word. `cache_salt` is as for
    `Engine.tokenize`.
    """
    context = engine.model_info.max_model_len
    # A longer text has more tokens than fit, whatever it says: the rest need not be counted.
    longest = (context + 1) * engine.model_info.longest_token
    counted_all = True

    async def prompt_from(start: int) -> tuple[str, list[int]]:
        nonlocal counted_all
        text = render(drop_turn_pairs(messages, start)[0], settings.prompt_format)
        counted_all = len(text) <= longest
        return text, await engine.tokenize(
            text[:longest],
            special_tokens=settings.markers is Markers.ALLOW,
            cache_salt=cache_salt,
        )

    text, token_ids = await prompt_from(0)
    may_drop = may_drop or settings.overflow == "drop-oldest"
    reserve = min(max_tokens, settings.answer_reserve) if may_drop else 1
    if len(token_ids) + reserve <= context:
        return text, token_ids, 0
    starts = turn_pair_starts(messages) if may_drop else []
    # The fewest pairs to drop: longer prompts do not fit, shorter ones do.
    low, high = 1, len(starts)
    fitting: tuple[str, list[int]] | None = None
    while low < high:
        middle = (low + high) // 2
        shorter = await prompt_from(starts[middle])
        if len(shorter[1]) + reserve <= context:
            fitting, high = shorter, middle
        else:
            low = middle + 1
    if fitting is not None:
        return *fitting, drop_turn_pairs(messages, starts[high])[1]
    if len(starts) > 1:
        text, token_ids = await prompt_from(starts[-1])
        if len(token_ids) < context:  # a short answer beats none
            return text, token_ids, drop_turn_pairs(messages, starts[-1])[1]
    elif len(token_ids) < context:
        return text, token_ids, 0
    raise ContextOverflow(
        f"This model's context holds {context} tokens, prompt and answer together. Your messages "
        f"are {'' if counted_all else 'at least '}{len(token_ids)} tokens"
        + (" after dropping all that may be dropped" if len(starts) > 1 else "")
        + ", which leaves no room for an answer. Shorten the messages."
    )
