"""A model's directory with all but the weights, for `load_format=dummy`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.demo.training import mistral_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_REST: Final = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_without_weights(place: Path, dimensions: Mapping[str, Any]) -> Path:
    """A directory in `place` with a configuration of these `dimensions` and Synthia's tokenizer."""
    directory = place / "Synthia-7B-v3.0"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**dimensions, **_REST}))
    mistral_tokenizer().save(directory, {}, int(1e30))
    return directory
