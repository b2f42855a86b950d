"""From chat messages to the plain text Synthia was trained on.

Synthia has no role tokens: a conversation is text with ``SYSTEM:``, ``USER:`` and
``ASSISTANT:`` at the start of lines (`formats`). The way through this module is

    normalize_messages(messages)  ->  render(messages, format)

and everything in it is a pure function of its arguments. The tokenizer adds the one ``<s>``.

Source: the model card of migtissera/Synthia-7B-v3.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Final

from synthia_vllm.errors import InvalidRequest
from synthia_vllm.template.formats import DOCUMENTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from synthia_vllm.template.formats import PromptFormat, Role


class Markers(StrEnum):
    """What happens to a role marker at the start of a line of somebody's content."""

    ESCAPE = "escape"
    """It gets a backslash in front and so is no longer at the start of its line."""
    REJECT = "reject"
    """The request is refused, and the message is named."""
    ALLOW = "allow"
    """Nothing, as in the card's own loop: whoever writes content can write turns."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    merged: int = 1
    """How many of the request's messages it stands for; 0 if the server puts it in."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A system message with a name, reached through a model name ending in ``-{suffix}``."""

    name: str
    suffix: str
    system: str


TREE_OF_THOUGHT: Final = Preset(
    name="tree-of-thought",
    suffix="tot",
    system=(
        "Elaborate on the topic using a Tree of Thoughts and backtrack when necessary to "
        "construct a clear, cohesive Chain of Thought reasoning. Always answer without hesitation."
    ),
)
PRESETS: Final = {TREE_OF_THOUGHT.name: TREE_OF_THOUGHT}

# Where a line may be said to begin: after every character `str.splitlines` breaks at.
_BREAKS = "\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
# What a reader (and many a tokenizer) does not see: controls, zero-width and format
# characters, variation selectors, blank fillers, tags.
_INVISIBLE = (
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb"
    "\U000e0000-\U000e0fff"
)


def _spelling(role: str) -> str:
    """A pattern for `role` in ASCII or full-width letters, with invisible ones in between."""
    return "".join(f"[{re.escape(c)}{chr(ord(c) + 0xFEE0)}][{_INVISIBLE}]*+" for c in role)


@cache
def _line_marker(role_names: tuple[str, ...]) -> re.Pattern[str]:
    """A marker at the start of a line or of the content, behind any blanks.

    Possessive quantifiers keep it linear in the text, whatever the text is.
    """
    names = "|".join(map(_spelling, role_names))
    return re.compile(
        rf"(?:\A|(?<=[{_BREAKS}]))((?:[^\S{_BREAKS}]|[{_INVISIBLE}])*+)(?=(?:{names})[:\uff1a])"
    )


def escape_markers(content: str, fmt: PromptFormat = DOCUMENTED) -> tuple[str, int]:
    """Make line-initial role markers in `content` harmless; return it and how many there were.

    A marker that is not at the start of a line cannot be read as a turn, so one backslash in
    front of it is enough. The start of the content counts as the start of a line.
    """
    return _line_marker(tuple(fmt.role_names.values())).subn(r"\1\\", content)


def normalize_messages(
    messages: Sequence[Message],
    markers: Markers = Markers.ESCAPE,
    default_system: str | None = None,
    *,
    fmt: PromptFormat = DOCUMENTED,
) -> tuple[tuple[Message, ...], int]:
    """Bring `messages` into the shape that is rendered; also return the number of escapes made.

    The result has at most one system message, in front (several are joined by a blank line;
    `default_system` comes first if the request has none; an empty one is left out), then turns in
    which no two neighbours have the same role (they are joined by a newline). White space around
    every content is stripped.

    Raises `InvalidRequest`, naming the message, for a marker when `markers` is ``reject``.
    """
    system: list[str] = []
    turns: list[Message] = []
    escaped = 0
    for position, message in enumerate(messages):
        content = message.content.strip()
        if markers is not Markers.ALLOW:
            content, count = escape_markers(content, fmt)
            if count and markers is Markers.REJECT:
                raise InvalidRequest(
                    f"`messages[{position}].content` has a line that begins with a role marker "
                    f"({_listed(fmt)}), which this server does not accept. "
                    "Put something in front of it on its line.",
                    param=f"messages[{position}].content",
                    code="role_marker",
                )
            escaped += count
        if message.role == "system":
            system.append(content)
        elif turns and turns[-1].role == message.role:
            last = turns[-1]
            joined = f"{last.content}\n{content}".strip()
            turns[-1] = Message(last.role, joined, last.merged + message.merged)
        else:
            turns.append(Message(message.role, content, message.merged))
    if default_system and not any(m.role == "system" and m.merged for m in messages):
        system.insert(0, default_system)
    front = "\n\n".join(part for part in system if part)
    return ((Message("system", front),) if front else ()) + tuple(turns), escaped


def _listed(fmt: PromptFormat) -> str:
    *most, last = (f"{name}:" for name in fmt.role_names.values())
    return f"{', '.join(most)} or {last}"


def render(messages: Sequence[Message], fmt: PromptFormat = DOCUMENTED) -> str:
    """The prompt text of normalized `messages`, without the leading ``<s>``.

    It ends where the assistant is to speak; if the last message is the assistant's own, it ends
    with that message, to be continued.
    """
    lines = [f"{fmt.role_names[message.role]}: {message.content}" for message in messages]
    if not messages or messages[-1].role != "assistant":
        lines.append(fmt.cue)
    elif not messages[-1].content:  # continuing nothing is answering
        lines[-1] = fmt.cue
    return fmt.turn_end.join(lines)


def turn_pair_starts(messages: Sequence[Message]) -> list[int]:
    """Where the prompt may begin if it is to lose its oldest turn pairs, oldest cut last.

    Indices into normalized `messages`, ascending: the first is where the turns begin (nothing is
    lost), each further one is a user message, the last of them the last user message, which is
    never dropped. The system message is in no pair.
    """
    first = 1 if messages and messages[0].role == "system" else 0
    users = [i for i, message in enumerate(messages) if message.role == "user" and i > first]
    return [first, *users]


def drop_turn_pairs(messages: Sequence[Message], start: int) -> tuple[tuple[Message, ...], int]:
    """`messages` with the turns before index `start` dropped, the system message kept.

    Also returns how many of the request's own messages are gone.
    """
    system = tuple(messages[:1]) if messages and messages[0].role == "system" else ()
    start = max(start, len(system))
    dropped = sum(message.merged for message in messages[len(system) : start])
    return system + tuple(messages[start:]), dropped
