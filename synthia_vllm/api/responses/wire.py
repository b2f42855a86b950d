"""Responses as bytes: the plain body, and the typed events of a stream."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, cast

from synthia_vllm.api.responses.protocol import (
    FormatTold,
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponsesUsage,
    Status,
    TextTold,
)
from synthia_vllm.errors import ApiError, InvalidRequest, RateLimited
from synthia_vllm.http.chunks import ascii_json

if TYPE_CHECKING:
    from synthia_vllm.generate.response import Delta, ResponseState


def body(state: ResponseState, choices: list[Delta]) -> ResponseObject:
    """The whole answer."""
    [choice] = choices
    status: Status = "incomplete" if choice.finish_reason == "length" else "completed"
    part = OutputText(text=choice.text, logprobs=choice.logprobs or [])
    return _response(state, status, [_message(state, status, part)])


def _response(
    state: ResponseState,
    status: Literal["in_progress", "completed", "incomplete", "failed"],
    output: list[OutputMessage],
    error: ApiError | None = None,
) -> ResponseObject:
    """What is to be said of the response, as far as it has got."""
    prepared = state.prepared
    request = cast("ResponsesRequest", prepared.request)
    sampling = prepared.engine_requests[0].sampling
    return ResponseObject(
        id=f"resp_{state.request_id}",
        created_at=state.created,
        status=status,
        completed_at=int(time.time()) if status == "completed" else None,
        error=None if error is None else _error(error),
        frequency_penalty=sampling.frequency_penalty,
        incomplete_details=IncompleteDetails() if status == "incomplete" else None,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        model=prepared.model,
        output=output,
        presence_penalty=sampling.presence_penalty,
        prompt_cache_key=request.prompt_cache_key,
        safety_identifier=request.safety_identifier,
        temperature=sampling.temperature,
        text=TextTold(format=_format(request)),
        top_logprobs=sampling.logprobs or 0,
        top_p=sampling.top_p,
        truncation=request.truncation or "disabled",
        usage=_usage(state) if status != "in_progress" and state.begun else None,
        user=request.user,
        metadata=request.metadata or {},
    )


def _format(request: ResponsesRequest) -> FormatTold:
    asked = request.text.format if request.text else None
    if asked is None:
        return FormatTold()
    if asked.type != "json_schema":
        return FormatTold(type=asked.type)
    return FormatTold(
        type=asked.type,
        name=asked.name,
        schema_=asked.schema_,
        description=asked.description,
        strict=asked.strict,
    )


def _usage(state: ResponseState) -> ResponsesUsage:
    return ResponsesUsage(
        input_tokens=state.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=state.cached_tokens, dropped_messages=state.prepared.dropped_messages
        ),
        output_tokens=state.answer_tokens,
        total_tokens=state.prompt_tokens + state.answer_tokens,
    )


def _error(error: ApiError) -> ResponseError:
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"] = "server_error"
    if isinstance(error, RateLimited):
        code = "rate_limit_exceeded"
    elif isinstance(error, InvalidRequest):
        code = "invalid_prompt"
    return ResponseError(code=code, message=error.message, param=error.param, type=error.kind)


def _message(state: ResponseState, status: Status, *parts: OutputText) -> OutputMessage:
    return OutputMessage(id=f"msg_{state.request_id}", status=status, content=list(parts))


class TypedEvents:
    """The events of one streamed answer: a response, its one item, and that item's one part.

    The stream asks for what comes before the first text after that text: so the first four events
    have their numbers, and deltas begin with the next.
    """

    __slots__ = ("_before", "_logprobs", "_number", "_state", "_texts")

    def __init__(self, state: ResponseState) -> None:
        self._state = state
        self._before = (
            b"event: response.output_text.delta\n"
            b'data: {"type":"response.output_text.delta","item_id":%b,"output_index":0,'
            b'"content_index":0,"delta":' % ascii_json(f"msg_{state.request_id}")
        )
        self._number = 4
        self._texts: list[str] = []
        self._logprobs: list[Any] = []

    def open(self) -> bytes:
        """The response, its item and its part, all of them without a text yet."""
        state = self._state
        response = _response(state, "in_progress", [])
        told: tuple[tuple[str, dict[str, Any]], ...] = (
            ("response.created", {"response": response}),
            ("response.in_progress", {"response": response}),
            (
                "response.output_item.added",
                {"output_index": 0, "item": _message(state, "in_progress")},
            ),
            ("response.content_part.added", self._place(part=OutputText(text=""))),
        )
        return b"".join(
            [_event(name, number, fields) for number, (name, fields) in enumerate(told)]
        )

    def delta(self, delta: Delta) -> bytes:
        """The event for what was added to the answer, if anything was."""
        text, logprobs = delta.text, delta.logprobs
        if not text and not logprobs:
            return b""
        self._texts.append(text)
        number = self._number
        self._number = number + 1
        shown = b"[]"
        if logprobs:
            self._logprobs += logprobs
            shown = ascii_json(logprobs)
        return b'%b%b,"logprobs":%b,"sequence_number":%d}\n\n' % (
            self._before,
            ascii_json(text),
            shown,
            number,
        )

    def close(self) -> bytes:
        """The part, its item and the response, whole."""
        state = self._state
        status: Status = "incomplete" if state.finish_reasons == ["length"] else "completed"
        part = self._part()
        message = _message(state, status, part)
        done = self._place(text=part.text, logprobs=part.logprobs)
        return b"".join(
            [
                self._next("response.output_text.done", done),
                self._next("response.content_part.done", self._place(part=part)),
                self._next("response.output_item.done", {"output_index": 0, "item": message}),
                self._next(f"response.{status}", {"response": _response(state, status, [message])}),
            ]
        )

    def error(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on, in OpenAI's order: the error, what ran by then.

        OpenAI sends the error in an envelope, by which its SDK raises it; its types have it flat.
        """
        told = error.envelope()["error"]
        flat = {name: told[name] for name in ("code", "message", "param")}
        broken = _message(self._state, "incomplete", self._part())
        response = _response(self._state, "failed", [broken], error)
        return self._next("error", {**flat, "error": told}) + self._next(
            "response.failed", {"response": response}
        )

    def _part(self) -> OutputText:
        """The answer so far."""
        return OutputText(text="".join(self._texts), logprobs=self._logprobs)

    def _place(self, **fields: Any) -> dict[str, Any]:
        """`fields` of an event that is about the one part."""
        item_id = f"msg_{self._state.request_id}"
        return {"item_id": item_id, "output_index": 0, "content_index": 0, **fields}

    def _next(self, name: str, fields: dict[str, Any]) -> bytes:
        number = self._number
        self._number = number + 1
        return _event(name, number, fields)


def _event(name: str, number: int, fields: dict[str, Any]) -> bytes:
    told = {"type": name, "sequence_number": number, **fields}
    return b"event: %b\ndata: %b\n\n" % (name.encode(), ascii_json(told))
