"""Texts as tokens and tokens as text: ``/tokenize``, ``/detokenize``, ``/tokenizer_info``."""

from synthia_vllm.api.tokenize.serving import attach

__all__ = ["attach"]
