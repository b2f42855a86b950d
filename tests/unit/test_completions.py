"""Raw completions, and the tools to look at prompts, over a scripted engine on a real socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from serving import Running, running, wait_until

from synthia_vllm.admission.users import new_key
from synthia_vllm.engine.fake import BOS, FIRST_BYTE, FakeEngine
from synthia_vllm.settings import Limits, Transcript
from synthia_vllm.template.prompt import TREE_OF_THOUGHT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PIECES = (" He", "llo", ".\nUS", "ER: next", " question")
SAID = "".join(PIECES)
USER: Any = {"role": "user", "content": "Hi"}
BODY: dict[str, Any] = {"model": "synthia-demo", "prompt": "Once", "max_tokens": 100}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(PIECES)) as here:
        yield here


def ids(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def ask(server: Running, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    asked = BODY | body if path == "/v1/completions" else body
    return httpx.post(f"{server.url}{path}", json=asked, timeout=30)


def choices(server: Running, **body: Any) -> list[dict[str, Any]]:
    """The choices of a plain answer; those of the stream, joined, are the same."""
    plain = ask(server, **body)
    assert plain.status_code == 200, plain.text
    found: list[dict[str, Any]] = plain.json()["choices"]
    joined: dict[int, dict[str, Any]] = {}
    streamed = ask(server, **body, stream=True, stream_options={"include_usage": True})
    *blocks, done, rest = streamed.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    *events, last = [json.loads(block.removeprefix("data: ")) for block in blocks]
    for event in events:
        assert event["object"] == "text_completion"
        assert event["usage"] is None
        [choice] = event["choices"]
        before = joined.setdefault(choice["index"], choice)
        if before is not choice:
            before["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                before["logprobs"][name] += values
            for name in ("finish_reason", "stop_reason"):
                before[name] = choice[name]
    assert [joined[index] for index in sorted(joined)] == found
    assert last["usage"] == plain.json()["usage"]
    return found


def test_prompt_is_raw(server: Running) -> None:
    """The engine gets the text's tokens behind the one <s>, no stop, and says all it says."""
    [choice] = choices(server, prompt="USER: a\nASSISTANT:")
    work = server.engine.seen[-1]  # type: ignore[attr-defined]
    assert work.prompt_token_ids == [BOS, *ids("USER: a\nASSISTANT:")]
    assert work.sampling.stop == ()
    assert choice["text"] == SAID
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_default_length_is_openais(server: Running) -> None:
    """Without `max_tokens` an answer has 16."""
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    found = httpx.post(f"{server.url}/v1/completions", json=body).json()
    assert found["usage"]["completion_tokens"] == 16
    assert found["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a", [[BOS, *ids("a")]]),
        (["a", "bc"], [[BOS, *ids("a")], [BOS, *ids("bc")]]),
        (ids("abc"), [ids("abc")]),
        ([ids("a"), ids("bcd"), [2]], [ids("a"), ids("bcd"), [2]]),
        ("", [[BOS]]),
    ],
)
def test_each_kind_of_prompt(server: Running, prompt: Any, tokens: list[list[int]]) -> None:
    """Each prompt is a work of its own; ids are left as they are; counts are sums."""
    seen: list[Any] = server.engine.seen  # type: ignore[attr-defined]
    seen.clear()
    answer = ask(server, prompt=prompt).json()
    assert [work.prompt_token_ids for work in seen] == tokens
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(tokens)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))
    assert answer["usage"]["completion_tokens"] == len(tokens) * len(SAID)


def test_choices_of_several_prompts(server: Running) -> None:
    """With `n` the choices of the first prompt come first, each echoing its own prompt."""
    found = choices(server, prompt=["one", "two"], n=2, echo=True, temperature=1)
    assert [choice["text"] for choice in found] == [
        f"{prompt}{SAID}" for prompt in ("one", "one", "two", "two")
    ]


def test_own_stop_is_cut_and_held_back(server: Running) -> None:
    """A stop string ends the text before it, streamed too, and no beginning of it gets out."""
    [choice] = choices(server, stop=["zzz", "USER:"])
    assert choice["text"] == " Hello.\n"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "USER:")


