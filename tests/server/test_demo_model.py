"""The demo model is made by one process at a time, and wholly or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from serving import wait_until

from synthia_vllm.demo.checkpoint import directory, make_demo
from synthia_vllm.demo.training import Recipe

if TYPE_CHECKING:
    from pathlib import Path

TINY = Recipe(steps=2, extra_rounds=0)
# A process that makes the tiny model in the directory it is given, slowly if told to.
MAKER = """
import sys, time
from pathlib import Path
from synthia_vllm.demo import checkpoint as demo
from synthia_vllm.demo import training as demo_training
def progress(line):
    print(line, flush=True)
    if "step 1/" in line:
        time.sleep(float(sys.argv[2]))
print(demo.make_demo(progress, Path(sys.argv[1]), demo_training.Recipe(steps=2, extra_rounds=0)))
"""


def make(cache: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(cache), str(pause)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_make_one_model(tmp_path: Path) -> None:
    """Of two at once one makes it, the other waits and says so; a third finds it."""
    first = make(tmp_path, 3)
    assert first.stdout
    wait_until(lambda: list(tmp_path.glob("demo-*.tmp-*")), 60)
    second = make(tmp_path, 0)
    said = [process.communicate(timeout=120)[0].splitlines() for process in (first, second)]
    assert said[0][-1] == said[1][-1] == str(directory(tmp_path, TINY))
    assert any("another process is making it" in line for line in said[1])
    assert not any("training" in line for line in said[1])
    lines: list[str] = []
    make_demo(lines.append, tmp_path, TINY)
    assert lines == []
    assert {path.name for path in directory(tmp_path, TINY).iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_killed_half_way_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """After SIGKILL in mid-training there is no model, and the next try makes one and cleans up."""
    victim = make(tmp_path, 60)
    assert victim.stdout
    wait_until(lambda: list(tmp_path.glob("demo-*.tmp-*")), 60)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    final = directory(tmp_path, TINY)
    assert not final.exists()
    assert make(tmp_path, 0).communicate(timeout=120)[0].splitlines()[-1] == str(final)
    assert not list(tmp_path.glob("demo-*.tmp-*"))
