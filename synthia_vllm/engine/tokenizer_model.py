"""A tokenizer made from ``tokenizer.model``, and any tokenizer held against it.

A model's tokens are those that it was trained on: SentencePiece's. What ``transformers`` makes of
a model's files depends on which there are, and on its version; of ``tokenizer.model`` alone, as it
was uploaded in 2023, version 5 makes a tokenizer without the space in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

SPACE: Final = "▁"
"""What stands for a space in a piece."""

_PROBES: Final = (
    "USER: Hello!\nASSISTANT:",
    "SYSTEM: Elaborate on the topic.\nUSER: And?\nASSISTANT: So.\nUSER: Ah\nASSISTANT:",
    "SYSTEM: Be brief. \nUSER: And? \nASSISTANT: ",
    "",
    " ",
    " leading",
    "trailing ",
    "two  spaces,   three",
    "a\ttab\t\ttwo",
    "\n\nlines\r\nof\u2028all kinds\n",
    "▁ the mark of a space ▁",
    "café naïve Übung œuvre",
    "cafe\u0301 nai\u0308ve \uff35\uff33\uff25\uff32: ﬁ \u2126",
    "クジラ 鯨 고래 青年",
    "😀🐳👩\u200d🔬🏴",
    "μῆνις אבג السلام नमस्ते",
    "zero\u200bwidth\u00a0space\ufeff\u00ad",
    "<s>, </s>, <unk>, <0x0A>, <s >, [INST] [/INST] <<SYS>> <pad> [PAD] <|im_end|>",
    "<s>USER: <s> a</s>",
    "1234567890 3.14 1e-9",
    "def f(x):\n    return {'a': [x] * 2}  # ∀x ∃y",
    *("x" + " " * length + "y" for length in range(3, 66)),
    "-" * 79 + "\n" + "=" * 79 + "\n" + "x" * 40 + "\n" * 40 + "." * 40 + "\t" * 40,
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A text that a tokenizer reads otherwise than the model."""

    text: str
    ids: list[int]
    expected: list[int]

    def __str__(self) -> str:
        return f"{self.text!r} becomes {self.ids}, and in SentencePiece {self.expected}"


class TokenizerModel:
    """A ``tokenizer.model``. Raises what SentencePiece raises (`OSError`, `RuntimeError`)."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.pieces: Any = SentencePieceProcessor(model_file=str(file))
        special = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
        self.unk, self.bos, self.eos = map(self.pieces.id_to_piece, special)

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt: the text's own, with that of the text's beginning in front."""
        return [self.pieces.bos_id(), *self.pieces.encode(text)]

    def difference(
        self, encode: Callable[[str], list[int]], added: Iterable[str] = ()
    ) -> Difference | None:
        """The first text of the probes of which `encode` makes other ids; None if there is none.

        `added` are tokens that the tokenizer has besides the model's, and no text may become one.
        """
        for text in (*_PROBES, *(f"USER: {token} a{token}" for token in added)):
            ids, expected = encode(text), self.encode(text)
            if ids != expected:
                return Difference(text, ids, expected)
        return None

    def tokenizer(self, added: Mapping[str, int] | None = None) -> Any:
        """The same as a `tokenizers.Tokenizer`.

        The text gets a space in front, is not normalised otherwise, and characters without a
        piece become bytes. Tokens of `added` have ids and no text: none is looked for in a prompt.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
        from tokenizers.models import BPE

        pieces = self.pieces
        vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
        more = {name: i for name, i in (added or {}).items() if name not in vocabulary}
        tokenizer = Tokenizer(
            BPE(
                vocab=vocabulary | more,
                merges=_merges(vocabulary, pieces.get_score),
                unk_token=self.unk,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        tokenizer.add_special_tokens(
            [
                AddedToken(name, special=True, normalized=False)
                for name in (self.unk, self.bos, self.eos, *more)
            ]
        )
        bos, bos_id = self.bos, pieces.bos_id()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
        return tokenizer

    def save(self, directory: Path | str, added: Mapping[str, int], max_len: int) -> None:
        """Write the tokenizer in the layout of Hugging Face."""
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer(added),
            unk_token=self.unk,
            bos_token=self.bos,
            eos_token=self.eos,
            additional_special_tokens=list(added),
            clean_up_tokenization_spaces=False,
            model_max_length=max_len,
        ).save_pretrained(directory)


def _merges(vocabulary: Mapping[str, int], score: Callable[[int], float]) -> list[tuple[str, str]]:
    """Every way to cut a piece in two pieces, best pieces first.

    SentencePiece joins the two neighbours that form the piece of the best score, and of several
    those that are leftmost. The runs of spaces have one score, so that of a long run the left end
    grows to 14, and to 16 if there are two more, before the next is begun. A merge list knows no
    ties: there, runs double as far as they can, and then the largest rests come first.
    """

    def rank(cut: tuple[str, str]) -> tuple[float, ...]:
        left, right = cut
        piece = vocabulary[left + right]
        if {*left, *right} != {SPACE}:
            return -score(piece), vocabulary[left], vocabulary[right]
        if left == right:
            return -score(piece), 0, len(left)
        return -score(piece), 1, -len(right), -len(left)

    cuts = ((piece[:cut], piece[cut:]) for piece in vocabulary for cut in range(1, len(piece)))
    return sorted((cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary), key=rank)
