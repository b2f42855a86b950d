"""From the bytes of a body to a valid request, or to an error that names the field."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

from pydantic import ValidationError

from synthia_vllm.errors import InvalidRequest
from synthia_vllm.generate.protocol import NO_TOOLS, TEXT_ONLY, RequestBody, StrictModel

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_IGNORED: Final = 16
"""Paths that are told; of more, that there are more."""
UNSUPPORTED_VALUE: Final = "unsupported_value"
"""The type of a `PydanticCustomError` whose text is why a value cannot be had."""

Parsed = TypeVar("Parsed", bound=RequestBody)


def parse(model: type[Parsed], body: bytes, *, refuse_unknown: bool) -> Parsed:
    """The request in `body`, which must be of this `model`.

    Raises `InvalidRequest`, naming the field; also for one that is not known, if that is wished.
    """
    try:
        request = model.model_validate_json(body.removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    except RecursionError:
        raise InvalidRequest("The JSON is nested too deeply.") from None
    else:
        _check_unknown(request, refuse_unknown=refuse_unknown)
        return request
    # A union reports each of its members; what the user meant is the one that got furthest.
    same_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    raise _refusal(max(same_field, key=lambda p: (len(p["loc"]), not p["type"].endswith("_type"))))


def _check_unknown(request: RequestBody, *, refuse_unknown: bool) -> None:
    """Note what is ignored. Raises `InvalidRequest` for a field that must not be."""
    ignored: dict[str, None] = {}
    for path_to, part in _parts(request):
        if not part.__pydantic_extra__:
            continue
        for name, value in part.__pydantic_extra__.items():
            why, neutral = request.unsupported.get(name, ("no such field is known here", None))
            if value is None or (
                neutral is not None
                and any(value == ok and type(value) is type(ok) for ok in neutral)
            ):
                continue
            if neutral is None and not refuse_unknown:
                if len(ignored) < _MOST_IGNORED:
                    ignored[_shown_path(path_to, name)] = None
                else:
                    ignored["..."] = None
                continue
            path = f"{path_to}{name}"
            path = path if len(path) <= 100 else f"{path[:97]}..."
            raise InvalidRequest(
                f"`{path}` is not supported: {why}.", param=path, code="unsupported_parameter"
            )
    if ignored:
        request._ignored = tuple(ignored)


def _shown_path(path_to: str, name: str) -> str:
    """A path fit for a header: without numbers, in visible ASCII, and not long."""
    path = re.sub(r"\[\d+\]", "[]", path_to) + name
    path = "".join(char if "!" <= char <= "~" and char != "," else "?" for char in path[:64])
    return path if len(name) <= 64 else f"{path}..."


def _parts(part: StrictModel, path_to: str = "") -> Iterator[tuple[str, StrictModel]]:
    """All objects of a request that have named fields, each with the path in front of them."""
    yield path_to, part
    for name in _holders(type(part)):
        value = getattr(part, name)
        if isinstance(value, StrictModel):
            yield from _parts(value, f"{path_to}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, StrictModel):
                    yield from _parts(item, f"{path_to}{name}[{index}].")


@cache
def _holders(model: type[StrictModel]) -> tuple[str, ...]:
    """The fields of `model` that can hold objects with named fields: most hold none."""
    fields = model.model_fields.items()
    return tuple(name for name, field in fields if _holds_objects(field.annotation))


def _holds_objects(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return True
    return any(map(_holds_objects, get_args(annotation)))


def _refusal(problem: Any) -> InvalidRequest:
    """A pydantic error as an answer that names the field, the limit and the value."""
    path = _path(problem["loc"])
    kind, value = problem["type"], problem["input"]
    last = str(problem["loc"][-1]) if problem["loc"] else ""
    if kind == "json_invalid":
        return InvalidRequest(
            f"The body is not valid JSON: {problem['ctx']['error']}.", code="invalid_json"
        )
    if kind == UNSUPPORTED_VALUE:
        return InvalidRequest(
            f"`{path}` is {_short(value)}: {problem['msg']}.", param=path, code="unsupported_value"
        )
    if last == "role" and value in ("tool", "function"):
        return InvalidRequest(
            f"`{path}` is {value!r}: {NO_TOOLS}.", param=path, code="unsupported_value"
        )
    if last == "type" and "content" in problem["loc"]:
        return InvalidRequest(
            f"`{path}` is {value!r:.60}: {TEXT_ONLY}, so every part must be of type 'text'.",
            param=path,
            code="unsupported_value",
        )
    if kind == "missing":
        return InvalidRequest(
            f"`{path}` is required.", param=path, code="missing_required_parameter"
        )
    shown = "" if isinstance(value, dict | list) else f", but it is {_short(value)}"
    return InvalidRequest(
        f"`{path or 'the body'}`: {problem['msg']}{shown}.",
        param=path or None,
        code="invalid_value",
    )


_UNIONS: Final = ("content", "stop", "prompt", "input", "system", "tool_choice")


def _path(loc: tuple[int | str, ...]) -> str:
    """``messages[2].content`` of a pydantic location, without the names of union members."""
    path = ""
    for before, part in zip(("", *loc), loc, strict=False):
        if isinstance(part, int):
            path += f"[{part}]"
        elif before not in _UNIONS and part != "[key]":
            path += f".{part}" if path else part
    return path if len(path) <= 100 else f"{path[:97]}..."


def _short(value: Any) -> str:
    """A value for a message: at most 60 characters of it."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
