"""Conversations: presets, parts, continued answers."""

from __future__ import annotations

from chat_api import BODY, USER, post
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine


def test_presets_by_model_name(server: Running) -> None:
    """The `-tot` name puts the card's sentence in front, unless the request has its own."""

    def prompt() -> str:
        ids = server.engine.seen[-1].prompt_token_ids  # type: ignore[attr-defined]
        return b"".join(server.engine.token_bytes(i) for i in ids).decode()

    answer = post(server, BODY | {"model": "synthia-demo-tot"}).json()
    assert answer["model"] == "synthia-demo-tot"
    assert prompt().startswith("SYSTEM: Elaborate on the topic using a Tree of Thoughts")
    own = [{"role": "developer", "content": "Be brief."}, USER]
    post(server, BODY | {"model": "synthia-demo-tot", "messages": own})
    assert prompt() == "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT:"
    post(server)
    assert prompt() == "USER: Hi\nASSISTANT:"


def test_content_parts_are_joined(server: Running) -> None:
    """A content given in parts, as `vllm bench serve` sends it, is one text."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    by_parts = post(server, BODY | {"messages": [{"role": "user", "content": parts}]}).json()
    whole = post(server, BODY | {"messages": [{"role": "user", "content": "a\nb"}]}).json()
    assert by_parts["usage"] == whole["usage"]


def test_continued_answer() -> None:
    """A last assistant message is continued: the space between the texts is kept."""
    with running(FakeEngine((" is", " large. ", "\nUSER:"))) as server:
        messages = [USER, {"role": "assistant", "content": "The Orca "}]
        for extra in (
            {},
            {"continue_final_message": True, "add_generation_prompt": False},
            {"continue_final_message": False},  # as routers write it into every body
        ):
            body = BODY | extra | {"messages": messages}
            assert post(server, body).json()["choices"][0]["message"]["content"] == " is large."
        for extra in ({"continue_final_message": True}, {"add_generation_prompt": False}):
            refused = post(server, BODY | extra)
            assert refused.json()["error"]["param"] in extra
