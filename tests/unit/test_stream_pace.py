"""When a stream's text waits for more of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from synthia_vllm.engine.vllm.pace import Pace

if TYPE_CHECKING:
    import pytest


def test_only_a_busy_process_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits from a tenth of a core on, until below half of that, and longer when behind."""
    used = 0.0
    monkeypatch.setattr(time, "thread_time", lambda: used)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    pace = Pace(0.02)
    now = 0.0
    waits = []
    for share in (0.09, 0.11, 0.06, 0.04, 0.5):
        now += 0.2
        used += share * 0.2
        pace.look(now, behind=False)
        waits.append(round(pace.wait, 6))
    assert waits == [0.0, 0.018, 0.018, 0.0, 0.018]
    pace.look(now + 0.01, behind=True)
    assert pace.wait == 0.08
    pace.look(now + 0.02, behind=False)
    assert round(pace.wait, 6) == 0.018


def test_zero_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 0 seconds each token goes out at once, however busy the process is."""
    monkeypatch.setattr(time, "thread_time", lambda: 1000.0)
    pace = Pace(0.0)
    monkeypatch.setattr(time, "thread_time", lambda: 2000.0)
    pace.look(time.monotonic() + 1, behind=True)
    assert pace.wait == 0.0
