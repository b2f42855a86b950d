"""What one kind of request for text is to the server: all that differs between routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthia_vllm.http.errors import openai_envelope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import BaseModel

    from synthia_vllm.generate.call import Call
    from synthia_vllm.generate.response import Delta, Prepared, ResponseState
    from synthia_vllm.http.errors import Envelope
    from synthia_vllm.http.sse import Events


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRoute:
    """A route that generates text, plain or streamed."""

    path: str
    operation: str
    """Its name in OpenTelemetry's conventions, and in the log."""
    summary: str
    """What it is for, in the API's description."""
    request: type[BaseModel]
    response: type[BaseModel]
    prepare: Callable[[Call], Awaitable[Prepared]]
    """Makes requests for the engine of a body, and rules for the answers. Raises `ApiError`."""
    body: Callable[[ResponseState, list[Delta]], BaseModel]
    """Makes the body of a plain answer, of each choice in whole."""
    events: Callable[[ResponseState], Events]
    """Makes what writes the events of a streamed one."""
    envelope: Envelope = openai_envelope
    """Makes the body of an error."""
    id_headers: tuple[bytes, ...] = ()
    """Headers that tell the request's id, beside ``X-Request-Id``."""
