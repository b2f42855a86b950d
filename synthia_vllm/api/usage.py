"""What a user has used, told to that user: ``/v1/usage``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field
from starlette.requests import Request  # noqa: TC002  # FastAPI reads the routes' annotations

from synthia_vllm.errors import InvalidRequest, Unavailable
from synthia_vllm.generate.protocol import absent
from synthia_vllm.ledger.database import Away
from synthia_vllm.ledger.rows import GROUPS, parse_groups, parse_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState

_Parsed = TypeVar("_Parsed")

_MAX_ROWS: Final = 10_000
_OWN_GROUPS: Final = tuple(name for name in GROUPS if name != "user")


class NoLedger(InvalidRequest):
    """This server keeps none."""

    status = 404

    def __init__(self) -> None:
        super().__init__(
            "This server does not keep who used what: its setting `ledger` is `none`, or names "
            "what it cannot write to.",
            code="ledger_off",
        )


class UsageRow(BaseModel):
    """Sums of one model, route, day or hour, as `by` asks for."""

    object: Literal["usage"] = "usage"
    model: str | None = Field(None, exclude_if=absent)
    route: str | None = Field(None, exclude_if=absent)
    day: str | None = Field(None, exclude_if=absent)
    hour: str | None = Field(None, exclude_if=absent)
    requests: int
    refused: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    seconds: float


class UsageList(BaseModel):
    """The body of ``GET /v1/usage``; times are UTC."""

    object: Literal["list"] = "list"
    data: list[UsageRow]
    as_of: int
    """What this process answered before that (seconds since 1970) is in it."""


def attach(app: Application, state: ServerState) -> None:
    """Add the route."""

    # Not `async`: it asks a database.
    @app.get("/v1/usage")
    def usage(
        request: Request,
        since: Annotated[str | None, Query(description="From this hour on: 2026-01-31")] = None,
        until: Annotated[str | None, Query(description="Before this hour")] = None,
        by: Annotated[str, Query(description="model, route, day, hour, with commas")] = "model",
    ) -> UsageList:
        """What you have used, by your key."""
        ledger = state.ledger
        if ledger is None:
            raise NoLedger
        for name in request.query_params:
            if name not in ("since", "until", "by"):
                raise InvalidRequest(
                    f"`{name[:60]}` is not known here: since, until, by.",
                    param=name[:60],
                    code="unsupported_parameter",
                )
        groups = _checked("by", by, lambda text: parse_groups(text, _OWN_GROUPS))
        begin = None if since is None else _checked("since", since, parse_time)
        end = None if until is None else _checked("until", until, lambda t: parse_time(t, end=True))
        as_of = ledger.written_until
        try:
            rows = ledger.totals(
                groups, since=begin, until=end, user=request.state.user, most=_MAX_ROWS + 1
            )
        except Away:
            raise Unavailable(
                "The ledger cannot be read now. What you use is counted all the same.",
                code="ledger_away",
            ) from None
        if len(rows) > _MAX_ROWS:
            raise InvalidRequest(
                f"That would be more than {_MAX_ROWS} rows: ask for less time, with `since` and "
                "`until`, or by less.",
                param="since",
                code="invalid_value",
            )
        return UsageList(data=[UsageRow(**row) for row in rows], as_of=as_of)


def _checked(name: str, text: str, parse: Callable[[str], _Parsed]) -> _Parsed:
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidRequest(f"`{name}`: {error}.", param=name, code="invalid_value") from None
