"""vLLM's errors in the words of our tree."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from synthia_vllm.errors import (
    ApiError,
    EngineDead,
    EngineFault,
    InvalidRequest,
    StartupError,
    SynthiaError,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)


def translate_error(error: Exception) -> ApiError:
    """The error of our tree that `error` of vLLM means."""
    # vLLM internal: `vllm.exceptions.GracefulHTTPError`, `vllm.exceptions.VLLMClientError`,
    # `vllm.v1.engine.exceptions.EngineDeadError`.
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return EngineDead()
    if isinstance(error, GracefulHTTPError):
        return Unavailable("The server is full. Try again in a moment.", code="server_full")
    if isinstance(error, VLLMClientError):
        return InvalidRequest(str(error)[:500], code="invalid_value")
    logger.error("a request failed in the engine", exc_info=error)
    return EngineFault()


@contextmanager
def translate_startup_errors() -> Iterator[None]:
    """Make a `StartupError` of whatever vLLM raises when it cannot start."""
    try:
        yield
    except SynthiaError:
        raise
    except Exception as error:
        logger.debug("vLLM did not start", exc_info=error)
        raise StartupError(
            f"vLLM did not start: {_root(error)}\n"
            "Its own account is above; VLLM_LOGGING_LEVEL=INFO makes it say more."
        ) from error


def _root(error: BaseException) -> str:
    """The innermost cause of `error`, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:500]}"
