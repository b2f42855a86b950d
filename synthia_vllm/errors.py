"""Everything that can go wrong, as one closed tree.

::

    SynthiaError
    ├── StartupError            the server cannot start: the message says what to change
    └── ApiError                a request gets this answer instead of text
        ├── InvalidRequest      400  the request asks for something it cannot have
        │   ├── ContextOverflow 400  the conversation does not fit the context
        │   ├── GrammarTooComplex 400  the answer got to where its grammar costs too much
        │   ├── Unauthorized    401  no key, or none that is known
        │   ├── Forbidden       403  this user may not have that
        │   ├── UnknownModel    404
        │   ├── NoSuchRoute     404, or 405 with this method
        │   └── BodyTooLarge    413
        ├── RateLimited         429  this user's share is used up; come back later
        ├── Unavailable         503  not now: starting, draining or full; come back later
        ├── DeadlineExceeded    504  the answer was not ready in time
        ├── EngineDead          503  the engine process is gone; a supervisor restarts the server
        └── EngineFault         500  the engine failed at this one request

An `ApiError` knows its status and the fields of OpenAI's error envelope, so that the same
error reads the same as an HTTP response and as an event in the middle of a stream.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Mapping


def without_password(text: str) -> str:
    """`text`, where no URL tells a user and a password."""
    return re.sub(r"//\S*@", "//***@", text)


class SynthiaError(Exception):
    """Root of the tree; never raised itself."""


class StartupError(SynthiaError):
    """The server cannot start. The message is for the operator: what is wrong and the way out.

    No password that is part of a URL is told.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_password(message))


class ApiError(SynthiaError):
    """An error a client sees, in OpenAI's envelope.

    `message` is for a person and names limit and value; `param` names the field at fault, as
    in ``messages[2].content``; `code` is for a program.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    retry_after: float | None = None
    """Seconds after which trying again makes sense, sent as the ``Retry-After`` header."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        if retry_after is not None:
            self.retry_after = retry_after

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """The JSON object of OpenAI's error format."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(ApiError):
    """The request asks for something it cannot have; trying again unchanged is of no use."""

    status = 400
    kind = "invalid_request_error"

    def under(self, names: Mapping[str, str]) -> Self:
        """The same, with fields called by the names that they have on another route."""
        self.message = re.sub(r"`([^`]+)`", lambda m: f"`{names.get(m[1], m[1])}`", self.message)
        self.param = names.get(self.param or "", self.param)
        return self


class ContextOverflow(InvalidRequest):
    """The prompt leaves no room for an answer in the model's context."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class GrammarTooComplex(InvalidRequest):
    """The grammar of this answer got to where it costs more than one answer may."""

    def __init__(self) -> None:
        super().__init__(
            "The answer could not be finished: the schema or grammar is too complex to be enforced "
            "where it had got to. Make it simpler.",
            code="grammar_too_complex",
        )


class Unauthorized(InvalidRequest):
    """The request has no API key, or one that nobody was given."""

    status = 401
    kind = "authentication_error"

    def __init__(self) -> None:
        super().__init__(
            "This server needs an API key: send `Authorization: Bearer YOUR_KEY` (or `X-Api-Key`) "
            "with a key that its operator gave you.",
            code="invalid_api_key",
        )


class Forbidden(InvalidRequest):
    """The key is known, and its user may not have what was asked for."""

    status = 403
    kind = "permission_error"


class UnknownModel(InvalidRequest):
    """No such model is served here."""

    status = 404

    def __init__(self, name: str, served: tuple[str, ...]) -> None:
        super().__init__(
            f"The model {name[:100]!r} does not exist here. Served: {', '.join(served)}.",
            param="model",
            code="model_not_found",
        )


class NoSuchRoute(InvalidRequest):
    """Nothing is served under this path, or not with this method."""

    def __init__(self, status: int, method: str, path: str) -> None:
        known = status == 405
        super().__init__(
            f"{method[:20]} {path[:200]}: "
            + ("not with this method." if known else "no such route; /docs lists them."),
            code="method_not_allowed" if known else "not_found",
        )
        self.status = status  # type: ignore[misc]  # one class for both


class BodyTooLarge(InvalidRequest):
    """The request body exceeds the server's limit."""

    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The request body is larger than this server's limit of {limit} bytes.",
            code="body_too_large",
        )


class RateLimited(ApiError):
    """This user's share is used up for now."""

    status = 429
    kind = "rate_limit_error"


class Unavailable(ApiError):
    """Not now: the server is starting, draining or full."""

    status = 503
    kind = "overloaded_error"
    retry_after = 1.0


class DeadlineExceeded(ApiError):
    """The time that the request had, counted from its arrival, is over."""

    status = 504
    kind = "timeout_error"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The answer was not complete within {seconds:g} seconds, the time this request had.",
            code="deadline_exceeded",
        )


class EngineDead(ApiError):
    """The engine process died; what it was generating is lost."""

    status = 503
    retry_after = 30.0

    def __init__(self) -> None:
        super().__init__(
            "The inference engine has stopped; the answer is lost. The server is being replaced: "
            "try again in a moment.",
            code="engine_dead",
        )


class EngineFault(ApiError):
    """The engine failed at this one request; others go on."""

    def __init__(self) -> None:
        super().__init__(
            "The inference engine failed at this request. Trying again may help.",
            code="engine_fault",
        )
