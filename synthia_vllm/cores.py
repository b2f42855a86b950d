"""Which processors an engine on a CPU may take for itself, beside other servers on the machine.

vLLM binds its threads to processors, the same for every server that starts: two of them then share
some while others are idle, and wait for each other at every step. So each server claims the ones it
takes, by a lock on a file for each, which ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

_held: list[int] = []  # file descriptors, for as long as this process lives


def physical_cores() -> list[int]:
    """One processor of each core that this process may use: of siblings the last, as vLLM does."""
    chosen = {}
    for number in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            chosen[siblings.read_text()] = number
        except OSError:
            chosen[str(number)] = number
    return sorted(chosen.values())


def claim(cores: list[int], directory: Path | None = None) -> list[int] | None:
    """Claim those of `cores` that are to be had; `None` if nobody else has any.

    Then all but the last are claimed, which is left for everything else, as vLLM does.
    """
    place = directory or Path(tempfile.gettempdir(), f"synthia-vllm-cores-{os.getuid()}")
    place.mkdir(mode=0o700, exist_ok=True)
    free: dict[int, int] = {}
    for core in cores:
        lock = os.open(place / str(core), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            free[core] = lock
    alone = len(free) == len(cores)
    if alone and len(cores) > 1:
        os.close(free.pop(cores[-1]))
    _held.extend(free.values())
    return None if alone else list(free)
