"""Forced tools, and calls and their results in the conversation so far.

The model was not trained to call tools, but JSON of any schema can be had of it. So a function that
has to be called is a grammar for the answer, and a paragraph at the end of the system message.

Source: OpenAI's API reference for chat completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from synthia_vllm.api.chat.protocol import FunctionCall, NamedTool, ToolCall
from synthia_vllm.errors import InvalidRequest
from synthia_vllm.generate.protocol import NO_TOOLS
from synthia_vllm.generate.sampling import json_grammar
from synthia_vllm.template.prompt import Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from synthia_vllm.api.chat.protocol import ChatMessage, ChatRequest, Function
    from synthia_vllm.engine.base import Grammar
    from synthia_vllm.settings import Settings

_NO_ARGUMENTS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class ForcedTool:
    """The function whose arguments the answer is."""

    function: Function
    param: str
    """The field of the request that has it."""
    finish_reason: Literal["stop", "tool_calls"]
    """Of an answer that is whole: OpenAI's depends on whether the request names the function."""

    @property
    def grammar(self) -> Grammar:
        """What rules the answer. Raises `InvalidRequest`."""
        schema = self.function.parameters or _NO_ARGUMENTS
        return json_grammar(schema, f"{self.param}.parameters")

    @property
    def message(self) -> Message:
        """What the model is told of it, after all other system messages."""
        text = f"Answer with the arguments of the function {self.function.name} as JSON."
        return Message("system", f"{text} {self.function.description or ''}", merged=0)

    def call(self, request_id: str, choice: int, arguments: str) -> ToolCall:
        """Choice number `choice` as a call, by an id that no other answer has."""
        return ToolCall(
            id=f"call_{request_id}_{choice}",
            type="function",
            function=FunctionCall(name=self.function.name, arguments=arguments),
        )


def forced_tool(request: ChatRequest) -> ForcedTool | None:
    """The tool that `request` forces, if it does. Raises `InvalidRequest`."""
    choice, tools = request.tool_choice, request.tools or []
    if isinstance(choice, NamedTool):
        for number, tool in enumerate(tools):
            if tool.function is not None and tool.function.name == choice.function.name:
                return ForcedTool(tool.function, f"tools[{number}].function", "stop")
        raise InvalidRequest(
            f"`tool_choice.function.name` is {choice.function.name!r}, which is none of the "
            "functions in `tools`.",
            param="tool_choice.function.name",
            code="invalid_value",
        )
    if choice != "required":
        return None
    if len(tools) != 1:
        raise InvalidRequest(
            f"`tool_choice` is 'required' with {len(tools)} tools: {NO_TOOLS}, so name the one to "
            'call: {"type": "function", "function": {"name": ...}}.',
            param="tool_choice",
            code="unsupported_value",
        )
    if tools[0].function is None:
        raise InvalidRequest(
            "`tools[0].function` is required: no other kind of tool can be called.",
            param="tools[0].function",
            code="missing_required_parameter",
        )
    return ForcedTool(tools[0].function, "tools[0].function", "tool_calls")


def refuse_choice(request: ChatRequest, settings: Settings) -> None:
    """Raise `InvalidRequest` for tools that the model is to choose from, if they are refused."""
    if request.tools and request.tool_choice in (None, "auto") and settings.tools == "refuse":
        raise InvalidRequest(
            f"`tools` is not supported: {NO_TOOLS}. One can be forced by `tool_choice`, and with "
            "the server's setting `tools: ignore` those to choose from are left out.",
            param="tools",
            code="unsupported_parameter",
        )


def turns(messages: Sequence[ChatMessage]) -> list[Message]:
    """A `Message` for each of `messages`.

    A call is the arguments as they were written, which is what the model said; a result is said by
    the user. Raises `InvalidRequest`.
    """
    names: dict[str, str] = {}
    found: list[Message] = []
    for number, message in enumerate(messages):
        place, role, text = f"messages[{number}]", message.role, message.text
        if message.content is None and role != "assistant":
            raise InvalidRequest(
                f"`{place}.content` is required: a text, or a list of text parts.",
                param=f"{place}.content",
                code="missing_required_parameter",
            )
        if message.tool_calls:
            _require_role(place, "tool_calls", role, "assistant")
            names |= {call.id: call.function.name for call in message.tool_calls}
            calls = [call.function.arguments for call in message.tool_calls]
            text = "\n".join([text, *calls] if text else calls)
        if message.tool_call_id is not None:
            _require_role(place, "tool_call_id", role, "tool")
        if role == "tool":
            name = names.get(message.tool_call_id or "")
            if name is None:
                raise InvalidRequest(
                    f"`{place}.tool_call_id` is {message.tool_call_id!r:.60}, which is the id of "
                    "no call in the messages before.",
                    param=f"{place}.tool_call_id",
                    code="invalid_value",
                )
            role, text = "user", f"The function {name} returned:\n{text}"
        found.append(Message("system" if role == "developer" else role, text))
    return found


def _require_role(place: str, field: str, role: str, only: str) -> None:
    if role != only:
        raise InvalidRequest(
            f"`{place}.{field}` is for messages of the role {only!r}, not {role!r}.",
            param=f"{place}.{field}",
            code="invalid_value",
        )
