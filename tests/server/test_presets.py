"""The presets of config/gpu/, by vLLM's own parser and by the arithmetic of docs/capacity.md."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from capacity import GPUS, SYNTHIA, Geometry, places, preset_reserve

from synthia_vllm.engine.vllm.options import check_options
from synthia_vllm.settings import load

PRESETS = sorted((Path(__file__).parents[2] / "config" / "gpu").glob("*.yaml"))


def test_there_is_one_for_each_gpu() -> None:
    """And none for a GPU of which nothing is known."""
    assert {preset.stem for preset in PRESETS} == set(GPUS)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_preset(preset: Path) -> None:
    """It is what the arithmetic gives, vLLM takes it, and each value says why."""
    settings = load(preset, {}, [])
    check_options(settings.engine)
    gpu, engine = GPUS[preset.stem], settings.engine
    share = engine["gpu_memory_utilization"]
    fits, within = places(
        Geometry.of(SYNTHIA), gpu, length=1024, reserve=preset_reserve(gpu), share=share, step=50
    )
    assert engine["max_num_seqs"] == min(fits, within) // 8 * 8
    assert settings.limits.max_requests == 2 * engine["max_num_seqs"]
    assert engine["compilation_config"]["max_cudagraph_capture_size"] == engine["max_num_seqs"]
    assert (engine.get("quantization") == "fp8") == (gpu.weights == "fp8")
    assert engine.get("kv_cache_dtype") == engine.get("quantization")
    lines = preset.read_text().splitlines()
    assert "not measured" in lines[0]
    for before, line in pairwise(lines):
        if re.match(r" *\w+: \S", line):
            assert before.strip().startswith("#") or before.endswith("config:"), line
