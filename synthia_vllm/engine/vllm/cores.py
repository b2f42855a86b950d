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


class Claim:
    """Those of `cores` that are to be had, claimed until `release`, or the end of this process.

    Where nobody else has any, all but the last are claimed, which is left for everything else, as
    vLLM does; `mine` is then `None`, for vLLM to choose.
    """

    def __init__(self, cores: list[int], directory: Path | None = None) -> None:
        place = directory or Path(tempfile.gettempdir(), f"synthia-vllm-cores-{os.getuid()}")
        place.mkdir(mode=0o700, exist_ok=True)
        self._locks: dict[int, int] = {}
        for core in cores:
            lock = os.open(place / str(core), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            else:
                self._locks[core] = lock
        alone = len(self._locks) == len(cores)
        if alone and len(cores) > 1:
            os.close(self._locks.pop(cores[-1]))
        self.mine = None if alone else list(self._locks)

    def release(self) -> None:
        """Leave them to others."""
        while self._locks:
            os.close(self._locks.popitem()[1])
