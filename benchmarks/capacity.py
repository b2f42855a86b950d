"""How many users fit a GPU: weights, KV cache, and sequences by their length.

Arithmetic alone, of a model's config.json; nothing is run. docs/capacity.md explains it, and a
test holds it against what vLLM's engine reports of the demo model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lib.report import table

if TYPE_CHECKING:
    from collections.abc import Mapping

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}

# Synthia-7B-v3.0's, which is Mistral-7B's.
SYNTHIA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": 4096,
}


@dataclass(frozen=True)
class Geometry:
    """What of a model's shape decides how much memory it takes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    window: int | None
    """Tokens that a token looks back; those before it need not be kept."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        """From a ``config.json`` of Mistral's architecture."""
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config["num_key_value_heads"],
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
            config.get("sliding_window"),
        )

    @property
    def parameters(self) -> int:
        """Numbers in the weights; the output matrix is not the embedding's."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        norms = 2 * self.hidden
        return (
            2 * self.vocabulary * self.hidden
            + self.layers * (attention + mlp + norms)
            + self.hidden
        )

    def kv_bytes(self, dtype: str = "bfloat16") -> int:
        """Of one token: a key and a value in each layer."""
        return 2 * self.layers * self.kv_heads * self.head_size * BYTES[dtype]

    def blocks(self, memory: int, block: int, dtype: str = "bfloat16") -> int:
        """Blocks of `block` tokens that vLLM makes of so many bytes."""
        return memory // (block * self.kv_bytes(dtype))

    def kept(self, length: int, batched: int) -> int:
        """Tokens of a sequence of `length` whose keys and values are kept at most."""
        return length if self.window is None else min(length, self.window - 1 + batched)


def cache_gib(geometry: Geometry, gib: float, reserve: float, share: float, dtype: str) -> float:
    """GiB for the KV cache on a GPU of `gib`, of which vLLM takes `share`."""
    return share * gib - geometry.parameters * BYTES[dtype] / GIB - reserve


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet; dense tensor FLOPs."""

    gib: float
    """Memory as the driver shows it."""
    bandwidth: float
    """Bytes a second."""
    flops: Mapping[str, float]
    """A second, by the type of the weights."""

    @property
    def weights(self) -> str:
        """The smallest type that it computes in."""
        return "fp8" if "fp8" in self.flops else "bfloat16"


GPUS = {
    "l4": Gpu(22, 0.3e12, {"bfloat16": 121e12, "fp8": 242e12}),
    "a10": Gpu(22, 0.6e12, {"bfloat16": 125e12}),
    "a100": Gpu(80, 2.04e12, {"bfloat16": 312e12}),
    "h100": Gpu(80, 3.35e12, {"bfloat16": 989e12, "fp8": 1979e12}),
    "h200": Gpu(139, 4.8e12, {"bfloat16": 989e12, "fp8": 1979e12}),
}
"""From NVIDIA's data sheets: L4, A10, A100 80GB SXM, H100 SXM, H200 SXM."""

OF_BANDWIDTH, OF_FLOPS = 0.7, 0.6
"""What decoding is taken to reach of a data sheet's numbers."""


def step_ms(geometry: Geometry, gpu: Gpu, sequences: int, length: int) -> float:
    """Milliseconds of a decode step: all weights and caches are read once, each token computed."""
    kind = gpu.weights
    cache = sequences * length * geometry.kv_bytes(kind)
    read = (geometry.parameters * BYTES[kind] + cache) / (OF_BANDWIDTH * gpu.bandwidth)
    computed = 2 * geometry.parameters * sequences / (OF_FLOPS * gpu.flops[kind])
    return 1e3 * (read + computed)


def places(
    geometry: Geometry, gpu: Gpu, *, length: int, reserve: float, share: float, step: float
) -> tuple[int, int]:
    """How many sequences of `length` are in the cache, and within a step of `step` ms."""
    free = cache_gib(geometry, gpu.gib, reserve, share, gpu.weights)
    fits = int(free * GIB) // (length * geometry.kv_bytes(gpu.weights))
    within = 0
    while step_ms(geometry, gpu, within + 1, length) <= step:
        within += 1
    return fits, within


