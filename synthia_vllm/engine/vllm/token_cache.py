"""The tokens of texts that come again: a system message, the earlier turns of a conversation.

Mistral's tokenizer merges characters whatever words they are in, so the tokens of a text are not
those of its parts, except at a line break: no token has one together with anything else, so no
merge crosses it. A text is cut there, and of each piece but the last the tokens are kept. Pieces
depend on nothing that comes after them, so a conversation that goes on begins with the same ones.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

# Characters of a piece, at least: a system message is longer, and each piece costs a look-up.
_PIECE: Final = 64
_KEPT_BYTES: Final = 32 << 20
_BYTES_AROUND: Final = 450  # of a piece: key, salt, place, list

# The normalizer of Llama's and Mistral's tokenizers, which changes nothing at a line break.
_NORMALIZER: Final = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}
_BREAK: Final = "<0x0A>"
"""The token of a line break."""


def breaks_at_lines(tokenizer: Mapping[str, Any]) -> bool:
    """Whether no token of `tokenizer` (as in ``tokenizer.json``) reaches across a line break."""
    model = tokenizer["model"]
    return (
        tokenizer["normalizer"] == _NORMALIZER
        and tokenizer["pre_tokenizer"] is None
        and (model["type"], model["byte_fallback"], model["dropout"]) == ("BPE", True, None)
        and not any(
            "\n" in piece or (_BREAK in piece and piece != _BREAK) for piece in model["vocab"]
        )
        and all(token["special"] for token in tokenizer["added_tokens"])
    )


def pieces(text: str) -> list[str]:
    """`text`, cut so that each piece but the first begins with a line break."""
    found, start = [], 0
    while (end := text.find("\n", start + _PIECE)) != -1:
        found.append(text[start:end])
        start = end
    found.append(text[start:])
    return found


Piece = tuple[str | None, bool, str]
"""The salt it is kept under, whether it is the first of its text (which has the beginning-of-text
token in front), and the text of it."""


class TokenCache:
    """The tokens of pieces of texts, under the salt of who sent them, in `limit` bytes.

    What has not been asked for the longest goes first. Ids are below `tokens`.

    How long a text takes to tokenise tells whether it has been here, as it does of the engine's
    prefix cache: so whoever shares that shares this, and nobody else.
    """

    def __init__(self, tokens: int, limit: int = _KEPT_BYTES) -> None:
        self._limit = limit
        self._kept: OrderedDict[Piece, list[int]] = OrderedDict()
        self._bytes = 0
        # All lists are of these, so that a token of them takes 8 bytes and not 40.
        self._ids = list(range(tokens))

    def get(self, piece: Piece) -> list[int] | None:
        """The tokens of `piece`, if they are kept. They must not be changed."""
        found = self._kept.get(piece)
        if found is not None:
            self._kept.move_to_end(piece)
        return found

    def keep(self, piece: Piece, tokens: list[int]) -> None:
        """Keep the `tokens` of `piece`, in place of some that have not been asked for lately."""
        if piece in self._kept:
            return
        ids = self._ids
        self._kept[piece] = [ids[token] for token in tokens]
        self._bytes += size(piece, tokens)
        while self._bytes > self._limit:
            self._bytes -= size(*self._kept.popitem(last=False))


def size(piece: Piece, tokens: list[int]) -> int:
    """The bytes of memory that keeping `tokens` takes at most."""
    return 8 * len(tokens) + 4 * len(piece[2]) + _BYTES_AROUND
