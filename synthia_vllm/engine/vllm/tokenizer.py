"""The model's tokenizer: texts to token ids, and token ids to bytes."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.engine.vllm.detokenizer import table
from synthia_vllm.engine.vllm.token_cache import TokenCache, breaks_at_lines, pieces
from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Characters that are tokenised in so short a time (0.1 ms, of Japanese 0.45) that a thread would
# cost more.
_SHORT_TEXT: Final = 1000

BOS: Final = "<s>"
"""With what every prompt begins."""


class Tokenizer:
    """vLLM's `tokenizer`, with threads of its own: tokenising is CPU work.

    Raises `StartupError` if it is not Synthia's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._encoders = encoders(tokenizer)
        backend = tokenizer.backend_tokenizer
        plain = self._encoders[False]
        cuts = breaks_at_lines(json.loads(plain.to_str()))
        self._cache = TokenCache(max(backend.get_vocab().values()) + 1) if cuts else None
        self._front = len(plain.encode("\n").ids) - 1  # tokens put in front of what begins so
        self._token = tokenizer.convert_ids_to_tokens
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        added = backend.get_added_tokens_decoder()
        self.texts = table(json.loads(backend.decoder.__getstate__()), backend.get_vocab(), added)
        """The text of each token that means the same wherever it stands, by id."""
        # By the tokenizer, not by the list of their roles, which is another file and may be odd.
        self.special_tokens = {i: token.content for i, token in added.items() if token.special}
        self.longest_token = max(map(len, tokenizer.get_vocab()))
        """Characters."""
        self.vocab_size = len(tokenizer)
        self.eos: str = tokenizer.eos_token
        self.eos_id: int = tokenizer.eos_token_id

    async def encode(
        self, text: str, *, special_tokens: bool, cache_salt: str | None = None
    ) -> list[int]:
        """As `Engine.tokenize`."""
        cache = self._cache
        if special_tokens or cache is None:
            [tokens] = await self._encode([text], special_tokens=special_tokens)
            return tokens
        parts = pieces(text)
        last = len(parts) - 1
        known = [cache.get((cache_salt, n == 0, part)) for n, part in enumerate(parts[:last])]
        known.append(None)  # no other text has that one, as a rule
        missing = [part for part, ids in zip(parts, known, strict=True) if ids is None]
        fresh = iter(await self._encode(missing, special_tokens=False))
        tokens = []
        for n, (part, kept) in enumerate(zip(parts, known, strict=True)):
            ids = kept
            if ids is None:
                ids = next(fresh)
                if n:
                    del ids[: self._front]
                if n < last:
                    cache.keep((cache_salt, n == 0, part), ids)
            tokens += ids
        return tokens

    async def _encode(self, texts: list[str], *, special_tokens: bool) -> list[list[int]]:
        # Of the tokenizer's calls only those for a batch let go of the GIL.
        encode = self._encoders[special_tokens].encode_batch_fast
        if sum(map(len, texts)) <= _SHORT_TEXT:
            encodings = encode(texts)
        else:
            loop = asyncio.get_running_loop()
            encodings = await loop.run_in_executor(self._threads, encode, texts)
        return [encoding.ids for encoding in encodings]

    def token_bytes(self, token_id: int) -> bytes:
        """As `Engine.token_bytes`."""
        if token_id in self.special_tokens:
            return b""
        piece: str | None = self._token(token_id)
        if piece is None:  # a row of the model's matrices that is there to fill them up
            return b""
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    async def decode(self, token_ids: Sequence[int]) -> str:
        """As `Engine.detokenize`."""
        loop = asyncio.get_running_loop()
        decode = self._encoders[True].decode
        text: str = await loop.run_in_executor(
            self._threads, partial(decode, list(token_ids), skip_special_tokens=False)
        )
        return text

    def serialized(self) -> str:
        """All of it, for another process."""
        text: str = self._encoders[True].to_str()
        return text

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False)


def encoders(tokenizer: Any) -> dict[bool, Any]:
    """The model's tokenizer twice, by whether special tokens in the text are recognised.

    Copies of our own: the switch is state of the tokenizer, and vLLM uses the original. Whether it
    puts the beginning-of-text token in front is one more such switch, and has to be on.

    Raises `StartupError` if there is no such token.
    """
    from tokenizers import Tokenizer, processors

    made = {}
    for recognised in (False, True):
        made[recognised] = encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        encoder.encode_special_tokens = not recognised
        encoder.no_truncation()
        encoder.no_padding()
        bos = encoder.token_to_id(BOS)
        if bos is None:
            raise StartupError(
                f"The model's tokenizer has no token {BOS}, so this is not a Synthia model (or its "
                "tokenizer files are from another one)."
            )
        if encoder.encode("a").ids != [bos, *encoder.encode("a", add_special_tokens=False).ids]:
            encoder.post_processor = processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
            )
    return made
