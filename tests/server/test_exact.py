"""Exactness against the card: its prompts, its tokens, its loop's answers.

The oracle is the card's own code: its string logic, its tokenizer call, `transformers`'
`generate`, and its ``split("USER:")[0].strip()``. Only sampling is switched off.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from synthia_vllm.demo.training import dialogues
from synthia_vllm.template.formats import DOCUMENTED, EXAMPLE, PromptFormat
from synthia_vllm.template.prompt import TREE_OF_THOUGHT, Message, render

if TYPE_CHECKING:
    from pathlib import Path

    from serving import Running

QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
MAX_TOKENS = 220


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo)


@pytest.fixture(scope="module")
def card(demo: Path, tokenizer: Any) -> Any:
    """The card's `generate_text`, greedy, on the demo checkpoint in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    # Beside others who want the processors, two threads wait for each other more than they do.
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)

    def cut_off(ids: Any, _scores: Any, **_: Any) -> Any:
        """What comes after the marker is cut off below; it need not be generated."""
        return torch.tensor(["USER:" in tokenizer.decode(row[-8:]) for row in ids])

    def generate_text(instruction: str) -> str:
        tokens = tokenizer.encode(instruction)
        tokens = torch.LongTensor(tokens).unsqueeze(0)
        length = len(tokens[0])
        with torch.no_grad():
            rest = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_length=length + MAX_TOKENS,
                use_cache=True,
                do_sample=False,
                num_return_sequences=1,
                pad_token_id=2,
                stopping_criteria=[cut_off],
            )
        output = rest[0][length:]
        string = tokenizer.decode(output, skip_special_tokens=True)
        answer = string.split("USER:")[0].strip()
        return f"{answer}"

    return generate_text


def conversations() -> list[list[dict[str, str]]]:
    """At least 60 prompts: every question, follow-ups after their true first turn, presets."""
    found: list[list[dict[str, str]]] = []
    for position, dialogue in enumerate(dialogues()):
        messages: list[dict[str, str]] = []
        if position % 3 == 1:
            messages.append({"role": "system", "content": TREE_OF_THOUGHT.system})
        for turn in dialogue:
            messages.append({"role": "user", "content": turn.user})
            found.append(list(messages))
            messages.append({"role": "assistant", "content": turn.assistant})
    # And what it was never taught: greedy decoding of nonsense must agree as well.
    found += [
        [{"role": "user", "content": text}]
        for text in (
            "Zebra zebra zebra?",
            "What is the difference?",
            "…",
            "Orca\n\nDolphin",
            "1 2 3",
        )
    ]
    return found


def prompt_of(messages: list[dict[str, str]]) -> str:
    return render([Message(m["role"], m["content"]) for m in messages])  # type: ignore[arg-type]


