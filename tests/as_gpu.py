"""`synthia-vllm` with the CPU build of vLLM, started as it is on a machine with a GPU.

Then its processes are spawned, not forked, and nothing of the environment is set for a CPU.
"""

from __future__ import annotations

import sys

from synthia_vllm import settings

settings.gpu_present = lambda: True  # before anybody imports it, here and in spawned processes

if __name__ == "__main__":
    from synthia_vllm.cli.main import main

    sys.exit(main())
