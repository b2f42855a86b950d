"""When a stream's text waits for more of it."""

from __future__ import annotations

import time

from synthia_vllm.engine.vllm.pace import Pace


def waits_at(pace: Pace, rate: float, now: float, *, behind: bool = False) -> float:
    """What `pace` says at `now`, after a fifth of a second of so many tokens a second."""
    pace.tokens += int(rate * 0.2)
    pace.look(now, behind=behind)
    return round(pace.wait, 6)


def test_only_many_tokens_wait() -> None:
    """From 3,000 a second on, until there are fewer than 2,000; and longer when behind."""
    pace = Pace(0.02)
    start = time.monotonic() + 10  # nobody came before
    waits_at(pace, 0, start)
    rates = (2900, 3100, 2100, 1900, 50_000)
    waits = [waits_at(pace, rate, start + 0.2 * (i + 1)) for i, rate in enumerate(rates)]
    assert waits == [0.0, 0.018, 0.018, 0.0, 0.018]
    assert waits_at(pace, 0, start + 1.01, behind=True) == 0.08
    assert waits_at(pace, 0, start + 1.02) == 0.018


def test_zero_never_waits() -> None:
    """With 0 seconds each token goes out at once, however many there are."""
    assert waits_at(Pace(0.0), 1e6, time.monotonic() + 0.2, behind=True) == 0.0
