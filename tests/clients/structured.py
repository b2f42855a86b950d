"""instructor, pydantic-ai, LlamaIndex and DSPy against the server at argv[1]; argv[2] is which."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, field_validator

if TYPE_CHECKING:
    from collections.abc import Callable

URL = sys.argv[1]
MODEL = "synthia-demo"
QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"


class Animal(BaseModel):
    """What an answer is made to fit, and nothing else: a model may go on for long where it may."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]
    tame: bool


def use_instructor() -> None:
    """By a forced tool, as it does by default, and by JSON schema: objects, also while they
    stream, and another try after one that its validator does not like.
    """
    import instructor
    from openai import OpenAI

    class Doubted(Animal):
        """What is right the second time."""

        @field_validator("kind")
        @classmethod
        def doubt(cls, kind: str) -> str:
            """The first is wrong, whatever it is."""
            tries.append(kind)
            if len(tries) == 1:
                raise ValueError("say that again")
            return kind

    plain = OpenAI(base_url=URL, api_key="none", max_retries=0)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "A cat?"}]}
    for client in (
        instructor.from_openai(plain),
        instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA),
    ):
        tries: list[str] = []
        assert isinstance(client.chat.completions.create(response_model=Animal, **asked), Animal)
        parts = list(client.chat.completions.create_partial(response_model=Animal, **asked))
        assert Animal.model_validate(parts[-1].model_dump())
        assert client.chat.completions.create(response_model=Doubted, max_retries=1, **asked)
        assert len(tries) == 2


def use_pydantic_ai() -> None:
    """Both models: an answer, the next turn with what came back, a stream, an object natively;
    chat's by a forced tool, as it asks for it by default, also streamed and with a next turn.
    """
    import asyncio

    from pydantic_ai import Agent, ModelSettings, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def streamed(agent: Agent) -> str:
        async with agent.run_stream(QUESTION) as stream:
            parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
            assert stream.usage.output_tokens > 0
        assert len(parts) > 10
        return "".join(parts)

    said = []
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))
        agent = Agent(model, instructions="Be brief.", model_settings=ModelSettings(temperature=0))
        first = agent.run_sync(QUESTION)
        assert first.usage.output_tokens > 0
        said += [first.output, asyncio.run(streamed(agent))]
        assert agent.run_sync("And a shark?", message_history=first.all_messages()).output
        native = Agent(model, output_type=NativeOutput(Animal))
        assert isinstance(native.run_sync("A cat?").output, Animal)
    assert said[0]
    assert said == said[:1] * 4
    chat = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))
    forced = Agent(chat, output_type=Animal)
    found = forced.run_sync("A cat?")
    assert isinstance(found.output, Animal)
    further = forced.run_sync("A dog?", message_history=found.all_messages())
    assert isinstance(further.output, Animal)
    live = forced.run_stream_sync("A cat?")
    assert isinstance(list(live.stream_output(debounce_by=None))[-1], Animal)


def use_llama_index() -> None:
    """Chat and completion, plain and streamed."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=True, temperature=0)
    asked = [ChatMessage(role="system", content="Be brief."), ChatMessage(content=QUESTION)]
    whole = chat.chat(asked).message.content
    assert whole
    *_, last = chat.stream_chat(asked)
    assert last.message.content == whole
    raw = OpenAILike(model=MODEL, api_base=URL, api_key="none", max_tokens=8)
    assert raw.complete(f"USER: {QUESTION}\nASSISTANT:").text.strip()


def use_dspy() -> None:
    """Its language model: a question, a conversation, structured output.

    What it asks for in words, as its adapters do, is more than the demo model understands.
    """
    import dspy

    asked = {"api_base": URL, "api_key": "none", "cache": False, "max_tokens": 200}
    model = dspy.LM(f"openai/{MODEL}", **asked)
    [answer] = model(QUESTION)
    assert answer
    turns = [("user", QUESTION), ("assistant", answer), ("user", "And a shark?")]
    assert model(messages=[{"role": role, "content": text} for role, text in turns])[0]
    assert Animal.model_validate_json(model("A cat?", response_format=Animal)[0])


CLIENTS: dict[str, Callable[[], None]] = {
    "instructor": use_instructor,
    "pydantic-ai": use_pydantic_ai,
    "llama-index": use_llama_index,
    "dspy": use_dspy,
}
CLIENTS[sys.argv[2]]()
