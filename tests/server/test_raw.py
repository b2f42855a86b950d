"""Raw completions on the real engine: what the LM Evaluation Harness and benchmarks ask for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from synthia_vllm.template.prompt import TREE_OF_THOUGHT

if TYPE_CHECKING:
    from pathlib import Path

    from serving import Running

QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
PROMPT = f"USER: {QUESTION}\nASSISTANT:"


def post(live: Running, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{live.url}{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def tokens_of(live: Running, text: str, **more: Any) -> list[int]:
    found: list[int] = post(live, "/tokenize", {"prompt": text, **more})["tokens"]
    return found


def scored(live: Running, prompts: Any) -> list[Any]:
    """The harness's request, and the log-probabilities it reads."""
    answer = post(
        live,
        "/v1/completions",
        {
            "model": "synthia-demo", "prompt": prompts, "temperature": 0, "max_tokens": 1,
            "logprobs": 1, "seed": 1234, "echo": True,
        },
    )  # fmt: skip
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts)))
    return [choice["logprobs"] for choice in answer["choices"]]


def test_raw_text_runs_on(live: Running) -> None:
    """No template and no stop: the model writes the next question too, as the card warns."""
    body = {"model": "synthia-demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 200}
    text = post(live, "/v1/completions", body)["choices"][0]["text"]
    chat = live.client.chat.completions.create(
        model="synthia-demo", messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    assert "USER:" in text
    assert text.split("USER:")[0].strip() == chat.choices[0].message.content
    stopped = post(live, "/v1/completions", body | {"stop": "USER:"})["choices"][0]
    assert stopped["text"] == text.split("USER:")[0]
    assert stopped["finish_reason"] == "stop"


def test_stream_is_plain(live: Running) -> None:
    """Streamed text is the plain one, with a stop held back and without."""
    for stop in ([], ["USER:"], [" whale"]):
        asked: Any = {
            "model": "synthia-demo", "prompt": [PROMPT, tokens_of(live, PROMPT)][:1], "stop": stop,
            "temperature": 0, "max_tokens": 200,
        }  # fmt: skip
        plain = live.client.completions.create(**asked)
        streamed = "".join(
            chunk.choices[0].text for chunk in live.client.completions.create(**asked, stream=True)
        )
        assert streamed == plain.choices[0].text


def test_harness_finds_what_it_reads(live: Running) -> None:
    """Both arrays have the prompt's length and one, all but the first finite and with the token."""
    ids = tokens_of(live, PROMPT, add_special_tokens=False)
    ended = [*tokens_of(live, "USER: x\nASSISTANT: y"), 2]
    for found, prompt in zip(scored(live, [ids, ended]), (ids, ended), strict=True):
        assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(prompt) + 1
        assert found["token_logprobs"][0] is None
        for name, value, top in zip(
            found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True
        ):
            assert value <= 0
            assert top[name] <= max(top.values())
    offsets = scored(live, [ids])[0]["text_offset"]
    assert offsets == sorted(offsets)


def test_scores_do_not_depend_on_company(live: Running) -> None:
    """Cold or warm prefix cache, alone or 16 at a time: the same log-probabilities."""
    prompts = [tokens_of(live, f"USER: Question {n}?\nASSISTANT: {QUESTION}") for n in range(16)]
    alone = [scored(live, [prompt])[0]["token_logprobs"][1:-1] for prompt in prompts]
    together = [found["token_logprobs"][1:-1] for found in scored(live, prompts)]
    with ThreadPoolExecutor(16) as pool:
        at_once = list(
            pool.map(lambda prompt: scored(live, [prompt])[0]["token_logprobs"][1:-1], prompts)
        )
    for first, second, third in zip(alone, together, at_once, strict=True):
        assert second == pytest.approx(first, abs=1e-3)
        assert third == pytest.approx(first, abs=1e-3)


def test_choices_share_the_prompts_scores(live: Running) -> None:
    """With `n` each choice has the prompt's log-probabilities, streamed too."""
    asked: Any = {
        "model": "synthia-demo", "prompt": [PROMPT, "USER: Hi"], "n": 2, "temperature": 1.0,
        "echo": True, "logprobs": 1, "max_tokens": 3,
    }  # fmt: skip
    size = len(tokens_of(live, PROMPT))
    plain = live.client.completions.create(**asked).choices
    scores: dict[int, list[float | None]] = {n: [] for n in range(4)}
    for chunk in live.client.completions.create(**asked, stream=True):
        found = chunk.choices[0].logprobs
        assert found is not None
        scores[chunk.choices[0].index] += found.token_logprobs or []
    for first, second in ((0, 1), (2, 3)):
        prompts = [choice.logprobs.token_logprobs for choice in plain[first : second + 1]]
        prompts += [scores[first], scores[second]]
        shortest = min(map(len, prompts)) - 3
        assert shortest > 2
        for other in prompts[1:]:
            assert other[1:shortest] == pytest.approx(prompts[0][1:shortest], abs=1e-3)
    assert len(plain[0].logprobs.token_logprobs) > size


def test_tokens_are_the_tokenizers(live: Running, demo: Path) -> None:
    """`/tokenize` and `/detokenize` are the model's own tokenizer, special tokens included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo)
    for text in (PROMPT, "", " two  spaces ", "Où? 鯨 🐋\n\n", "a</s>b", "</s>", "<s>"):
        assert tokens_of(live, text) == tokenizer.encode(text)
        bare = tokenizer.encode(text, add_special_tokens=False)
        assert tokens_of(live, text, add_special_tokens=False) == bare
        decoded = post(live, "/detokenize", {"tokens": bare})["prompt"]
        assert decoded == tokenizer.decode(bare)
    info = httpx.get(f"{live.url}/tokenizer_info").json()
    assert info["eos_token"] == tokenizer.eos_token
    assert tokens_of(live, info["eos_token"], add_special_tokens=False) == [2]


def test_rendered_prompt_is_what_runs(live: Running) -> None:
    """The raw completion of a rendered prompt is the chat's answer, token for token."""
    body = {
        "model": "synthia-demo-tot",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
    }
    rendered = post(live, "/v1/chat/completions/render", body)
    assert rendered["prompt"].startswith(f"SYSTEM: {TREE_OF_THOUGHT.system}\nUSER: ")
    assert rendered["prompt_token_ids"] == tokens_of(live, rendered["prompt"])
    chat = post(live, "/v1/chat/completions", body)
    raw = post(
        live,
        "/v1/completions",
        {
            "model": "synthia-demo", "prompt": rendered["prompt_token_ids"], "temperature": 0,
            "max_tokens": rendered["max_tokens"], "stop": rendered["stop"],
        },
    )  # fmt: skip
    assert raw["choices"][0]["text"].strip() == chat["choices"][0]["message"]["content"]
    assert raw["usage"]["completion_tokens"] == chat["usage"]["completion_tokens"]


def test_leaving_frees_the_engine(live: Running) -> None:
    """Several prompts whose client has gone do not run on."""
    from serving import wait_until

    body = {
        "model": "synthia-demo", "prompt": [PROMPT] * 4, "max_tokens": 1500, "ignore_eos": True
    }  # fmt: skip
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/completions", json=body, timeout=1)
    wait_until(lambda: not live.engine._llm.output_processor.request_states)  # type: ignore[attr-defined]
