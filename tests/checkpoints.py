"""The demo model's weights and tokenizer, written in the layouts that uploads of 2023 have."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file

from synthia_vllm.demo.training import mistral_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Weights = Literal["safetensors", "sharded safetensors", "bin", "sharded bin"]
Changes = dict[str, Any]

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "transformers_version": "4.35.0.dev0",
    "use_cache": False,
}
"""What a `config.json` of Mistral-7B-v0.1 says, but for the dimensions."""

TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": int(1e30),
    "pad_token": None,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": True,
}
"""What its `tokenizer_config.json` says."""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_model(
    demo: Path,
    directory: Path,
    *,
    weights: Weights = "safetensors",
    dtype: torch.dtype = torch.float32,
    rows: int = 32000,
    config: Changes | None = None,
    generation: Changes | None = None,
) -> None:
    """Write the demo's weights and configuration; `rows` are those of the embedding.

    A key of `config` that is None is left out; without `generation` that file is left out.
    """
    directory.mkdir(exist_ok=True)
    dimensions = json.loads((demo / "config.json").read_text())
    names = "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"
    found: Changes = {name: dimensions[name] for name in (*names, "num_key_value_heads")}
    kind = str(dtype).removeprefix("torch.")
    found |= CONFIG | {"vocab_size": rows, "torch_dtype": kind} | (config or {})
    _dump(directory / "config.json", {k: v for k, v in found.items() if v is not None})
    if generation is not None:
        _dump(directory / "generation_config.json", generation)
    tensors = {name: t.to(dtype) for name, t in load_file(demo / "model.safetensors").items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = tensors[name].new_zeros((rows - len(tensors[name]), tensors[name].shape[1]))
        tensors[name] = torch.cat((tensors[name], more))
    write_weights(tensors, directory, weights)


def write_weights(tensors: dict[str, torch.Tensor], directory: Path, weights: Weights) -> None:
    """Write `tensors` as one file, or as two and an index."""
    stem, ending = ("pytorch_model", "bin") if weights.endswith("bin") else ("model", "safetensors")
    shards = [tensors]
    if weights.startswith("sharded"):
        names = sorted(tensors)
        half = len(names) // 2
        shards = [{n: tensors[n] for n in part} for part in (names[:half], names[half:])]
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        of_all = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = directory / f"{stem}{of_all}.{ending}"
        if ending == "bin":
            torch.save(shard, file)
        else:
            save_file(shard, file, metadata={"format": "pt"})
        place |= dict.fromkeys(shard, file.name)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": place}
        _dump(directory / f"{stem}.{ending}.index.json", index)


def write_tokenizer(
    directory: Path,
    *,
    model: bool = True,
    fast: bool = False,
    config: Changes | None = None,
    special: Changes | None = SPECIAL,
    added: dict[str, int] | None = None,
) -> None:
    """Write the tokenizer's files: ``tokenizer.model``, and with `fast` ``tokenizer.json``.

    A key of `config` that is None is left out, as is ``special_tokens_map.json`` without `special`.
    """
    directory.mkdir(exist_ok=True)
    tokenizer = mistral_tokenizer()
    if model:
        (directory / "tokenizer.model").write_bytes(tokenizer.pieces.serialized_model_proto())
    if fast:
        tokenizer.tokenizer(added).save(str(directory / "tokenizer.json"))
    found = TOKENIZER | (config or {})
    _dump(directory / "tokenizer_config.json", {k: v for k, v in found.items() if v is not None})
    if special is not None:
        _dump(directory / "special_tokens_map.json", special)
    if added:
        _dump(directory / "added_tokens.json", added)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """The demo's own tokenizer files, from one directory to another."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory)


def _dump(file: Path, content: Changes) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


# --- Quantised -----------------------------------------------------------------------------------

GROUP = 64
"""Inputs that share a scale, of those kinds that have groups."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns is in which four bits of AWQ's words."""


def write_quantised(demo: Path, directory: Path, kind: str) -> None:
    """The demo with each linear layer but the last quantised: see `QUANTISED`."""
    describe, quantise = QUANTISED[kind]
    write_model(demo, directory, config={"quantization_config": describe})
    (directory / "model.safetensors").unlink()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(demo / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            tensors |= {f"{layer}.{part}": t for part, t in quantise(tensor).items()}
        else:
            tensors[name] = tensor
    write_weights({name: t.contiguous() for name, t in tensors.items()}, directory, "safetensors")


def _whole(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` in whole numbers up to `largest`, and the scale of each output."""
    scale = weight.abs().amax(1, keepdim=True) / largest
    return (weight / scale).round().clamp(-largest, largest), scale


def _groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` in four bits around 8, (outputs, inputs), and the scale of each group of inputs."""
    outputs, inputs = weight.shape
    parts = weight.view(outputs, inputs // GROUP, GROUP)
    scale = parts.abs().amax(2, keepdim=True) / 7
    numbers = (parts / scale).round().clamp(-8, 7) + 8
    return numbers.view(outputs, inputs).to(torch.int32), scale.squeeze(2)


def _pack(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbours of each row in one word, four bits each."""
    parts = numbers.view(len(numbers), -1, 8).to(torch.int64)
    words = torch.zeros(parts.shape[:2], dtype=torch.int64)
    for place, column in enumerate(order):
        words |= parts[:, :, column] << (4 * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scale = _whole(weight, 127)
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}


def _fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.view(1)}


def _packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scale = _groups(weight)
    return {
        "weight_packed": _pack(numbers),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def _gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scale = _groups(weight)
    zeros = torch.full_like(scale.T, 7, dtype=torch.int32)  # one is added to it
    return {
        "qweight": _pack(numbers).T,
        "qzeros": _pack(zeros),
        "scales": scale.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scale = _groups(weight)
    zeros = torch.full_like(scale.T, 8, dtype=torch.int32)
    return {
        "qweight": _pack(numbers.T, AWQ_ORDER),
        "qzeros": _pack(zeros, AWQ_ORDER),
        "scales": scale.T,
    }


def _compressed(form: str, weights: Changes, inputs: Changes | None) -> Changes:
    """`quantization_config` as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_FIXED = {"symmetric": True, "dynamic": False}
_TOKEN = {"symmetric": True, "dynamic": True, "strategy": "token"}

QUANTISED: dict[str, tuple[Changes, Callable[[torch.Tensor], dict[str, torch.Tensor]]]] = {
    "compressed-tensors int8": (
        _compressed(
            "int-quantized",
            _FIXED | {"num_bits": 8, "type": "int", "strategy": "channel"},
            _TOKEN | {"num_bits": 8, "type": "int"},
        ),
        _int8,
    ),
    "compressed-tensors fp8": (
        _compressed(
            "float-quantized",
            _FIXED | {"num_bits": 8, "type": "float", "strategy": "tensor"},
            _TOKEN | {"num_bits": 8, "type": "float"},
        ),
        _fp8,
    ),
    "compressed-tensors int4": (
        _compressed(
            "pack-quantized",
            _FIXED | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
            None,
        ),
        _packed,
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        _gptq,
    ),
    "awq": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        _awq,
    ),
}
"""Of each kind, what `config.json` says of it and what becomes of a layer's weights."""
