"""Loaded by vLLM into its engine core: the grammar backend, bounded, and ready from the start.

vLLM makes its backend with the first structured request and gives llguidance its default limits,
by which the mask for one token of one answer may take 80 ms, in which nobody else gets a token. And
where a limit is met it takes the answer for complete.

vLLM internal: `vllm.v1.structured_output.StructuredOutputManager.backend`, where the engine core
finds it, `vllm.v1.engine.core.StructuredOutputManager`; and of the backend
`vllm.v1.structured_output.backend_guidance.GuidanceBackend.compile_grammar`,
`vllm.v1.structured_output.backend_guidance.GuidanceGrammar.accept_tokens`,
`vllm.v1.structured_output.backend_guidance.GuidanceGrammar.fill_bitmask`,
`vllm.v1.structured_output.backend_guidance.GuidanceGrammar.check_error` and
`vllm.v1.structured_output.backend_guidance.GuidanceGrammar.ll_matcher`.
"""

from __future__ import annotations

import logging
import os
import time
from functools import lru_cache
from typing import Any, Final

from synthia_vllm.engine.grammar import LIMITS
from synthia_vllm.engine.vllm import watchdog

# Grammars kept compiled, a few megabytes each at most: the same few schemas come again and again,
# and each of the `n` choices of a request wants its own copy.
_COMPILED: Final = 64

# Seconds of CPU that the masks of one answer may take: at first, and for each token. Everybody's
# next token waits for all masks of a step. The median of JSONSchemaBench's is 0.01 ms, 99.9 % take
# less than 0.3.
_MASK_SECONDS: Final = 0.05
_MASK_SECONDS_A_TOKEN: Final = 0.0005


def bound() -> None:
    """Bound what grammars may take here; does nothing in any other use of vLLM."""
    if watchdog.SERVER not in os.environ:
        return
    import xgrammar  # noqa: F401  # applies the masks; vLLM would import it, for seconds, in a step
    from llguidance import LLMatcher, LLParserLimits
    from vllm.v1 import structured_output
    from vllm.v1.structured_output.backend_guidance import (
        GuidanceBackend,
        GuidanceGrammar,
        serialize_guidance_grammar,
    )

    class BoundedGrammar(GuidanceGrammar):  # type: ignore[misc]
        spare = _MASK_SECONDS

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            began = time.thread_time()
            # In an error the mask leaves nothing but the end of the text; which is not one.
            accepted = not self.ll_matcher.is_error() and super().accept_tokens(request_id, tokens)
            self.spare += _MASK_SECONDS_A_TOKEN - (time.thread_time() - began)
            return bool(accepted) and not self.ll_matcher.is_error() and self.spare > 0

        def fill_bitmask(self, bitmask: Any, idx: int) -> None:
            began = time.thread_time()
            super().fill_bitmask(bitmask, idx)
            self.spare -= time.thread_time() - began

        def check_error(self) -> None:
            """Log nothing: the message may have the answer's text in it."""

    class BoundedBackend(GuidanceBackend):  # type: ignore[misc]
        def __post_init__(self) -> None:
            super().__post_init__()
            self._matcher_of = lru_cache(_COMPILED)(self._compiled)

        def _compiled(self, kind: Any, text: str) -> Any:
            serialized = serialize_guidance_grammar(
                kind, text, self.disable_any_whitespace, self.disable_additional_properties
            )
            limits = LLParserLimits(**LIMITS)
            return LLMatcher(self.ll_tokenizer, serialized, log_level=0, limits=limits)

        def compile_grammar(self, request_type: Any, grammar_spec: str, **_: Any) -> Any:
            matcher = self._matcher_of(request_type, grammar_spec).deep_copy()
            return BoundedGrammar(matcher, self.ll_tokenizer, self.vocab_size)

    class Manager(structured_output.StructuredOutputManager):  # type: ignore[misc]
        def __init__(self, vllm_config: Any) -> None:
            super().__init__(vllm_config)
            self.backend = BoundedBackend(
                vllm_config, self.tokenizer, vllm_config.model_config.get_vocab_size()
            )

    from vllm.v1.engine import core

    core.StructuredOutputManager = Manager
    # The request that meets a bound is told; nobody shall fill the log with what is expected.
    scheduler = logging.getLogger("vllm.v1.core.sched.scheduler")
    scheduler.addFilter(lambda record: "grammar rejected tokens" not in str(record.msg))
