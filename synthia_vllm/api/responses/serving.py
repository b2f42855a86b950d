"""What a request for a response asks for, and what of it cannot be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthia_vllm.api.responses.protocol import LOGPROBS, ResponsesRequest
from synthia_vllm.errors import InvalidRequest
from synthia_vllm.generate import conversation
from synthia_vllm.generate.sampling import json_grammar
from synthia_vllm.template.prompt import Message

if TYPE_CHECKING:
    from synthia_vllm.engine.base import Grammar
    from synthia_vllm.generate.call import Call
    from synthia_vllm.generate.response import Prepared


async def prepare(call: Call) -> Prepared:
    """All that is decided before the engine sees the request, and the rules for its answers.

    Raises `InvalidRequest`, and whatever `AdmissionPermit.claim` raises.
    """
    request = call.parse(ResponsesRequest)
    if request.top_logprobs and request.wanted_logprobs is None:
        raise InvalidRequest(
            f'`top_logprobs` needs `include: ["{LOGPROBS}"]`.',
            param="top_logprobs",
            code="invalid_value",
        )
    messages = [
        Message("system" if item.role == "developer" else item.role, item.content_text)
        for item in request.items
    ]
    if request.instructions is not None:
        messages.insert(0, Message("system", request.instructions))
    try:
        composed = await conversation.compose(
            request,
            messages,
            call.engine,
            call.settings,
            call.permit.user,
            cache_salt=call.permit.cache_salt(request.cache_salt),
            max_tokens=request.max_output_tokens,
            grammar=_grammar_of(request),
            logprobs=request.wanted_logprobs,
            may_drop=request.truncation == "auto",
        )
        return await conversation.prepare(call, request, composed)
    except InvalidRequest as error:
        raise error.under(_names(request)) from None


def _grammar_of(request: ResponsesRequest) -> Grammar | None:
    """The grammar that shall rule the answer, if any. Raises `InvalidRequest`."""
    wanted = request.text.format if request.text else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return json_grammar(None, "text.format")
    for name, value in (("name", wanted.name), ("schema", wanted.schema_)):
        if value is None:
            raise InvalidRequest(
                f"`text.format.{name}` is required with type 'json_schema'.",
                param=f"text.format.{name}",
                code="missing_required_parameter",
            )
    return json_grammar(wanted.schema_, "text.format.schema")


def _names(request: ResponsesRequest) -> dict[str, str]:
    """By their names in a chat: how fields are called here."""
    if isinstance(request.input, str):
        places = ["input"]
    else:
        places = [f"input[{number}].content" for number in range(len(request.input))]
    if request.instructions is not None:
        places.insert(0, "instructions")
    return {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        **{f"messages[{number}].content": place for number, place in enumerate(places)},
    }
