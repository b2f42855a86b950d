"""Processes from the fork server: their environment, processors and preparation."""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING

from synthia_vllm.engine.vllm import forkserver

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import pytest


def prepare() -> None:
    os.environ["PREPARED"] = "yes"
    forkserver.use_processors()


def tell(answers: Connection) -> None:
    answers.send((os.environ.get("SET_LATER"), os.environ.get("PREPARED"), os.sched_getaffinity(0)))


def test_environment_and_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the starter sets after the fork server began holds; what it removes is gone."""
    monkeypatch.setenv("SET_LATER", "before")
    forkserver.begin([])
    everywhere = os.sched_getaffinity(0)
    first = min(everywhere)

    def heard() -> tuple[str | None, str | None, set[int]]:
        mine, theirs = multiprocessing.Pipe()
        process = forkserver.Context(prepare).Process(target=tell, args=(theirs,))
        process.start()
        answer: tuple[str | None, str | None, set[int]] = mine.recv()
        process.join(30)
        assert process.exitcode == 0
        return answer

    monkeypatch.setenv("SET_LATER", "now")
    assert heard() == ("now", "yes", everywhere)
    monkeypatch.delenv("SET_LATER")
    monkeypatch.setenv("OMP_PLACES", f"{{{first}}}")
    assert heard() == (None, "yes", {first})
    assert "PREPARED" not in os.environ