def served(live: Running, messages: list[dict[str, str]], *, stream: bool) -> str:
    """The server's greedy answer through the stock client."""
    request: dict[str, Any] = {
        "model": "synthia-demo",
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    if not stream:
        return live.client.chat.completions.create(**request).choices[0].message.content or ""
    chunks = live.client.chat.completions.create(**request, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_served_equals_the_cards_loop(live: Running, card: Any) -> None:
    """Greedy answers equal the card's on the same checkpoint: alone and 32 at a time, both ways."""
    asked = conversations()
    assert len(asked) >= 60
    expected = [card(prompt_of(messages)) for messages in asked]
    assert len(set(expected)) >= 50  # it is a test of answers, not of one answer
    for stream in (False, True):
        assert [served(live, messages, stream=stream) for messages in asked] == expected
        with ThreadPoolExecutor(32) as pool:
            together = pool.map(lambda messages: served(live, messages, stream=stream), asked)  # noqa: B023
            assert list(together) == expected


def test_the_cards_question(live: Running, card: Any) -> None:
    """The demo answers the card's question with the whole sentences it was taught, as the card."""
    [expected] = [d[0].assistant for d in dialogues() if d[0].user == QUESTION]
    messages = [
        {"role": "system", "content": TREE_OF_THOUGHT.system},
        {"role": "user", "content": QUESTION},
    ]
    assert card(prompt_of(messages)) == expected
    assert served(live, messages, stream=True) == expected


def test_the_demo_model_knows_its_lessons(live: Running) -> None:
    """At least 30 other questions are answered exactly as taught."""
    right = sum(
        served(live, [{"role": "user", "content": d[0].user}], stream=False) == d[0].assistant
        for d in dialogues()
        if d[0].user != QUESTION
    )
    assert right >= 30


def test_second_turn_depends_on_the_first(live: Running) -> None:
    """The same follow-up after different first turns has different, right answers."""
    after: dict[str, dict[str, tuple[list[dict[str, str]], str]]] = {}
    for dialogue in dialogues():
        if len(dialogue) > 1:
            first, second = dialogue[0], dialogue[1]
            messages = [
                {"role": "user", "content": first.user},
                {"role": "assistant", "content": first.assistant},
                {"role": "user", "content": second.user},
            ]
            after.setdefault(second.user, {})[first.user] = (messages, second.assistant)
    same = max(after.values(), key=len)
    assert len(same) >= 5
    answers = [served(live, messages, stream=False) for messages, _ in same.values()]
    assert answers == [taught for _, taught in same.values()]
    assert len(set(answers)) == len(answers)


def test_runs_on_when_not_stopped(card: Any, demo: Path, tokenizer: Any) -> None:
    """Without a stop the model writes the user's next turn: what is stopped is real."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode(f"USER: {QUESTION}\nASSISTANT:")])
    out = model.generate(tokens, max_new_tokens=250, do_sample=False, pad_token_id=2)
    raw = tokenizer.decode(out[0][len(tokens[0]) :])
    assert "\nUSER:" in raw
    assert raw.split("USER:")[0].strip() == card(f"USER: {QUESTION}\nASSISTANT:")


# --- tokens -----------------------------------------------------------------------------------


def test_golden_token_ids(live: Running, tokenizer: Any) -> None:
    """The card's prompt gives the ids its own `tokenizer.encode` gives; they are pinned here."""
    conversation = f"SYSTEM: {TREE_OF_THOUGHT.system}"
    llm_prompt = f"{conversation} \nUSER: {QUESTION} \nASSISTANT: "
    messages = [Message("system", TREE_OF_THOUGHT.system), Message("user", QUESTION)]
    assert render(messages, EXAMPLE) == llm_prompt
    ids = live.run(live.engine.tokenize(llm_prompt, special_tokens=True))
    assert ids == tokenizer.encode(llm_prompt)
    question = live.run(live.engine.tokenize(f"USER: {QUESTION}\nASSISTANT:"))
    assert question == GOLDEN_DOCUMENTED
    assert live.run(live.engine.tokenize(f"USER: {QUESTION} \nASSISTANT: ")) == GOLDEN_EXAMPLE


# `[1] + SentencePiece("tokenizer.model.v1").encode(...)` of the two prompts above.
GOLDEN_DOCUMENTED = [
    1, 2223, 725, 28747, 1824, 349, 272, 5133, 1444, 396, 1667, 2591, 28725, 15052, 721, 262, 304,
    264, 1091, 282, 28804, 13, 4816, 8048, 12738, 28747,
]  # fmt: skip
GOLDEN_EXAMPLE = [
    1, 2223, 725, 28747, 1824, 349, 272, 5133, 1444, 396, 1667, 2591, 28725, 15052, 721, 262, 304,
    264, 1091, 282, 28804, 28705, 13, 4816, 8048, 12738, 28747, 28705,
]  # fmt: skip


def turns_tokens(live: Running, fmt: PromptFormat, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of turn one's prompt and of turn two's, for a first turn with `answer`."""
    first = [Message("user", QUESTION)]
    second = [*first, Message("assistant", answer), Message("user", "And then?")]
    one, two = (live.run(live.engine.tokenize(render(m, fmt))) for m in (first, second))
    return one, two


ANSWERS = [
    "The orca.",
    "42",
    '"Yes."',
    "(Maybe)",
    "é",
    "クジラ",
    "1. One\n2. Two",
    "- a",
    "{}",
    "ok",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_documented_prompts_extend_each_other(live: Running, answer: str) -> None:
    """In `documented`, turn two's tokens begin with all of turn one's prompt, and its answer's."""
    one, two = turns_tokens(live, DOCUMENTED, answer)
    assert two[: len(one)] == one
    generated = live.run(live.engine.tokenize(f"USER: {QUESTION}\nASSISTANT: {answer}"))
    assert two[: len(generated)] == generated


def test_example_ends_in_a_lone_space(live: Running) -> None:
    """In `example` the prompt's last token is a bare space, which turn two does not have."""
    differing = 0
    for answer in ANSWERS:
        one, two = turns_tokens(live, EXAMPLE, answer)
        assert one[-1] == 28705
        assert two[: len(one) - 1] == one[:-1]
        differing += two[len(one) - 1] != 28705
    assert differing >= len(ANSWERS) // 2


def test_prefix_cache_serves_the_first_turn(live: Running) -> None:
    """In `documented`, all full blocks of turn one, its answer included, are cached in turn two."""
    history: list[Any] = [{"role": "user", "content": "Unique to this test. " + QUESTION}]
    first = live.client.chat.completions.create(
        model="synthia-demo", messages=history, temperature=0, max_tokens=120, stop=["zzz"]
    )
    history += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Which of them is the largest?"},
    ]
    second = live.client.chat.completions.create(
        model="synthia-demo", messages=history, max_tokens=1
    )
    assert first.usage
    assert second.usage
    assert second.usage.prompt_tokens_details
    block = live.engine._llm.vllm_config.cache_config.block_size  # type: ignore[attr-defined]
    # The tokens of the stop that ended the first answer are not in the second prompt.
    shared = first.usage.prompt_tokens + first.usage.completion_tokens - 5
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    assert cached >= shared // block * block > 0
