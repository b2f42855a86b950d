"""Reading a request off the socket: its body, and how long its answer may take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from synthia_vllm.errors import BodyTooLarge, InvalidRequest
from synthia_vllm.generate.parse import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi.responses import Response
    from starlette.requests import Request
    from starlette.types import Receive

    from synthia_vllm.generate.parse import Parsed
    from synthia_vllm.http.state import ServerState

IGNORED: Final = b"x-synthia-ignored"
"""Names fields of the request that changed nothing."""
_TIMEOUT: Final = "X-Request-Timeout"


class ClientLeft(Exception):
    """The connection is gone; there is nobody to answer."""


def identify(state: ServerState, headers: Mapping[bytes, bytes]) -> str:
    """The user whose key a request brings, by either of the two headers. Raises `Unauthorized`."""
    return state.admission.identify(headers.get(b"authorization"), headers.get(b"x-api-key"))


def keyed(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request brings a key, right or wrong."""
    return b"authorization" in headers or b"x-api-key" in headers


async def read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body. Raises `InvalidRequest` if it is no JSON by its headers, or too large.

    Raises `ClientLeft` if it does not come to its end.
    """
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        # Also what keeps other sites' pages from posting here: for this type browsers ask first.
        raise InvalidRequest("Send the body with `Content-Type: application/json`.")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise InvalidRequest("The body must not be compressed (`Content-Encoding`).")
    if int(headers.get(b"content-length", b"0")) > limit:
        raise BodyTooLarge(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise BodyTooLarge(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


async def parse_body(
    model: type[Parsed], state: ServerState, request: Request, response: Response
) -> Parsed:
    """The request of this `model` in the body; `response` is told which fields were ignored.

    For FastAPI's routes. Raises what `read_body` and `parse` raise.
    """
    settings = state.settings
    headers = dict(request.scope["headers"])
    body = await read_body(headers, request.receive, settings.limits.max_body_bytes)
    asked = parse(model, body, refuse_unknown=settings.refuse_unknown)
    if asked.ignored:
        state.note_ignored(asked.ignored)
        response.headers[IGNORED.decode()] = ", ".join(asked.ignored)
    return asked


def deadline(headers: dict[bytes, bytes], longest: float) -> float:
    """The seconds this request may take: what it asks for, up to the server's own limit."""
    asked = headers.get(_TIMEOUT.lower().encode())
    if asked is None:
        return longest
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest(
            f"`{_TIMEOUT}` must be a number of seconds above 0.",
            param=_TIMEOUT,
            code="invalid_value",
        )
    return min(seconds, longest)