def test_echo_of_ids(server: Running) -> None:
    """Echoed ids are their text; special tokens have none."""
    [choice] = choices(server, prompt=[BOS, *ids("ab"), 2], echo=True)
    assert choice["text"] == "ab" + SAID


@pytest.mark.parametrize("prompt", ["ab", [BOS, *ids("ab")]])
def test_prompt_logprobs(server: Running, prompt: Any) -> None:
    """Echo with logprobs: an entry for each token of prompt and answer, null for the first."""
    [choice] = choices(server, prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    assert choice["text"] == "ab "
    assert choice["logprobs"] == {
        "tokens": ["<s>", "a", "b", " "],
        "token_logprobs": [None, 0.0, 0.0, 0.0],
        "top_logprobs": [None, {"a": 0.0}, {"b": 0.0}, {" ": 0.0}],
        "text_offset": [0, 0, 1, 2],
    }
    assert choice["finish_reason"] == "length"


def test_no_token_but_the_prompt(server: Running) -> None:
    """`max_tokens` 0 shows nothing new; the one token that ran is counted."""
    [choice] = choices(server, prompt="ab", echo=True, logprobs=0, max_tokens=0)
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"a": 0.0}, {"b": 0.0}]
    [choice] = choices(server, max_tokens=0)
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("", None, "length")
    assert ask(server, max_tokens=0).json()["usage"]["completion_tokens"] == 1


def test_logprobs_of_the_answer(server: Running) -> None:
    """Without echo the entries are the answer's, and offsets count from its beginning."""
    [choice] = choices(server, logprobs=2, max_tokens=3)
    assert choice["logprobs"]["tokens"] == [" ", "H", "e"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_parts_of_a_character() -> None:
    """A token that is no text by itself is spelled by its bytes, as OpenAI does."""
    with running(FakeEngine(("é",))) as server:
        [choice] = choices(server, logprobs=0)
    assert choice["text"] == "é"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"] == [0, 0]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"suffix": "x"}, "suffix", "cannot fill a gap"),
        ({"best_of": 2}, "best_of", "choose yourself"),
        ({"messages": []}, "messages", "/v1/chat/completions"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "`max_tokens`"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": None}, "prompt", "valid"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1"),
        ({"prompt": ["a", 1]}, "prompt[1]", "string"),
        ({"prompt": [1, "a"]}, "prompt[1]", "integer"),
        ({"prompt": [-1]}, "prompt[0]", "greater"),
        ({"prompt": [32000]}, "prompt", "32000 tokens, from 0"),
        ({"prompt": [[3, 10**30]]}, "prompt[0][1]", "less than"),
        ({"prompt": ["a"] * 40, "n": 16}, "n", "640 answers at once"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
        ({"prompt": {"a": 1}}, "prompt", "valid"),
        ({"prompt": "x" * 2100}, "prompt", "2048 tokens"),
        ({"prompt": ["a", [BOS] * 2048]}, "prompt[1]", "string"),
        ({"prompt": [[3], [BOS] * 2048]}, "prompt", "no room"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
        ({"echo": "yes"}, "echo", "boolean"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not streamed"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"model": "gpt-4"}, "model", "gpt-4"),
    ],
)
def test_refusals(server: Running, body: dict[str, Any], param: str, words: str) -> None:
    """What cannot be had is refused in OpenAI's envelope, which names the field."""
    response = ask(server, **body)
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_fields_that_ask_for_nothing(server: Running) -> None:
    """Clients send these; their neutral values are let pass."""
    neutral: dict[str, Any] = {"suffix": None, "best_of": 1, "user": "me", "stop": []}
    assert ask(server, **neutral).status_code == 200


def test_scored_prompts_are_bounded() -> None:
    """Log-probabilities of prompts cost memory: by the setting, and by how many are asked for."""
    limits = Limits(max_scored_tokens=1000)
    with running(FakeEngine(PIECES), limits=limits) as server:
        scored: dict[str, Any] = {"echo": True, "logprobs": 1}
        assert ask(server, prompt="x" * 999, **scored).status_code == 200
        assert ask(server, prompt="x" * 1000).status_code == 200
        error = ask(server, prompt="x" * 1000, **scored).json()["error"]
        assert "limits.max_scored_tokens" in error["message"]
        many = ask(server, prompt=[[3] * 900] * 16, echo=True, logprobs=20)
        assert many.json()["error"]["param"] == "logprobs"


def test_client_that_leaves_frees_every_prompt() -> None:
    """One connection, several works: all of them are aborted."""
    engine = FakeEngine(delay=60)
    with running(engine) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/completions", json=BODY | {"prompt": ["a", "b"]}, timeout=0.3
            )
        wait_until(lambda: len(engine.aborted) == 2)
        wait_until(lambda: server.app.server_state.in_flight == 0)
        left = server.value(
            "synthia_requests_total",
            route="/v1/completions",
            model="synthia-demo",
            status="499",
        )
        assert left == 1


def test_places_and_tokens_are_claimed(tmp_path: Path) -> None:
    """Each prompt takes a place, and tokens a minute count all of them."""
    key, hashed = new_key()
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"users:\n  ann:\n    keys: ['{hashed}']\n    tokens_per_minute: 200\n"
        "    models: [synthia-demo]\n"
    )
    with running(FakeEngine(PIECES), keys_file=file) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        client.completions.create(model="synthia-demo", prompt=["a"] * 3, max_tokens=10)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="synthia-demo", prompt=["a"] * 3, max_tokens=60)
        with pytest.raises(openai.PermissionDeniedError):
            client.completions.create(model="synthia-demo-tot", prompt="a")
        client.close()
        assert ask(server).status_code == 401
        assert ask(server, "/tokenize", prompt="a").status_code == 401
        assert httpx.get(f"{server.url}/tokenizer_info").status_code == 401
        assert ask(server, "/v1/completions/render", prompt="a").status_code == 401
        for path in ("/tokenize", "/v1/completions/render", "/v1/chat/completions/render"):
            refused = httpx.post(
                f"{server.url}{path}",
                headers={"Authorization": f"Bearer {key}"},
                json={"model": "synthia-demo-tot"}
                | ({"messages": [USER]} if "chat" in path else {"prompt": "a"}),
            )
            assert refused.json()["error"]["code"] == "model_not_allowed"


