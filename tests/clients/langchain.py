"""langchain-openai against the server at argv[1]."""

from __future__ import annotations

import sys
from typing import Literal

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
where = {"model": "synthia-demo", "base_url": sys.argv[1], "api_key": "none", "temperature": 0}


class Animal(BaseModel):
    """What an answer is made to fit."""

    kind: Literal["cat", "dog"]
    tame: bool


chat = ChatOpenAI(**where)
answer = chat.invoke([("system", "Be brief."), ("human", QUESTION)])
assert answer.content
assert answer.usage_metadata["output_tokens"] > 0
parts = [part.content for part in chat.stream([("system", "Be brief."), ("human", QUESTION)])]
assert "".join(parts) == answer.content
assert len(parts) > 10
assert [a.content for a in chat.batch(["Hi", QUESTION])][1]
for method in ("json_schema", "function_calling"):
    assert isinstance(chat.with_structured_output(Animal, method=method).invoke("A cat?"), Animal)
newer = ChatOpenAI(use_responses_api=True, **where)
first = newer.invoke([("system", "Be brief."), ("human", QUESTION)])
assert first.text == answer.content
parts = [part.text for part in newer.stream([("system", "Be brief."), ("human", QUESTION)])]
assert "".join(parts) == answer.content
assert newer.invoke([("human", QUESTION), first, ("human", "And a shark?")]).text
assert isinstance(
    newer.with_structured_output(Animal, method="json_schema").invoke("A cat?"), Animal
)
raw = OpenAI(max_tokens=8, **where).invoke(f"USER: {QUESTION}\nASSISTANT:")
assert raw.strip()
print(answer.content)
