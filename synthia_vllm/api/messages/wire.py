"""Messages as bytes: the plain body, the events of a stream, and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.api.messages.protocol import (
    MessageResponse,
    MessagesUsage,
    StopReason,
    TextBlock,
)
from synthia_vllm.http.chunks import ascii_json

if TYPE_CHECKING:
    from synthia_vllm.errors import ApiError
    from synthia_vllm.generate.response import Delta, ResponseState

_KINDS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def envelope(error: ApiError, request_id: str) -> dict[str, Any]:
    """Anthropic's error object. It has no place for the field: the message names it."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(error.status, other)
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": request_id,
    }


def body(state: ResponseState, choices: list[Delta]) -> MessageResponse:
    """The whole answer."""
    [answer] = choices
    reason, sequence = _end_of(state, answer)
    return _message(state, [TextBlock(text=answer.text)], reason, sequence)


def _message(
    state: ResponseState,
    content: list[TextBlock],
    stop_reason: StopReason | None,
    stop_sequence: str | None,
) -> MessageResponse:
    return MessageResponse(
        id=f"msg_{state.request_id}",
        model=state.prepared.model,
        content=content,
        stop_reason=stop_reason,
        stop_sequence=stop_sequence,
        usage=_usage(state),
    )


def _usage(state: ResponseState) -> MessagesUsage:
    """The prompt, which may not have run yet, and what has run of the answer."""
    return MessagesUsage(
        input_tokens=len(state.prepared.prompt_of(0)) - state.cached_tokens,
        cache_read_input_tokens=state.cached_tokens,
        output_tokens=state.answer_tokens,
    )


def _end_of(state: ResponseState, last: Delta) -> tuple[StopReason, str | None]:
    """Why the answer ended, and at which of the client's own stop strings, if at one."""
    request, stop = state.prepared.request, last.stop_reason
    if last.finish_reason == "length":
        return "max_tokens", None
    if isinstance(stop, str) and stop in request.own_stops:
        return "stop_sequence", stop
    if stop in (request.stop_token_ids or ()):
        return "stop_sequence", None
    return "end_turn", None


def _event(kind: str, **more: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), ascii_json({"type": kind, **more}))


# What is the same in all streams.
_START: Final = _event("content_block_start", index=0, content_block=TextBlock(text=""))
_PING: Final = _event("ping")
_DELTA: Final = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":%b}}\n\n'
)
_STOP: Final = _event("content_block_stop", index=0)
_END: Final = _event("message_stop")


class MessageEvents:
    """The events of one streamed message."""

    __slots__ = ("_end", "_state")

    def __init__(self, state: ResponseState) -> None:
        self._state = state
        self._end: tuple[StopReason, str | None] = ("end_turn", None)

    def open(self) -> bytes:
        """What comes before the first text: the message, and its one block, both empty."""
        message = _message(self._state, [], None, None)
        return _event("message_start", message=message) + _START + _PING

    def delta(self, delta: Delta) -> bytes:
        """The event for what was added; nothing where that is only the end."""
        if delta.finish_reason is not None:
            self._end = _end_of(self._state, delta)
        return _DELTA % ascii_json(delta.text) if delta.text else b""

    def close(self) -> bytes:
        """What comes after the end: why it came, and what it all took."""
        reason, sequence = self._end
        end = {"stop_reason": reason, "stop_sequence": sequence}
        return _STOP + _event("message_delta", delta=end, usage=_usage(self._state)) + _END

    def error(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on; no ``message_stop`` follows it."""
        told = envelope(error, self._state.request_id)
        if self._state.begun:
            told["usage"] = _usage(self._state)
        return b"event: error\ndata: %b\n\n" % ascii_json(told)
