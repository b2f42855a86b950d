"""OpenAI's form of a stream: chunks, their usage, and ``[DONE]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from pydantic_core import to_json

from synthia_vllm.http.errors import error_event

if TYPE_CHECKING:
    from synthia_vllm.errors import ApiError
    from synthia_vllm.generate.response import Delta, ResponseState

DONE: Final = b"data: [DONE]\n\n"


def ascii_json(value: Any) -> bytes:
    """JSON in ASCII: some readers of events end lines at U+2028, U+2029 and U+0085, too."""
    return to_json(value, ensure_ascii=True)


class Chunks:
    """The events of one streamed answer, as far as chat and completions have them in common."""

    __slots__ = ("_head", "_prompts", "_state", "_tail", "_usage_each")
    id_prefix: ClassVar[str]
    kind: ClassVar[str]

    def __init__(self, state: ResponseState) -> None:
        prepared = state.prepared
        head = {
            "id": f"{self.id_prefix}-{state.request_id}",
            "object": self.kind,
            "created": state.created,
            "model": prepared.model,
            "system_fingerprint": state.fingerprint,
        }
        self._state = state
        self._head = b"data: " + to_json(head)[:-1]
        # With usage asked for, OpenAI puts a null one in every event but the last.
        self._tail = b"}\n\n" if prepared.usage == "never" else b',"usage":null}\n\n'
        self._usage_each = prepared.usage == "each"
        # Those whose prompt's tokens are still to be shown.
        shown = state.open_choices if prepared.request.show_token_ids else 0
        self._prompts = set(range(shown))

    def open(self) -> bytes:
        """What comes before the first text: nothing."""
        return b""

    def delta(self, delta: Delta) -> bytes:
        """The event for what was added to one answer."""
        raise NotImplementedError

    def close(self) -> bytes:
        """What comes after the last choice's end: what it all took, and the mark of the end."""
        if self._state.prepared.usage == "never":
            return DONE
        usage = to_json(self._state.usage())
        return b'%b,"choices":[],"usage":%b}\n\n%b' % (self._head, usage, DONE)

    def error(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on; no ``[DONE]`` follows it."""
        return error_event(error, self._state.usage() if self._state.begun else None)

    def _end(self) -> bytes:
        """The end of an event with text."""
        if self._usage_each:
            return b',"usage":%b}\n\n' % to_json(self._state.usage())
        return self._tail
