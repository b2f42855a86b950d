"""Chat answers on the wire: plain, streamed, with log-probabilities."""

from __future__ import annotations

from chat_api import BODY, events, post
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine


def test_stream_is_the_plain_answer(server: Running) -> None:
    """Streamed deltas joined are the plain content; so are the counts and the reasons."""
    client = server.client
    plain = client.chat.completions.create(**BODY)
    chunks = list(
        client.chat.completions.create(**BODY, stream=True, stream_options={"include_usage": True})
    )
    *chunks, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello."
    assert plain.choices[0].message.content == "Hello."
    assert plain.usage == last.usage
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert plain.choices[0].finish_reason == "stop"
    assert plain.choices[0].model_extra["stop_reason"] == "USER:"
    assert all(c.usage is None for c in chunks)


def test_counts_with_every_event(server: Running) -> None:
    """vLLM's `continuous_usage_stats`: each event counts the tokens so far; the last, all."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(post(server, BODY | {"stream": True, "stream_options": options}))
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[0] < counts[-2] == counts[-1]
    assert found[-1]["choices"] == []
    alone = {"continuous_usage_stats": True}
    for event in events(post(server, BODY | {"stream": True, "stream_options": alone})):
        assert "usage" not in event


def test_first_event_has_the_first_text(server: Running) -> None:
    """No event before the first text; that one brings the role. None is empty."""
    first, *others = events(post(server, BODY | {"stream": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "He"}
    assert [e["choices"][0]["delta"] for e in others] == [
        {"content": "llo"}, {"content": "."}, {}
    ]  # fmt: skip


def test_empty_answer_is_an_answer() -> None:
    """A model that says nothing gives an empty content, streamed and not."""
    with running(FakeEngine((" \n",))) as server:
        assert post(server).json()["choices"][0]["message"]["content"] == ""
        [only] = events(post(server, BODY | {"stream": True}))
        assert only["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_marker_never_leaves(server: Running) -> None:
    """With `min_tokens` the engine looks away from stops; the marker still ends the answer."""
    for extra in (
        {"min_tokens": 30},
        {"ignore_eos": True},
        {"n": 3, "min_tokens": 30},
        {"logprobs": True, "top_logprobs": 2, "min_tokens": 30},
    ):
        streamed = post(server, BODY | extra | {"stream": True})
        plain = post(server, BODY | extra)
        for response in (streamed, plain):
            assert response.status_code == 200
            text = response.text.replace('"stop_reason":"USER:"', "")
            assert "US" not in text
            assert "next" not in text
        for choice in plain.json()["choices"]:
            assert choice["message"]["content"] == "Hello."
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "USER:")


def test_own_stop(server: Running) -> None:
    """A request's own stop ends the answer before `USER:` and is reported."""
    choice = post(server, BODY | {"stop": ["zzz", "lo"]}).json()["choices"][0]
    assert choice["message"]["content"] == "Hel"
    assert choice["stop_reason"] == "lo"
    assert server.engine.seen[-1].sampling.stop == ("USER:", "zzz", "lo")  # type: ignore[attr-defined]


def test_logprobs_are_of_the_answer(server: Running) -> None:
    """The tokens reported are those of the answer's text, streamed and not, to the byte."""
    wanted = {"logprobs": True, "top_logprobs": 1}
    plain = post(server, BODY | wanted).json()["choices"][0]["logprobs"]["content"]
    assert "".join(place["token"] for place in plain) == "Hello."
    assert bytes(b for place in plain for b in place["bytes"]) == b"Hello."
    streamed = events(post(server, BODY | wanted | {"stream": True}))
    places = [e["choices"][0]["logprobs"]["content"] for e in streamed]
    assert [place for content in places for place in content] == plain


def test_logprobs_of_split_characters() -> None:
    """A character made of several tokens is reported with all of them."""
    with running(FakeEngine((" é", "😀", "ü", "\nUSER:"))) as server:
        body = BODY | {"logprobs": True}
        places = post(server, body).json()["choices"][0]["logprobs"]["content"]
        assert bytes(b for place in places for b in place["bytes"]).decode() == "é😀ü"
