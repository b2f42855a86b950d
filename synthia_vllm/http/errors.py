"""Errors as HTTP: the one place where an `ApiError` becomes a response, or an event of a stream."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import to_json

from synthia_vllm.errors import ApiError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from synthia_vllm.generate.protocol import Usage

    Envelope = Callable[[ApiError, str], Mapping[str, Any]]
    """What a body says of an error to the request with an id, in the terms of a route's API."""

Headers = list[tuple[bytes, bytes]]

_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's ``X-Request-Id``, if it is a sensible one, or a new id."""
    value = headers.get(b"x-request-id", b"")
    return str(value, "ascii") if _REQUEST_ID.fullmatch(value) else os.urandom(16).hex()


def openai_envelope(error: ApiError, _request_id: str) -> Mapping[str, Any]:
    """OpenAI's, which all routes have that are not another's."""
    return error.envelope()


def error_response(
    error: ApiError,
    request_id: str,
    more: Iterable[tuple[bytes, bytes]] = (),
    envelope: Envelope = openai_envelope,
) -> tuple[int, Headers, bytes]:
    """Status, headers (with `more`) and body of the response that tells `error`."""
    body = to_json(envelope(error, request_id), ensure_ascii=True)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
        *more,
    ]
    if error.retry_after is not None:
        # Whole seconds by the standard; OpenAI's clients read the milliseconds first.
        headers.append((b"retry-after", b"%d" % math.ceil(error.retry_after)))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(1e3 * error.retry_after)))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, Unavailable) and error.code == "draining":
        headers.append((b"connection", b"close"))  # the next request finds another server
    return error.status, headers, body


def error_event(error: ApiError, usage: Usage | None) -> bytes:
    """The event that ends a stream which cannot go on; no ``[DONE]`` follows it.

    It has what was used up, if anything was: in the error, for there are clients that take a stream
    for whole when its usage has come.
    """
    told: dict[str, Any] = dict(error.envelope()["error"])
    if usage is not None:
        told["usage"] = usage
    return b"data: %b\n\n" % to_json({"error": told}, ensure_ascii=True)
