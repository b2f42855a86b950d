"""Fields of vLLM's own server, seen to do what they say on the real engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from serving import Running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "What is a token?"}


def post(live: Running, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    basis: dict[str, Any] = {"model": "synthia-demo", "max_tokens": 40}
    basis |= {"messages": [USER]} if path == CHAT else {"prompt": "USER: Hi\nASSISTANT:"}
    response = httpx.post(f"{live.url}{path}", json=basis | body, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


def texts(answer: dict[str, Any]) -> list[str]:
    return [c["message"]["content"] if "message" in c else c["text"] for c in answer["choices"]]


def test_greedy_choices_are_equal(live: Running) -> None:
    """`n` greedy answers are one and the same, which is the greedy one."""
    [alone] = texts(post(live, {"temperature": 0}))
    assert texts(post(live, {"temperature": 0, "n": 3})) == [alone] * 3


@pytest.mark.parametrize("seed", [-1, -3, 7])
def test_seeds_are_kept(live: Running, seed: int) -> None:
    """Each of the answers is the same again, also where one has the seed -1."""
    # Tokens of which the model expects none, so that chance chooses.
    body: dict[str, Any] = {"seed": seed, "n": 4, "temperature": 2, "top_k": -1, "max_tokens": 12}
    body |= {"allowed_token_ids": list(range(1000, 1400))}
    first = texts(post(live, body))
    assert texts(post(live, body)) == first
    assert len(set(first)) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_stop_tokens_end_and_are_not_shown(live: Running, path: str, stream: bool) -> None:
    """The text ends before the stop token, whose id is the `stop_reason`."""
    body: dict[str, Any] = {"temperature": 0, "return_token_ids": True}
    [whole] = post(live, body, path)["choices"]
    stop = next(token for token in whole["token_ids"][4:] if token > 300)
    at = whole["token_ids"].index(stop)
    before = live.run(live.engine.detokenize(whole["token_ids"][:at]))
    if stream:
        asked = body | {"stop_token_ids": [stop], "stream": True, "model": "synthia-demo"}
        asked |= {"messages": [USER]} if path == CHAT else {"prompt": "USER: Hi\nASSISTANT:"}
        asked |= {"max_tokens": 40}
        lines = httpx.post(f"{live.url}{path}", json=asked, timeout=60).text.split("\n\n")[:-2]
        choices = [json.loads(line[6:])["choices"][0] for line in lines]
        text = "".join(
            c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices
        )
        last = choices[-1]
    else:
        [last] = post(live, body | {"stop_token_ids": [stop]}, path)["choices"]
        text = last["message"]["content"] if path == CHAT else last["text"]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)
    assert text.strip() == before.strip()


def test_words_and_tokens_can_be_forbidden(live: Running) -> None:
    """`bad_words` do not come; of `allowed_token_ids` nothing else does."""
    [greedy] = texts(post(live, {"temperature": 0}))
    word = max(greedy.split(), key=len).strip(".,")
    [without] = texts(post(live, {"temperature": 0, "bad_words": [word]}))
    assert word in greedy
    assert word not in without
    [allowed] = post(live, {"allowed_token_ids": [264], "return_token_ids": True})["choices"]
    assert set(allowed["token_ids"]) == {264}


def test_repetition_ends_an_answer(live: Running) -> None:
    """`repetition_detection` ends what says the same again and again."""
    body = {"allowed_token_ids": [264], "max_tokens": 400}
    detection = {"max_pattern_size": 2, "min_count": 4}
    [choice] = post(live, body | {"repetition_detection": detection})["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "repetition_detected")


def test_events_of_several_tokens(live: Running) -> None:
    """`stream_interval`: the same text in fewer events, the first of them at once."""
    body = {"model": "synthia-demo", "messages": [USER], "temperature": 0, "stream": True}
    counts, found = [], set()
    for more in ({}, {"stream_interval": 8}):
        text = httpx.post(f"{live.url}{CHAT}", json=body | more, timeout=60).text
        choices = [json.loads(line[6:])["choices"][0] for line in text.split("\n\n")[:-2]]
        counts.append(len(choices))
        found.add("".join(choice["delta"].get("content", "") for choice in choices))
    assert len(found) == 1
    assert counts[1] < counts[0] / 3


def test_special_tokens_by_their_names(live: Running) -> None:
    """In `top_logprobs`, and in the text where that is asked for; the end is in neither."""
    body = {"logit_bias": {"2": 100}, "logprobs": True, "top_logprobs": 2, "min_tokens": 0}
    answer = post(live, body | {"temperature": 0, "ignore_eos": True, "max_tokens": 3})
    shown = [token for c in answer["choices"] for token in c["logprobs"]["content"]]
    assert not shown
    body = {"logprobs": 1, "logit_bias": {"2": 5}, "temperature": 0}
    raw = post(live, body, COMPLETIONS)["choices"][0]["logprobs"]
    assert all(raw["tokens"])
    visible = {"skip_special_tokens": False, "logit_bias": {"0": 100}, "max_tokens": 2}
    for stream_text in (texts(post(live, visible, COMPLETIONS)), texts(post(live, visible))):
        assert stream_text[0].count("<unk>") == 2
    whole = {"temperature": 0, "max_tokens": 400, "skip_special_tokens": False}
    assert texts(post(live, whole)) == texts(post(live, whole | {"skip_special_tokens": True}))
