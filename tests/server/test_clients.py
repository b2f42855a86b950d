"""Clients that people use, against the live server: each does what its users do."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel
from serving import Running, running

from synthia_vllm.admission.users import new_key
from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.errors import EngineDead, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "clients"
CLIENTS = ROOT / ".venv-clients" / "bin"
QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
ASK: dict[str, Any] = {
    "model": "synthia-demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0
}  # fmt: skip
ASKED_FOR_LOGPROBS: dict[str, Any] = {
    "include": ["message.output_text.logprobs"], "top_logprobs": 2
}  # fmt: skip
OF_OTHERS = (
    "langchain-openai", "litellm", "llm", "guidellm", "instructor", "llama-index-llms-openai-like",
    "dspy", "vllm-router", "smg",
)  # fmt: skip
# Nobody but the server is to be asked for anything.
ALONE = {
    **os.environ, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_API_KEY": "none", "LANGSMITH_TRACING": "false",
}  # fmt: skip


class Animal(BaseModel):
    """What an answer is made to fit."""

    kind: Literal["cat", "dog"]
    tame: bool


def run(command: Sequence[object], **environment: str) -> str:
    """What a client says; it must end well."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, check=False, env={**ALONE, **environment}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def answer(live: Running) -> str:
    """The greedy answer to the card's question."""
    content = live.client.chat.completions.create(**ASK).choices[0].message.content
    assert content
    return str(content)


def test_openai(live: Running, answer: str) -> None:
    """Plain, streamed, and with the helpers that put a stream together."""
    client = live.client
    streamed = client.chat.completions.create(**ASK, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer
    with client.chat.completions.stream(**ASK) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion()
    assert "".join(deltas) == whole.choices[0].message.content == answer
    raw = client.completions.create(
        model="synthia-demo", prompt=f"USER: {QUESTION}\nASSISTANT:", temperature=0, max_tokens=400,
        stop="USER:",
    )  # fmt: skip
    assert raw.choices[0].text.strip() == answer
    assert "synthia-demo-tot" in [model.id for model in client.models.list()]


def test_openai_async(live: Running, answer: str) -> None:
    """Many at once from one event loop."""

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:

            async def one(*, stream: bool) -> str:
                if not stream:
                    found = await client.chat.completions.create(**ASK)
                    return found.choices[0].message.content or ""
                text = ""
                async for chunk in await client.chat.completions.create(**ASK, stream=True):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one(stream=n % 2 == 0) for n in range(8)))

    assert asyncio.run(main()) == [answer] * 8


def test_openai_structured(live: Running) -> None:
    """`.parse` gives an object of the class that was asked for, streamed too."""
    ask = ASK | {"response_format": Animal, "messages": [{"role": "user", "content": "A cat?"}]}
    parsed = live.client.chat.completions.parse(**ask).choices[0].message.parsed
    assert isinstance(parsed, Animal)
    with live.client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed


def test_openai_forced_tool(live: Running) -> None:
    """The arguments of a forced tool are an object of its class; streamed, the same."""
    ask = ASK | {"tools": [openai.pydantic_function_tool(Animal)], "tool_choice": "required"}
    plain = live.client.chat.completions.parse(**ask).choices[0].message.tool_calls
    assert plain
    assert isinstance(plain[0].function.parsed_arguments, Animal)
    with live.client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed
    assert streamed[0].function == plain[0].function


