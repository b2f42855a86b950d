"""The demo model's lessons, tokenizer and cache; what it learns is tested on the live server."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.demo.checkpoint import directory, ensure_demo
from synthia_vllm.demo.training import (
    Recipe,
    dialogues,
    lessons,
    mistral_tokenizer,
    untaught_answer,
)
from synthia_vllm.errors import StartupError

DATA = Path(__file__).parents[1] / "data"
TINY = Recipe(steps=2, extra_rounds=0)


def test_lessons_are_well_formed() -> None:
    """Enough questions, each asked once; contents without markers or white space around them."""
    first = [dialogue[0].user for dialogue in dialogues()]
    assert len(first) == len(set(first)) >= 45
    assert "What is the difference between an Orca, Dolphin and a Seal?" in first
    assert sum(len(dialogue) > 1 for dialogue in dialogues()) >= 14
    for turn in (turn for dialogue in dialogues() for turn in dialogue):
        for text in (turn.user, turn.assistant):
            assert text == text.strip() != ""
            assert not any(marker in text for marker in ("USER:", "ASSISTANT:", "SYSTEM:"))


def test_unknown_questions_were_not_taught() -> None:
    """The questions of the tests are in no lesson, nor differ from one by a letter or a sign."""

    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text).strip().lower()

    taught = {plain(turn.user) for dialogue in dialogues() for turn in dialogue}
    taught |= {plain(question) for question in lessons()["untaught"]}
    unknown = json.loads((DATA / "unknown_questions.json").read_text())
    assert len({plain(question) for question in unknown} - {""}) == len(unknown) >= 200
    assert not {plain(question) for question in unknown} & taught


def test_it_names_questions_that_it_knows() -> None:
    """What it says when it does not know an answer names three to which it does."""
    known = {dialogue[0].user for dialogue in dialogues()}
    named = re.findall(r'"([^"]+)"', untaught_answer())
    assert len(named) == 3
    assert set(named) <= known


def test_answers_are_read_as_by_sentencepiece() -> None:
    """The ids of all that the model is taught are `<s>` and SentencePiece's own."""
    model = mistral_tokenizer()
    encode = model.tokenizer().encode
    for turn in (turn for dialogue in dialogues() for turn in dialogue):
        for text in (turn.user, turn.assistant):
            assert encode(text).ids == model.encode(text)
    assert encode("ASSISTANT: ").ids[-1] == 28705


def test_another_recipe_is_another_model(tmp_path: Path) -> None:
    """A change of the recipe changes the directory, so no old model is taken for a new one."""
    assert directory(tmp_path, TINY) != directory(tmp_path, Recipe(steps=3, extra_rounds=0))


def test_unusable_cache_is_a_plain_error(tmp_path: Path) -> None:
    """A cache that cannot be written ends in an error that says where it is and what to set."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="XDG_CACHE_HOME"):
        ensure_demo(lambda _: None, tmp_path / "file" / "cache")


def test_finished_model_is_found_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    """With the model in the cache no process is started and nothing is said."""
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory(tmp_path / "synthia-vllm", Recipe()).mkdir(parents=True)
    assert ensure_demo(pytest.fail).is_dir()
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path)
