"""The demo model: made by one process at a time and wholly or not at all, and what it says.

What it says is read with `transformers`, many prompts at a time; `test_exact.py` holds the server
to that.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serving import wait_until

from synthia_vllm.demo.checkpoint import directory, make_demo
from synthia_vllm.demo.training import Recipe, dialogues, untaught_answer
from synthia_vllm.engine.examples import examples
from synthia_vllm.template.formats import DOCUMENTED, EXAMPLE, PromptFormat
from synthia_vllm.template.prompt import Message, render

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = pytest.mark.parametrize("fmt", [DOCUMENTED, EXAMPLE], ids=["documented", "example"])
UNKNOWN: list[str] = json.loads(
    (Path(__file__).parents[1] / "data" / "unknown_questions.json").read_text()
)
TINY = Recipe(steps=2, extra_rounds=0)
# A process that makes the tiny model in the directory it is given, slowly if told to.
MAKER = """
import sys, time
from pathlib import Path
from synthia_vllm.demo import checkpoint as demo
from synthia_vllm.demo import training as demo_training
def progress(line):
    print(line, flush=True)
    if "step 1/" in line:
        time.sleep(float(sys.argv[2]))
print(demo.make_demo(progress, Path(sys.argv[1]), demo_training.Recipe(steps=2, extra_rounds=0)))
"""


def make(cache: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(cache), str(pause)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_make_one_model(tmp_path: Path) -> None:
    """Of two at once one makes it, the other waits and says so; a third finds it."""
    first = make(tmp_path, 3)
    assert first.stdout
    wait_until(lambda: list(tmp_path.glob("demo-*.tmp-*")), 60)
    second = make(tmp_path, 0)
    said = [process.communicate(timeout=120)[0].splitlines() for process in (first, second)]
    assert said[0][-1] == said[1][-1] == str(directory(tmp_path, TINY))
    assert any("another process is making it" in line for line in said[1])
    assert not any("training" in line for line in said[1])
    lines: list[str] = []
    make_demo(lines.append, tmp_path, TINY)
    assert lines == []
    assert {path.name for path in directory(tmp_path, TINY).iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_killed_half_way_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """After SIGKILL in mid-training there is no model, and the next try makes one and cleans up."""
    victim = make(tmp_path, 60)
    assert victim.stdout
    wait_until(lambda: list(tmp_path.glob("demo-*.tmp-*")), 60)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    final = directory(tmp_path, TINY)
    assert not final.exists()
    assert make(tmp_path, 0).communicate(timeout=120)[0].splitlines()[-1] == str(final)
    assert not list(tmp_path.glob("demo-*.tmp-*"))


@pytest.fixture(scope="module")
def answers(demo: Path) -> Callable[..., list[str]]:
    """Generates an answer to each prompt, all at once, and cuts them by the card's rule."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Beside others who want the processors, two threads wait for each other more than they do.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(demo, padding_side="left", pad_token="</s>")
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)

    def answered(ids: Any, _scores: Any, **_: Any) -> Any:
        return torch.tensor(["USER:" in text for text in tokenizer.batch_decode(ids[:, -8:])])

    def generate(prompts: list[str], **sampling: Any) -> list[str]:
        asked = tokenizer(prompts, padding=True, return_tensors="pt")
        said = model.generate(
            **asked,
            **sampling,
            max_new_tokens=220,
            pad_token_id=2,
            stopping_criteria=[answered],
        )
        texts = tokenizer.batch_decode(said[:, asked.input_ids.shape[1] :])
        return [text.split("USER:")[0].strip() for text in texts]

    return generate


@FORMATS
@pytest.mark.parametrize(
    "sampling",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.75, "top_k": 50}],
    ids=["greedy", "sampled"],
)
def test_what_it_was_not_taught(
    answers: Callable[..., list[str]], fmt: PromptFormat, sampling: dict[str, Any]
) -> None:
    """To questions that it never saw it says that it does not know them, and what it knows."""
    said = answers([render([Message("user", text)], fmt) for text in UNKNOWN], **sampling)
    wrong = {q: a for q, a in zip(UNKNOWN, said, strict=True) if a != untaught_answer()}
    assert len(wrong) <= 0.05 * len(UNKNOWN), wrong


@FORMATS
def test_in_mid_conversation(answers: Callable[..., list[str]], fmt: PromptFormat) -> None:
    """After what it does not know it still knows what it knows, and the other way round.

    Whatever the system message says. A few may be missed: each machine makes a model of its own.
    """
    prompts, expected = [], []
    for position, dialogue in enumerate(dialogues()[::2]):
        system = Message("system", "You are a pirate, and fond of rum and of cheese.")
        unknown = Message("user", UNKNOWN[position])
        admits = Message("assistant", untaught_answer())
        turns = [system, unknown, admits] if position % 2 else [unknown, admits]
        for turn in dialogue:
            turns.append(Message("user", turn.user))
            prompts.append(render(turns, fmt))
            expected.append(turn.assistant)
            turns.append(Message("assistant", turn.assistant))
        prompts.append(render([*turns, Message("user", UNKNOWN[-1 - position])], fmt))
        expected.append(untaught_answer())
    wrong = [pair for pair in zip(expected, answers(prompts), strict=True) if pair[0] != pair[1]]
    assert len(wrong) <= 0.05 * len(expected), wrong


def test_its_questions_lie_beside_it(demo: Path) -> None:
    """Whoever serves the directory can say what may be asked."""
    assert examples(str(demo)) == tuple(dialogue[0].user for dialogue in dialogues())