def test_no_conversation_is_kept(tmp_path: Path) -> None:
    """Transcripts are of conversations; a raw prompt is none."""
    with running(FakeEngine(PIECES), transcripts=Transcript(directory=tmp_path)) as server:
        assert ask(server).status_code == 200
        server.client.chat.completions.create(model="synthia-demo", messages=[USER])
    lines = [line for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert [json.loads(line)["prompt"] for line in lines] == ["Hi"]


def test_rendered_is_what_is_sent(server: Running) -> None:
    """The rendered prompt, ids and stops are those the engine gets for the same request."""
    body = {
        "model": "synthia-demo-tot",
        "messages": [
            USER,
            {"role": "assistant", "content": "Yes."},
            {**USER, "content": "USER: x"},
        ],
        "stop": "END",
        "max_tokens": 7,
    }
    found = ask(server, "/v1/chat/completions/render", **body).json()
    assert found["prompt"] == (
        f"SYSTEM: {TREE_OF_THOUGHT.system}\nUSER: Hi\nASSISTANT: Yes.\nUSER: \\USER: x\nASSISTANT:"
    )
    assert found["escaped_markers"] == 1
    assert found["dropped_messages"] == 0
    ask(server, "/v1/chat/completions", **body)
    work = server.engine.seen[-1]  # type: ignore[attr-defined]
    assert found["prompt_token_ids"] == work.prompt_token_ids == [BOS, *ids(found["prompt"])]
    assert found["count"] == len(work.prompt_token_ids)
    assert tuple(found["stop"]) == work.sampling.stop == ("USER:", "END")
    assert found["max_tokens"] == work.sampling.max_tokens == 7
    assert found["sampling"]["temperature"] == 0.75


def test_rendered_with_dropped_messages() -> None:
    """What is left out to fit is told."""
    turns = [
        turn
        for number in range(40)
        for turn in (
            {"role": "user", "content": f"{number} " + "x" * 60},
            {"role": "assistant", "content": "y"},
        )
    ]
    with running(FakeEngine(), overflow="drop-oldest") as server:
        found = ask(
            server, "/v1/chat/completions/render", model="synthia-demo", messages=[*turns, USER]
        ).json()
    assert found["dropped_messages"] > 0
    assert found["dropped_messages"] % 2 == 0
    assert found["prompt"].startswith(f"USER: {found['dropped_messages'] // 2} ")
    assert found["count"] + 256 <= 2048


def test_render_refuses_what_chat_refuses(server: Running) -> None:
    """The same request gives the same error."""
    bodies: list[dict[str, Any]] = [
        {"messages": []}, {"messages": [USER], "tools": [{}]}, {"messages": [USER]},
    ]  # fmt: skip
    for body in bodies:
        errors = [
            ask(server, path, **body).json()
            for path in ("/v1/chat/completions", "/v1/chat/completions/render")
        ]
        assert errors[0] == errors[1]
        assert "error" in errors[0]


def test_rendered_completions_are_what_is_sent(server: Running) -> None:
    """A list, as vLLM gives it: each prompt's tokens, cut as the request says."""
    body: dict[str, Any] = {
        "model": "synthia-demo", "prompt": ["Hello", "You"], "truncate_prompt_tokens": 3,
        "stream": True,
    }  # fmt: skip
    found = ask(server, "/v1/completions/render", **body)
    assert found.status_code == 200
    seen = len(server.engine.seen)  # type: ignore[attr-defined]
    ask(server, **body)
    sent = [work.prompt_token_ids for work in server.engine.seen[seen:]]  # type: ignore[attr-defined]
    assert found.json() == [{"token_ids": tokens, "count": 3} for tokens in sent]
    assert sent == [ids("llo"), ids("You")]
    for refused in ({"prompt": "x" * 5000}, {"prompt": "a", "model": "x"}, {"suffix": "b"}):
        body = BODY | refused
        errors = [ask(server, f"/v1/completions{end}", **body).json() for end in ("", "/render")]
        assert errors[0] == errors[1]
        assert "error" in errors[0]


def test_tokens_and_text(server: Running) -> None:
    """Text to tokens and back, with and without the token in front."""
    found = ask(server, "/tokenize", prompt="hé", return_token_strs=True).json()
    assert found == {
        "count": 4,
        "max_model_len": 2048,
        "tokens": [BOS, *ids("hé")],
        "token_strs": ["<s>", "h", "�", "�"],
    }
    bare = ask(server, "/tokenize", prompt="hé", add_special_tokens=False).json()
    assert bare == {"count": 3, "max_model_len": 2048, "tokens": ids("hé")}
    assert ask(server, "/detokenize", tokens=found["tokens"]).json() == {"prompt": "<s>hé"}
    assert httpx.get(f"{server.url}/tokenizer_info").json() == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "model_max_length": 2048
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "model": "x"}, "model"),
        ("/detokenize", {"tokens": [32000]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "x"}, "model"),
    ],
)
def test_tools_refuse_clearly(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    """As everywhere: the envelope, and the field."""
    error = ask(server, path, **body).json()["error"]
    assert error["param"] == param


def test_tools_bound_their_input(server: Running) -> None:
    """No larger bodies than elsewhere, and JSON by its headers."""
    big = ask(server, "/tokenize", prompt="x" * 600_000)
    assert big.status_code == 413
    plain = httpx.post(f"{server.url}/tokenize", content='{"prompt": "a"}')
    assert plain.status_code == 400


def test_document_knows_the_routes(server: Running) -> None:
    """The OpenAPI document has the bodies of all these routes."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path in (
        "/v1/completions", "/v1/completions/render", "/v1/chat/completions/render", "/tokenize",
        "/detokenize",
    ):  # fmt: skip
        content = document["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert name in document["components"]["schemas"]