def sequences(
    geometry: Geometry, gpus: list[float], lengths: list[int], *,
    reserve: float, share: float, batched: int, weights: str, cache: str,
) -> str:  # fmt: skip
    """A table: GPUs by memory, and how many sequences of each length are in the cache at once."""
    rows: list[list[object]] = [
        ["GPU memory, GiB", "KV cache, GiB", "tokens", *(f"of {n:,}" for n in lengths)]
    ]
    for gib in gpus:
        free = cache_gib(geometry, gib, reserve, share, weights)
        tokens = geometry.blocks(int(free * GIB), 16, cache) * 16
        row: list[object] = [f"{gib:g}", f"{free:.1f}", f"{tokens:,}"]
        row += [f"{tokens // geometry.kept(n, batched):,}" for n in lengths]
        rows.append(row)
    return table(rows)


def presets(geometry: Geometry, length: int, step: float, share: float) -> str:
    """A table: what config/gpu/ has of each GPU, and why."""
    rows: list[list[object]] = [
        [
            "GPU",
            "weights and cache",
            "in the cache",
            f"within {step:g} ms",
            "max_num_seqs",
            "step, ms",
        ]
    ]
    for name, gpu in GPUS.items():
        fits, within = places(
            geometry, gpu, length=length, reserve=preset_reserve(gpu), share=share, step=step
        )
        chosen = min(fits, within) // 8 * 8
        took = step_ms(geometry, gpu, chosen, length)
        rows.append([name, gpu.weights, f"{fits:,}", f"{within:,}", chosen, f"{took:.0f}"])
    return table(rows)


def preset_reserve(gpu: Gpu) -> float:
    """GiB that config/gpu/ sets aside: more steps' tokens and larger graphs on a large GPU."""
    return 2 if gpu.gib < 40 else 4


def main() -> None:
    """Parse, compute, print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/capacity.py\n"
        "  python benchmarks/capacity.py --presets\n"
        "  python benchmarks/capacity.py --gpus 22 --weights fp8 --cache fp8\n"
        "  python benchmarks/capacity.py --config /models/other/config.json --lengths 8192",
    )
    parser.add_argument("--config", type=Path, help="default: Synthia-7B-v3.0's geometry")
    parser.add_argument("--gpus", type=float, nargs="+", default=[22, 40, 80, 139], metavar="GIB")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 32768])
    parser.add_argument("--weights", choices=BYTES, default="bfloat16")
    parser.add_argument("--cache", choices=BYTES, default="bfloat16", help="kv_cache_dtype")
    parser.add_argument("--share", type=float, default=0.92, help="gpu_memory_utilization")
    parser.add_argument("--reserve", type=float, default=2, help="GiB for activations and graphs")
    parser.add_argument("--presets", action="store_true", help="how config/gpu/ is derived")
    parser.add_argument("--step", type=float, default=50, help="ms between tokens, with --presets")
    parser.add_argument("--batched", type=int, default=2048, help="max_num_batched_tokens")
    asked = parser.parse_args()
    config = json.loads(asked.config.read_text()) if asked.config else SYNTHIA
    geometry = Geometry.of(config)
    if asked.presets:
        print(f"sequences of {asked.lengths[0]:,}, steps of at most {asked.step:g} ms\n")
        print(presets(geometry, asked.lengths[0], asked.step, asked.share))
        return
    size = BYTES[asked.weights]
    gib = geometry.parameters * size / GIB
    print(f"weights   {geometry.parameters:,} x {size} bytes = {gib:.1f} GiB")
    print(f"KV cache  {geometry.kv_bytes(asked.cache) / 1024:g} KiB a token\n")
    print(
        sequences(
            geometry, asked.gpus, asked.lengths, reserve=asked.reserve, share=asked.share,
            batched=asked.batched, weights=asked.weights, cache=asked.cache,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
