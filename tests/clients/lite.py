"""litellm against the server at argv[1]."""

from __future__ import annotations

import asyncio
import sys

import litellm

QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
where = {"api_base": sys.argv[1], "api_key": "none", "temperature": 0}
chat = {
    "model": "openai/synthia-demo", **where,
    "messages": [{"role": "user", "content": QUESTION}],
}  # fmt: skip

answer = litellm.completion(**chat).choices[0].message.content
assert answer
parts = [part.choices[0].delta.content or "" for part in litellm.completion(**chat, stream=True)]
assert "".join(parts) == answer
assert asyncio.run(litellm.acompletion(**chat)).choices[0].message.content == answer
raw = litellm.text_completion(
    model="text-completion-openai/synthia-demo",
    prompt="USER: Hi\nASSISTANT:",
    max_tokens=5,
    **where,
)
assert raw.choices[0].text
try:
    litellm.completion(**{**chat, "temperature": 3})
except litellm.BadRequestError as error:
    assert "temperature" in str(error)  # noqa: PT017  # not a test function
else:
    raise AssertionError("a bad request was taken")
print(answer)
