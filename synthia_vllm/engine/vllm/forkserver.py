"""Processes forked from one that has imported what they need, and nothing else.

Spawned, vLLM's engine core and then its worker each import torch and vLLM again, one after the
other: more than half of the time to ready with a small model. Forked from the server, they would
inherit its port, its clients' connections and the locks of its threads. So the engine core is
forked from Python's fork server, which imports vLLM while the server itself does, and the worker
from the engine core.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What says which processors the OpenMP library may use, for GNU's and Intel's.
_PLACES = ("OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def begin(modules: Sequence[str]) -> None:
    """Start the fork server, which imports `modules`; returns at once."""
    multiprocessing.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


class Context(ForkServerContext):
    """A multiprocessing context whose processes call `prepare`, a module's function, if any, first.

    They have the environment of the process that starts them, as spawned ones do.
    """

    def __init__(self, prepare: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._prepare = prepare

    def Process(self, *args: Any, **kwargs: Any) -> _Process:  # type: ignore[override]  # noqa: N802
        """A process that is not yet started."""
        return _Process(self._prepare, *args, **kwargs)


class _Process(ForkServerProcess):
    def __init__(self, prepare: Callable[[], None] | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare = prepare
        self._environment: dict[str, str] = {}

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        # Only what differs: who replaces all of it can no longer be given a name (`ps`).
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        for name, value in self._environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        if self._prepare is not None:
            self._prepare()
        super().run()


def use_processors() -> None:
    """Do in a forked process what the OpenMP library does when it is loaded: it was long ago."""
    places = next((os.environ[name] for name in _PLACES if name in os.environ), "")
    processors = {int(number) for number in re.findall(r"\d+", places)}
    if processors:
        os.sched_setaffinity(0, processors)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch = sys.modules.get("torch")
    if threads.isdigit() and torch is not None:
        torch.set_num_threads(int(threads))
