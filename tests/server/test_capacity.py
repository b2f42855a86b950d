"""The arithmetic of docs/capacity.md, against the engine and against the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from capacity import GIB, Geometry
from safetensors import safe_open

if TYPE_CHECKING:
    from serving import Running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "capacity.md").read_text()


def test_the_engine_makes_as_many_blocks(live: Running, demo: Path) -> None:
    """Of 1 GiB, as the server sets it on a CPU, by bytes a token and tokens a block."""
    geometry = Geometry.of(json.loads((demo / "config.json").read_text()))
    text = httpx.get(f"{live.url}/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith("vllm:cache_config_info{")]
    reported = dict(re.findall(r'(\w+)="([^"]*)"', line))
    block = int(reported["block_size"])
    assert int(reported["num_gpu_blocks"]) == geometry.blocks(GIB, block, "float32")


def test_the_parameters_are_all_counted(demo: Path) -> None:
    """Those in the checkpoint, to the last."""
    geometry = Geometry.of(json.loads((demo / "config.json").read_text()))
    with safe_open(demo / "model.safetensors", "pt") as weights:
        counted = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert geometry.parameters == counted


@pytest.mark.parametrize(
    "command", re.findall(r"(?m)^`python (benchmarks/capacity\.py[^`]*)`", PAGE)
)
def test_the_page_says_what_the_script_says(command: str) -> None:
    """Each table of the page is what its command prints."""
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n\n")[1].strip() in PAGE