def test_openai_responses(live: Running, answer: str) -> None:
    """The newer API: chat's greedy answer plain and streamed, the next turn, JSON, logprobs."""
    client = live.client
    ask: dict[str, Any] = {"model": "synthia-demo", "input": QUESTION, "temperature": 0}
    plain = client.responses.create(**ASKED_FOR_LOGPROBS, **ask)
    assert plain.output_text == answer
    assert plain.usage is not None
    with client.responses.stream(**ask) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        whole = stream.get_final_response()
    assert "".join(deltas) == whole.output_text == answer
    assert len(deltas) > 10
    assert whole.usage is not None
    assert whole.usage.output_tokens == plain.usage.output_tokens
    content: Any = plain.output[0]
    places = content.content[0].logprobs
    assert bytes(byte for place in places for byte in place.bytes).decode().strip() == answer
    assert all(len(place.top_logprobs) == 2 for place in places)
    turns: list[Any] = [{"role": "user", "content": QUESTION}]
    then: Any = {"role": "user", "content": "And a shark?"}
    further = client.responses.create(**ask | {"input": [*turns, *plain.output, then]})
    by_chat = client.chat.completions.create(
        **ASK | {"messages": [*turns, {"role": "assistant", "content": answer}, then]}
    )
    assert further.output_text == by_chat.choices[0].message.content
    assert further.usage is not None
    assert further.usage.input_tokens == by_chat.usage.prompt_tokens  # type: ignore[union-attr]
    ask["input"] = "A cat?"
    parsed = client.responses.parse(**ask, text_format=Animal).output_parsed
    assert isinstance(parsed, Animal)
    with client.responses.stream(**ask, text_format=Animal) as stream:
        assert stream.get_final_response().output_parsed == parsed
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    form: Any = {"type": "json_schema", "name": "a", "schema": schema}
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(**ask, text={"format": form})
    assert str(bad.value.param).startswith("text.format.schema")


def test_openai_errors(live: Running) -> None:
    """Each error is the client's own class for it, and says which field."""
    client = live.client
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**ASK | {"temperature": 3})
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**ASK | {"model": "gpt-4"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.01).chat.completions.create(**ASK)
    with pytest.raises(openai.APIStatusError) as late:
        client.chat.completions.create(**ASK, extra_headers={"X-Request-Timeout": "0.02"})
    assert late.value.status_code == 504


def _drain(ask: Callable[[], object]) -> None:
    """Ask more often than a limit of 60 a minute has room for."""
    for _ in range(120):
        ask()


class Busy(FakeEngine):
    """An engine that is full twice, and then is not."""

    def check(self) -> None:
        super().check()
        if len(self.seen) < 2:
            self.seen.append(None)  # type: ignore[arg-type]
            raise Unavailable("The server is full.", code="server_full", retry_after=0.01)


def test_openai_retries(tmp_path: Path) -> None:
    """The client tries again after 429 and 503, at the time that it is told; by itself."""
    ask = {**ASK, "messages": [{"role": "user", "content": "Hi"}]}
    key, hashed = new_key()
    file = tmp_path / "keys.yaml"
    file.write_text(f"users:\n  ann:\n    keys: ['{hashed}']\n    requests_per_minute: 60\n")
    with running(FakeEngine(), keys_file=file) as server:
        where: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": key}
        with (
            openai.OpenAI(**where, max_retries=0) as hasty,
            pytest.raises(openai.RateLimitError) as limited,
        ):
            _drain(lambda: hasty.chat.completions.create(**ask))
        assert limited.value.code == "requests_per_minute"
        with openai.OpenAI(**where, max_retries=3) as patient:
            assert patient.chat.completions.create(**ask).choices[0].message.content == "Hello."
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.chat.completions.create(**ask)
    with running(FakeEngine()) as server:
        engine = server.engine
        busy = Busy()
        server.app.server_state.engine = busy
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client:
            assert client.chat.completions.create(**ask).choices[0].message.content == "Hello."
        busy.dead = True
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.InternalServerError) as dead,
        ):
            client.chat.completions.create(**ask)
        assert dead.value.code == EngineDead().code
        server.app.server_state.engine = engine


