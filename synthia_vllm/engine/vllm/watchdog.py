"""Loaded by vLLM into each of its processes: they end when the server does, whatever way it ended.

Left alone, vLLM's engine core outlives a server that was killed, holding the GPU. vLLM calls the
functions registered under ``vllm.general_plugins`` (see ``pyproject.toml``) in every process it
starts; ours waits there for the server's end. The shared memory goes with the last of them, for
Python's resource tracker takes it away.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import shutil
import signal
import threading
from typing import Final

SERVER: Final = "WATCHDOG_SERVER_PID"
DIRECTORY: Final = "WATCHDOG_DIRECTORY"


def attach() -> None:
    """Follow the server named in the environment; does nothing in any other use of vLLM."""
    server = os.environ.get(SERVER)
    if server is not None and multiprocessing.parent_process() is not None:
        threading.Thread(target=_follow, args=(int(server),), name="watchdog", daemon=True).start()


def _follow(server: int) -> None:
    try:
        ended = os.pidfd_open(server)
    except ProcessLookupError:
        pass
    else:
        select.select([ended], [], [])
    directory = os.environ.get(DIRECTORY)
    if directory:
        shutil.rmtree(directory, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)
