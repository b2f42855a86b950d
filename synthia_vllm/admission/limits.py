"""What one user may have: each limit of the key file, and what it means.

A new limit is a field of `UserLimits`, with its check below it; one over time is a field and a line
in `rates`. The key file, `synthia-vllm keys` and the headers follow. Each check is called from one
place: `require_model` and `max_answer_tokens` with what a request asks for, `require_answers` and
the limits over time by `AdmissionPermit.claim`, when its prompt has been counted, and
`require_concurrent` wherever places are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from synthia_vllm.errors import Forbidden, InvalidRequest, RateLimited

if TYPE_CHECKING:
    from collections.abc import Callable


Counted = Literal["requests", "tokens"]
"""Tokens are those of prompts and answers; a request claims all that it may take."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So much in so long a time."""

    name: str
    """The field of `UserLimits`, and the error's code."""
    counted: Counted
    limit: int
    seconds: float
    header: str = ""
    """The end of the ``x-ratelimit-`` headers that tell of it; none for the empty text."""

    def refusal(self, need: int) -> str:
        """What a user is told who must wait for `need`."""
        each = self.name.rpartition("_per_")[2]
        if self.counted == "requests":
            return f"You may send {self.limit} requests a {each}."
        return (
            f"You may use {self.limit} tokens a {each}; this request needs {need} (its prompt and "
            "`max_tokens`)."
        )


class UserLimits(BaseModel):
    """One user's share and limits. `None` means: no limit of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # What has a description is a flag of `synthia-vllm keys new`.
    weight: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="share of the engine when it is contended; 1 is the usual one",
    )
    requests_per_minute: int | None = Field(None, ge=1, description="requests a minute")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="tokens a minute, prompt and answer together"
    )
    concurrent_requests: int | None = Field(
        None, ge=1, description="answers in the making at a time"
    )
    max_tokens: int | None = Field(None, ge=1, description="the longest answer, in tokens")
    models: frozenset[str] | None = None
    """The served names that may be asked for."""

    @cached_property
    def rates(self) -> tuple[Rate, ...]:
        """The limits over time."""
        rates = (
            ("requests_per_minute", "requests", self.requests_per_minute, 60.0, "requests"),
            ("tokens_per_minute", "tokens", self.tokens_per_minute, 60.0, "tokens"),
        )
        return tuple(
            Rate(name, counted, limit, seconds, header)  # type: ignore[arg-type]  # of the table
            for name, counted, limit, seconds, header in rates
            if limit is not None
        )

    def may_use(self, model: str) -> bool:
        """Whether the served name `model` is for this user."""
        return self.models is None or model in self.models

    def require_model(self, model: str) -> None:
        """Raise `Forbidden` if the served name `model` is not for this user."""
        if not self.may_use(model):
            raise Forbidden(
                f"You may not use {model}. Yours: {', '.join(sorted(self.models or ()))}.",
                param="model",
                code="model_not_allowed",
            )

    def max_answer_tokens(self, asked: int | None, default: int) -> int:
        """The tokens an answer may have, of which the request asks for `asked`.

        Raises `InvalidRequest` if the user may not have as many.
        """
        ceiling = self.max_tokens
        if ceiling is None:
            return default if asked is None else asked
        if asked is not None and asked > ceiling:
            raise InvalidRequest(
                f"`max_tokens` is {asked}; you may have at most {ceiling} tokens in an answer.",
                param="max_tokens",
                code="invalid_value",
            )
        return min(default, ceiling) if asked is None else asked

    def require_answers(self, answers: int, max_requests: int) -> None:
        """Raise `InvalidRequest` for more answers than there will ever be places for.

        Half of the server's places at most: to be told to come back later would never end.
        """
        most = max(1, max_requests // 2)
        if self.concurrent_requests is not None:
            most = min(most, self.concurrent_requests)
        if answers > most:
            raise InvalidRequest(
                f"This request is for {answers} answers at once; you may have at most {most}. "
                "Send fewer prompts, or a smaller `n`.",
                param="n",
                code="invalid_value",
            )

    def require_concurrent(self, answers: int, retry_after: Callable[[], float]) -> None:
        """Raise `RateLimited` if the user may not have `answers` in the making."""
        if self.concurrent_requests is not None and answers > self.concurrent_requests:
            raise self.too_many(retry_after())

    def too_many(self, retry_after: float) -> RateLimited:
        """What a user is told who has as many answers in the making as it may."""
        return RateLimited(
            f"You may have {self.concurrent_requests} answers in the making at a time.",
            code="concurrent_requests",
            retry_after=retry_after,
        )
