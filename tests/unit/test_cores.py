"""Two servers on one machine do not bind their engines to the same processors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from synthia_vllm.engine.vllm.cores import Claim, physical_cores

if TYPE_CHECKING:
    from pathlib import Path


def test_each_server_takes_what_others_left(tmp_path: Path) -> None:
    """The first has all but one, the next what is left, and one more nothing of its own."""
    claims = [Claim([0, 1, 2, 3], tmp_path) for _ in range(3)]
    assert [claim.mine for claim in claims] == [None, [3], []]
    claims[0].release()
    again = Claim([0, 1, 2, 3], tmp_path)
    assert again.mine == [0, 1, 2]
    for claim in (*claims, again):
        claim.release()
    last = Claim([0, 1, 2, 3], tmp_path)
    assert last.mine is None
    last.release()


def test_what_a_server_had_is_free_when_it_is_gone(tmp_path: Path) -> None:
    """However it ends."""
    code = f"""
import pathlib, sys
from synthia_vllm.engine.vllm.cores import Claim
claim = Claim([0, 1], pathlib.Path({str(tmp_path)!r}))
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        beside = Claim([0, 1], tmp_path)
        assert beside.mine == [1]
        other.kill()
    after = Claim([0], tmp_path)
    assert after.mine is None
    beside.release()
    after.release()


def test_cores_are_those_of_this_process() -> None:
    """At most one processor of each core, of those that it may use."""
    assert set(physical_cores()) <= os.sched_getaffinity(0)
    assert physical_cores()