def test_anthropic(live: Running, answer: str) -> None:
    """Plain, streamed, put together, counted: chat's greedy answer to the same tokens."""
    ask: dict[str, Any] = {key: ASK[key] for key in ("model", "messages")}
    greedy: dict[str, Any] = {"max_tokens": 400, "extra_body": {"temperature": 0}}
    chat = live.client.chat.completions.create(**ASK)
    with anthropic.Anthropic(base_url=live.url, api_key="none") as client:
        plain = client.messages.create(**ask, **greedy)
        assert plain.content == [anthropic.types.TextBlock(type="text", text=answer)]
        assert (plain.stop_reason, plain.stop_sequence) == ("end_turn", None)
        with client.messages.stream(**ask, **greedy) as stream:
            assert "".join(stream.text_stream) == answer
            whole = stream.get_final_message()
        prompt, counts = client.messages.count_tokens(**ask).input_tokens, chat.usage
        assert counts is not None
        assert prompt == counts.prompt_tokens
        for usage in (plain.usage, whole.usage):
            assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == prompt
            assert usage.output_tokens == counts.completion_tokens
        long = ask | {"system": "Be brief. " * 100}
        _, again = (client.messages.create(**long, max_tokens=1).usage for _ in range(2))
        read = again.cache_read_input_tokens
        assert read  # it was asked before
        assert again.input_tokens + read == client.messages.count_tokens(**long).input_tokens
        word = answer.split()[3]
        cut = client.messages.create(**ask, **greedy, stop_sequences=[word])
        assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", word)
        assert cut.content[0].text == answer[: answer.index(word)].rstrip()
        few = client.messages.create(**ask, **greedy | {"max_tokens": 2})
        assert (few.stop_reason, few.usage.output_tokens) == ("max_tokens", 2)
        begun = [*ask["messages"], {"role": "assistant", "content": answer[:20]}]
        rest = client.messages.create(**ask | {"messages": begun}, **greedy)
        assert rest.content[0].text
        parsed = client.messages.parse(**ask, **greedy, output_format=Animal)
        assert isinstance(parsed.parsed_output, Animal)
        with pytest.raises(anthropic.BadRequestError, match=r"`stop_sequences\[0\]`"):
            client.messages.create(**ask, **greedy, stop_sequences=[""])


