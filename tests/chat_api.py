"""Asking for chat, as most tests of the edge do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from synthia_vllm.admission.users import new_key

if TYPE_CHECKING:
    from pathlib import Path

    from serving import Running

PIECES = (" \n", " He", "llo", ".", " \n", "US", "ER", ": next", " question")


USER = {"role": "user", "content": "Hi"}


BODY: dict[str, Any] = {"model": "synthia-demo", "messages": [USER]}


def post(server: Running, body: Any = None, **options: Any) -> httpx.Response:
    if "content" not in options:
        options["json"] = body or BODY
    return httpx.post(f"{server.url}/v1/chat/completions", timeout=30, **options)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream; checks its framing."""
    *blocks, last, rest = response.text.split("\n\n")
    assert rest == ""
    found = [json.loads(block.removeprefix("data: ")) for block in blocks]
    if last == "data: [DONE]":
        return found
    return [*found, json.loads(last.removeprefix("data: "))]


def key_file(place: Path, **users: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Write a key file with `users`; return the header each of them sends."""
    headers, document = {}, {}
    for name, limits in users.items():
        key, key_hash = new_key()
        headers[name] = {"Authorization": f"Bearer {key}"}
        document[name] = {"keys": [key_hash], **limits}
    place.write_text(yaml.safe_dump({"users": document}))
    return headers
