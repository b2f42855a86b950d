"""Synthia-7B-v3.0 on vLLM: exact prompts, exact answers, for many users at once."""

__version__ = "0.1.0"