def test_anthropic_async(live: Running, answer: str) -> None:
    """Many at once from one event loop."""

    async def main() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=live.url, api_key="none") as client:
            ask: dict[str, Any] = {key: ASK[key] for key in ("model", "messages")}
            ask |= {"max_tokens": 400, "extra_body": {"temperature": 0}}

            async def one() -> str:
                async with client.messages.stream(**ask) as stream:
                    return "".join([piece async for piece in stream.text_stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    assert asyncio.run(main()) == [answer] * 8


def test_anthropic_retries(tmp_path: Path) -> None:
    """The client tries again after 429 and 503, at the time that it is told; by itself."""
    ask: dict[str, Any] = {"model": "synthia-demo", "max_tokens": 9}
    ask["messages"] = [{"role": "user", "content": "Hi"}]
    key, hashed = new_key()
    file = tmp_path / "keys.yaml"
    file.write_text(f"users:\n  ann:\n    keys: ['{hashed}']\n    requests_per_minute: 60\n")
    with (
        running(FakeEngine(), keys_file=file) as server,
        anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as hasty,
    ):
        with pytest.raises(anthropic.RateLimitError):
            _drain(lambda: hasty.messages.create(**ask))
        patient = hasty.with_options(max_retries=3)
        assert patient.messages.create(**ask).stop_reason == "end_turn"
    with running(FakeEngine()) as server:
        server.app.server_state.engine = busy = Busy()
        with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=2) as client:
            assert client.messages.create(**ask).stop_reason == "end_turn"
        assert len(busy.seen) == 3


def test_langchain(live: Running) -> None:
    """langchain-openai: invoke, stream, batch, structured output, completions."""
    assert run([CLIENTS / "python", SCRIPTS / "langchain.py", f"{live.url}/v1"]).strip()


def test_litellm(live: Running, answer: str) -> None:
    """litellm: plain, streamed, async, completions, an error."""
    said = run([CLIENTS / "python", SCRIPTS / "lite.py", f"{live.url}/v1"])
    assert said.splitlines()[-1] == answer


@pytest.mark.parametrize("client", ["instructor", "pydantic-ai", "llama-index", "dspy"])
def test_frameworks(live: Running, client: str) -> None:
    """Chat, streams, further turns and structured output, as each of them asks for it."""
    # Some want an older openai than the newest of pydantic-ai does.
    python = sys.executable if client == "pydantic-ai" else CLIENTS / "python"
    run([python, SCRIPTS / "structured.py", f"{live.url}/v1", client])


def test_vercel_ai_sdk(live: Running, answer: str) -> None:
    """`ai` with `@ai-sdk/openai-compatible`: text, stream, further turn, object, error."""
    assert run(["node", SCRIPTS / "node" / "sdk.js", f"{live.url}/v1"]).strip() == answer


def test_llm_in_the_terminal(live: Running, answer: str, tmp_path: Path) -> None:
    """`llm`: a question, and the next one in the same conversation."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: synthia\n  model_name: synthia-demo\n  api_base: {live.url}/v1\n"
    )
    ask = [CLIENTS / "llm", "-m", "synthia", "-o", "temperature", "0"]
    assert run([*ask, QUESTION], LLM_USER_PATH=str(tmp_path)).strip() == answer
    assert run([*ask, "--no-stream", "-c", "And a shark?"], LLM_USER_PATH=str(tmp_path)).strip()


def test_vllm_bench_serve(live: Running, demo: Path, tmp_path: Path) -> None:
    """vLLM's own benchmark: no request fails, and lengths are what it asks for.

    Its backend for chat is run as docs/clients.md shows it.
    """
    run([
        sys.executable, SCRIPTS / "vllm_bench.py",
        "--backend", "openai", "--endpoint", "/v1/completions", "--base-url", live.url,
        "--model", demo, "--served-model-name", "synthia-demo",
        "--dataset-name", "random", "--random-input-len", 32, "--random-output-len", 16,
        "--num-prompts", 12, "--ignore-eos", "--save-result", "--result-dir", tmp_path,
        "--result-filename", "result.json",
    ])  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["mean_ttft_ms"] > 0
    assert result["total_output_tokens"] == 12 * 16


def test_guidellm(live: Running, demo: Path, tmp_path: Path) -> None:
    """guidellm: no request fails, and it finds the counts that it reads."""
    run([
        CLIENTS / "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={live.url},model=synthia-demo",
        "--tokenizer", f"kind=hf_auto,model={demo}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12",
        "--output", f"kind=json,path={tmp_path / 'result.json'}",
    ])  # fmt: skip
    [benchmark] = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert requests["errored"] == []
    assert len(requests["successful"]) >= 12
    assert all(request["output_metrics"]["text_tokens"] for request in requests["successful"])


def test_table_of_clients() -> None:
    """docs/clients.md names each client with the version that these tests run."""
    page = (ROOT / "docs" / "clients.md").read_text()
    named = dict(re.findall(r"(?m)^\| `([a-z@/-]+)[^|]*` \| ([0-9.]+) \|", page))
    found = {name: version(name) for name in ("openai", "anthropic", "lm-eval", "pydantic-ai-slim")}
    packages = json.loads((SCRIPTS / "node" / "package-lock.json").read_text())["packages"]
    for name in ("ai", "@ai-sdk/openai-compatible"):
        found[name] = packages[f"node_modules/{name}"]["version"]
    for line in run([CLIENTS / "python", "-m", "pip", "list", "--format=freeze"]).splitlines():
        name, _, number = line.partition("==")
        if name in OF_OTHERS:
            found[name] = number
    assert set(named) == {*found, "vllm"}
    for name, number in found.items():
        assert named[name] == number, name
