"""How a conversation is written: one object for each spelling.

All that the rest of the server has to know of a format is a field here. `prompt` renders by it and
makes its markers harmless in what users write, `answer` ends at its stops.

Source: the model card of migtissera/Synthia-7B-v3.0, which shows two spellings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Role = Literal["system", "user", "assistant"]

_CARDS_NAMES: Final[Mapping[Role, str]] = {
    "system": "SYSTEM",
    "user": "USER",
    "assistant": "ASSISTANT",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """A conversation is lines of ``NAME: content``, and ends with the cue for the assistant."""

    name: str
    """What the `format` setting calls it."""
    turn_end: str
    """Stands between two turns, and has the line break that makes the next name a marker."""
    cue: str
    """Ends a prompt that is to be answered."""
    role_names: Mapping[Role, str] = field(default_factory=lambda: _CARDS_NAMES, hash=False)
    """With a colon, and at the start of a line, each is a marker."""
    stops: tuple[str, ...] = ("USER:",)
    """Where the model begins to write the user's next turn, which is where an answer ends."""


DOCUMENTED: Final = PromptFormat(name="documented", turn_end="\n", cue="ASSISTANT:")
"""The card's "prompt format" block."""

EXAMPLE: Final = PromptFormat(name="example", turn_end=" \n", cue="ASSISTANT: ")
"""The card's code, byte for byte: it ends in a bare space, which the tokenizer turns into a token
of its own that is not there when the same conversation comes back one turn later, so every answer
misses the prefix cache once.
"""

VERSION: Final = 1
"""Of how a conversation becomes text; to be raised when the same messages become another text."""

FORMATS: Final[Mapping[str, PromptFormat]] = {fmt.name: fmt for fmt in (DOCUMENTED, EXAMPLE)}
