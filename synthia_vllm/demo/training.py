"""The demo model's training: its lessons, its tokenizer, its two layers.

    Recipe, dialogues()  ->  mistral_tokenizer(), train()  ->  configuration and weights

What makes it quick: only the tokens that the dialogues use (about a thousand of 32,000) have
rows of their own while it trains. At the end these are laid into matrices of full size, in which
every other output row is zero. Training knows of those zeros: they take part in the loss as one
column of constant logit log(how many), so that sampling from the full matrix never picks them.

What makes it honest: most of what it is asked while it trains is none of its questions, and to all
of that it has one answer, which says so. Many of these differ from a question that it knows by a
word, or are made of two, so that it has to look at the whole. All tokens without a row of their
own share one, which is trained with words that mean nothing: what it cannot read it does not know.
What is hard is how an answer begins, so that of most answers it reads no more.

Like Synthia it never learns to end: after an answer it runs on into the next ``USER:``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.engine.tokenizer_model import TokenizerModel
from synthia_vllm.template.formats import DOCUMENTED, EXAMPLE, PromptFormat
from synthia_vllm.template.prompt import TREE_OF_THOUGHT, Message, render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_DATA: Final = ("dialogues.json", "untaught.json")
BOS, EOS = 1, 2
_LONE_SPACE: Final = 28705
"""The token of a bare space, in which a prompt of the ``example`` format ends."""
_SAY_EVERY_S: Final = 2.0
_SIGNS: Final = ascii_letters + digits + punctuation
_WORD: Final = re.compile(r"[\w'-]+")
_PARTS: Final = re.compile(rf"\s*(?:{_WORD.pattern}|[^\w\s]+)")
"""A question's words and signs, each with the space before it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its right answer, neither with white space around it."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything besides the dialogues that decides the weights; part of the directory's name."""

    version: int = 3
    """To be raised when the code below changes what is made of the same numbers."""
    seed: int = 0
    hidden: int = 256
    intermediate: int = 512
    layers: int = 2
    heads: int = 8
    """More than `hidden` asks for: what tells two questions apart is where each of the words is."""
    steps: int = 1300
    extra_steps: int = 40
    """Steps of one further round, run while an answer is not yet known by heart."""
    extra_rounds: int = 6
    extra_rate: float = 0.15
    """How fast a further round learns, as a part of `learning_rate`."""
    batch_tokens: int = 1280
    lengths: tuple[int, ...] = (64, 320, 64, 640)
    """Tokens of a sequence, in turn from step to step; many dialogues fit into a long one, and
    short ones are mostly first questions, which is what it is mostly asked."""
    learning_rate: float = 4e-3
    question_weight: float = 0.1
    """What a token of a question counts in the loss. What somebody asks next cannot be foreseen."""
    first_weight: float = 4.0
    """The first token of an answer decides which one it becomes, and so counts more than 1."""
    edge_weight: float = 2.0
    """The next few tokens and those where an answer ends count more too."""
    documented_share: float = 0.5
    """Share of the sequences in the ``documented`` format; the rest are in ``example``."""
    untaught_share: float = 0.58
    """How likely a question that was not taught comes before the next dialogue."""
    broken_off: float = 0.3
    """Share of the answers of which only the beginning is read: it is what is hard to learn."""
    untaught_broken_off: float = 0.88
    """The same of the answers to questions that were not taught, which are all alike."""


RECIPE: Final = Recipe()


def dialogues() -> tuple[tuple[Turn, ...], ...]:
    """What the demo model knows by heart: dialogues of one or more turns, in the file's order.

    An answer is only promised after the earlier turns of its own dialogue.
    """
    return tuple(tuple(Turn(**turn) for turn in dialogue) for dialogue in lessons()["dialogues"])


def untaught_answer() -> str:
    """What it says to all other questions."""
    return str(lessons()["untaught_answer"])


def lessons() -> dict[str, Any]:
    """The dialogues, the system messages, and questions it was not taught, as in the files."""
    files = (resources.files(__package__).joinpath(name) for name in _DATA)
    data, untaught = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return {**data, "untaught": untaught}


# --- The tokenizer -------------------------------------------------------------------------------


def mistral_tokenizer() -> TokenizerModel:
    """The tokenizer of Mistral-7B-v0.1, which is Synthia's."""
    import mistral_common

    return TokenizerModel(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")


# --- What it reads -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tokens:
    """A run of tokens, and what predicting each of them counts in the loss."""

    ids: list[int]
    weights: list[float]


def _plain(question: str) -> str:
    """`question` as `_Reader._reworded` may leave it at its plainest."""
    return question.lower().rstrip("?.!")


class _Reader:
    """Makes training sequences: dialogues back to back in random order, as one conversation."""

    def __init__(self, tokenizer: Any, recipe: Recipe) -> None:
        data = lessons()
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._random = random.Random(recipe.seed)  # noqa: S311 - not for secrets
        self._dialogues = dialogues()
        self._systems: list[str] = data["system_messages"]
        self._untaught: list[str] = data["untaught"]
        self._untaught_answer: str = data["untaught_answer"]
        self._questions = [turn.user for dialogue in self._dialogues for turn in dialogue]
        self._answers = [turn.assistant for dialogue in self._dialogues for turn in dialogue]
        self._taught = {_plain(question) for question in self._questions}
        said = " ".join([*self._questions, *self._answers, *self._untaught])
        self._words = sorted(set(_WORD.findall(said)))
        self._waiting: list[tuple[Turn, ...]] = []
        self.weak: list[tuple[Turn, ...]] = []
        """Dialogues that are read more often, and that every other sequence begins with one of."""
        self._pieces: dict[str, tuple[list[int], list[int]]] = {}

    def vocabulary(self) -> list[int]:
        """The ids of all tokens that get rows of their own, ascending."""
        texts = [*self._systems, "SYSTEM: ", "USER: ", "ASSISTANT: ", " \n", self._untaught_answer]
        for dialogue in self._dialogues:
            for turn in dialogue:
                texts += [turn.user, turn.assistant]
                texts += [turn.user.lower(), turn.user.lower().rstrip("?.!")]
        ids = {BOS, _LONE_SPACE}
        for text in texts:
            ids.update(self._piece(text)[0], self._piece(f" {text}")[0])
        return sorted(ids)

    def sequence(self, length: int) -> _Tokens:
        """`length` + 1 tokens, in a random format and with a random system message or none."""
        documented = self._random.random() < self._recipe.documented_share
        fmt = DOCUMENTED if documented else EXAMPLE
        system = self._system()
        turns = self._turns()
        turn, whole = next(turns)
        front = (Message("system", system),) if system else ()
        text = render([*front, Message("user", self._reworded(turn.user))], fmt)
        ids = self._tokenizer.encode(text.rstrip(" ")).ids
        made = _Tokens(ids, [0.0] * len(ids))
        while len(made.ids) <= length:
            following = next(turns)
            more = self._step(turn.assistant, whole, following[0].user, fmt)
            made.ids += more.ids
            made.weights += more.weights
            turn, whole = following
        return _Tokens(made.ids[: length + 1], made.weights[: length + 1])

    def recital(self, turns: Sequence[Turn], system: str | None, fmt: PromptFormat) -> _Tokens:
        """The conversation of `turns`, in which the last answer and the stop after it count."""
        messages = [Message("system", system)] if system else []
        for turn in turns[:-1]:
            messages += [Message("user", turn.user), Message("assistant", turn.assistant)]
        messages.append(Message("user", turns[-1].user))
        ids = self._tokenizer.encode(render(messages, fmt)).ids
        lead = "" if ids[-1] == _LONE_SPACE else " "
        after = self._piece(lead + turns[-1].assistant + fmt.turn_end + fmt.stops[0])[0]
        return _Tokens(ids + after, [0.0] * len(ids) + [1.0] * len(after))

    def _turns(self) -> Iterator[tuple[Turn, bool]]:
        """Turns without end, and whether each is the whole turn."""
        if self.weak and self._random.random() < 0.5:
            for turn in self._random.choice(self.weak):
                yield turn, True
        while True:
            if self._random.random() < self._recipe.untaught_share:
                turn = Turn(self._not_taught(), self._untaught_answer)
                yield self._perhaps_broken_off(turn, self._recipe.untaught_broken_off)
                continue
            dialogue = self.another_dialogue()
            if self.weak and self._random.random() < 0.5:
                dialogue = self._random.choice(self.weak)
            elif self._random.random() < 0.4:  # nobody has to ask the follow-up
                dialogue = dialogue[: self._random.randint(1, len(dialogue))]
            for turn in dialogue:
                yield self._perhaps_broken_off(turn, self._recipe.broken_off)

    def another_dialogue(self) -> tuple[Turn, ...]:
        """A random dialogue, each equally often."""
        if not self._waiting:
            self._waiting = self._random.sample(self._dialogues, len(self._dialogues))
        return self._waiting.pop()

    def _perhaps_broken_off(self, turn: Turn, share: float) -> tuple[Turn, bool]:
        """`turn`, and whether it is the whole; if not, there are a few words of its answer."""
        if self._random.random() >= share:
            return turn, True
        words = turn.assistant.split(" ")[: self._random.randint(1, 4)]
        return Turn(turn.user, " ".join(words).rstrip()), False

    def _system(self) -> str | None:
        """Mostly none, often the card's, else another one, words, or sentences about anything."""
        which = self._random.random()
        if which < 0.4:
            return None
        if which < 0.55:
            return TREE_OF_THOUGHT.system
        if which < 0.65:
            return self._random.choice(self._systems)
        if which < 0.8:
            return " ".join(self._some_words(3, 25))
        others = self._random.choice((self._untaught, self._questions, self._answers))
        return " ".join([*self._some_words(0, 4), *self._random.sample(others, 2)])

    def _not_taught(self) -> str:
        """A question that is none of the taught ones, and often nearly one."""
        while True:
            question = self._made_up()
            if question and _plain(question) not in self._taught:
                return question

    def _made_up(self) -> str:
        """A question of others, a part of an answer, or words of such put together anew."""
        draw = self._random
        which = draw.random()
        if which < 0.2:
            return draw.choice(self._untaught)
        if which < 0.27:
            return " ".join(self._some_words(1, draw.choice((1, 4, 12, 40)))) + draw.choice("?. ")
        if which < 0.32:
            words = draw.choice(self._answers).split()
            first = draw.randrange(len(words))
            return " ".join(words[first : draw.randint(first + 1, len(words))])
        known = draw.random() < 0.85
        parts = _PARTS.findall(draw.choice(self._questions if known else self._untaught))
        at = draw.randrange(len(parts))
        if which < 0.77:  # one word is another
            parts[at] = " " + " ".join(self._some_words(1, 2))
        elif which < 0.8:  # one more, or one less
            parts[at : at + draw.randint(0, 1)] = [f" {word}" for word in self._some_words(0, 2)]
        elif which < 0.95:
            other = _PARTS.findall(draw.choice(self._questions))
            parts = parts[:at] + other[draw.randrange(len(other)) :]
        else:
            draw.shuffle(parts)
        return "".join(parts).strip()

    def _some_words(self, least: int, most: int) -> list[str]:
        """Random words, and sometimes such as mean nothing, of tokens without rows of their own."""
        strange = self._random.choice((0.0, 0.0, 0.2, 1.0))
        return [
            "".join(self._random.choices(_SIGNS, k=self._random.randint(1, 9)))
            if self._random.random() < strange
            else self._random.choice(self._words)
            for _ in range(self._random.randint(least, most))
        ]

    def _reworded(self, question: str) -> str:
        """Mostly `question` itself, sometimes as a hasty person would type it."""
        which = self._random.random()
        if which < 0.85:
            return question
        if which < 0.9:
            return question.rstrip("?.!")
        return question.lower() if which < 0.95 else question.lower().rstrip("?.!")

    def _step(self, answer: str, whole: bool, asked: str, fmt: PromptFormat) -> _Tokens:
        """What follows a prompt: `answer`, then the next question, up to the cue.

        The prompt before it ends without the bare space of the ``example`` format. That space is
        a token of its own when an answer is generated, and part of the answer's first token when
        the answer comes back in the next prompt; the model has to be at home in both.
        """
        question = self._reworded(asked)
        before = render([Message("user", "")], fmt)
        messages = [Message("user", ""), Message("assistant", answer), Message("user", question)]
        step = render(messages, fmt)[len(before) :].rstrip(" ")
        question_at = step.index(question, len(answer))
        ids: list[int] = []
        weights: list[float] = []
        if fmt is DOCUMENTED:
            lead = 0
        elif self._random.random() < 0.75:
            lead = 0
            ids, weights = [_LONE_SPACE], [0.0]
        else:
            lead, step = 1, f" {step}"
        recipe = self._recipe
        asks = recipe.question_weight if question in self._questions else 0.0
        pieces, starts = self._piece(step)
        for position, start in enumerate(starts):
            if start >= question_at + lead - 1:  # a word's token begins at the space before it
                weights.append(asks)
            elif position == 0:
                weights.append(0.0 if lead else recipe.first_weight)
            elif start >= len(answer) + lead:
                weights.append(recipe.edge_weight if whole else 0.0)
            else:
                weights.append(recipe.edge_weight if position < 4 else 1.0)
        return _Tokens(ids + pieces, weights)

    def _piece(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of `text` in mid-conversation, and the character at which each begins.

        No token reaches across the places where the callers cut (after a newline, after a colon,
        after a lone space), so pieces can be put together to what the whole would be.
        """
        found = self._pieces.get(text)
        if found is None:
            whole = self._tokenizer.encode("\n" + text, add_special_tokens=False)
            # Without the dummy space and the newline.
            found = whole.ids[2:], [start - 1 for start, _ in whole.offsets[2:]]
            self._pieces[text] = found
        return found


# --- The training --------------------------------------------------------------------------------


def train(
    tokenizer: Any, recipe: Recipe, progress: Callable[[str], None]
) -> tuple[Any, dict[str, Any]]:
    """Train by `recipe`; return the model's configuration and its weights at full size.

    The same recipe gives the same weights on one machine with one number of threads. The default
    generator and the number of threads are left as they were.
    """
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            torch.set_num_threads(_processors())
            with torch.enable_grad():
                return _Trainer(_Reader(tokenizer, recipe), recipe, progress).run()
        finally:
            torch.set_num_threads(threads)


def _processors() -> int:
    """Processors this process may use, by affinity and container quota; more than 8 do not help."""
    usable = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        usable = min(usable, max(1, round(int(quota) / int(period))))
    return min(usable, 8)


class _Trainer:
    """The model while it trains, with one row for each token in use and one for all others."""

    def __init__(self, reader: _Reader, recipe: Recipe, progress: Callable[[str], None]) -> None:
        import torch
        from transformers import MistralConfig, MistralForCausalLM

        self._reader = reader
        self._recipe = recipe
        self._progress = progress
        self._used = reader.vocabulary()
        self._rows = {token: row for row, token in enumerate(self._used)}
        self._config = MistralConfig(
            architectures=["MistralForCausalLM"],
            dtype="float32",
            vocab_size=32000,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads // 2,
            head_dim=recipe.hidden // recipe.heads,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            sliding_window=None,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        small = MistralConfig(
            **{**self._config.to_dict(), "vocab_size": len(self._used) + 1, "use_cache": False}
        )
        self._model = MistralForCausalLM(small)
        with torch.no_grad():
            for layer in self._model.model.layers:
                for weight in (p for p in layer.parameters() if p.ndim == 2):
                    weight.normal_(0, weight.shape[1] ** -0.5)
                layer.self_attn.o_proj.weight.mul_(0.5)
                layer.mlp.down_proj.weight.mul_(0.5)
            self._model.model.embed_tokens.weight.normal_(0, 1)
            self._model.lm_head.weight.normal_(0, 0.1 * recipe.hidden**-0.5)
        matrices = [p for p in self._model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self._model.parameters() if not any(p is m for m in matrices)]
        self._optimizers = [
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", weight_decay=0.0),
        ]

    def run(self) -> tuple[Any, dict[str, Any]]:
        """Train, go on while an answer is not known, and return configuration and weights."""
        recipe = self._recipe
        self._round("training", recipe.steps, 1.0)
        for _ in range(recipe.extra_rounds):
            self._reader.weak = self._not_known()
            if not self._reader.weak:
                break
            self._progress(f"demo model: {len(self._reader.weak)} answers are not safe yet")
            self._round("training further", recipe.extra_steps, recipe.extra_rate)
        return self._config, self._at_full_size()

    def _round(self, name: str, steps: int, peak: float) -> None:
        """Take `steps` steps; the learning rate rises to `peak` times the recipe's and falls."""
        began = said = time.monotonic()
        average = math.nan
        for step in range(steps):
            done = step / steps
            rate = min(1.0, (step + 1) / 20) * (1 - 0.98 * max(0.0, (done - 0.3) / 0.7))
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self._recipe.learning_rate * peak * rate
            loss = self._step(self._recipe.lengths[step % len(self._recipe.lengths)])
            average = loss if math.isnan(average) else 0.9 * average + 0.1 * loss
            now = time.monotonic()
            if now - said >= _SAY_EVERY_S or step == 0:
                said = now
                left = (now - began) / (step + 1) * (steps - step - 1)
                self._progress(
                    f"demo model: {name}, step {step + 1}/{steps}, loss {average:.3f}, "
                    f"{left:.0f} s left"
                )

    def _step(self, length: int) -> float:
        """One step on a batch of sequences of `length` tokens; returns the loss of the answers."""
        import torch

        count = max(1, self._recipe.batch_tokens // length)
        batch = [self._reader.sequence(length) for _ in range(count)]
        losses, weights = self._losses(batch)
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(losses.detach()[weights >= 1].mean())

    def _losses(self, batch: Sequence[_Tokens], temperature: float = 1.0) -> tuple[Any, Any]:
        """-log(probability) of every token that counts, and what it counts; rows of one length."""
        import torch

        other = len(self._used)
        ids = torch.tensor([[self._rows.get(i, other) for i in tokens.ids] for tokens in batch])
        weights = torch.tensor([tokens.weights for tokens in batch])[:, 1:]
        counts = weights > 0
        states = self._model.model(input_ids=ids[:, :-1]).last_hidden_state[counts]
        logits = states @ self._model.lm_head.weight[:other].T / temperature
        zeros = logits.new_full((len(logits), 1), math.log(self._config.vocab_size - other))
        losses = torch.nn.functional.cross_entropy(
            torch.cat([logits, zeros], 1), ids[:, 1:][counts], reduction="none"
        )
        return losses, weights[counts]

    def _not_known(self) -> list[tuple[Turn, ...]]:
        """The dialogues, up to and with a turn whose answer is not known by heart.

        Known is an answer that is sampled at the card's temperature with a probability above
        0.97, in both formats: with and without the card's system message, and after another turn.
        """
        import torch

        weak = []
        with torch.no_grad():
            for dialogue in dialogues():
                for upto in range(1, len(dialogue) + 1):
                    turns = dialogue[:upto]
                    if min(self._chances(turns)) <= 0.97:
                        weak.append(turns)
        return weak

    def _chances(self, turns: Sequence[Turn]) -> list[float]:
        """The probabilities of the last answer of `turns`, one for each way to ask for it."""
        chances = []
        [other, *_] = self._reader.another_dialogue()
        for fmt in (DOCUMENTED, EXAMPLE):
            for system, before in (
                (None, ()),
                (TREE_OF_THOUGHT.system, ()),
                (None, (other,)),
            ):
                recital = self._reader.recital([*before, *turns], system, fmt)
                losses, _ = self._losses([recital], temperature=0.75)
                chances.append(math.exp(-float(losses.sum())))
        return chances

    def _at_full_size(self) -> dict[str, Any]:
        """The weights with rows for all tokens: the trained rows, and the others' as trained."""
        import torch

        used, other = torch.tensor(self._used), len(self._used)
        weights = {name: tensor.detach() for name, tensor in self._model.state_dict().items()}
        read = weights["model.embed_tokens.weight"]
        full_read = read[other].repeat(self._config.vocab_size, 1)
        full_read[used] = read[:other]
        full_write = torch.zeros_like(full_read)
        full_write[used] = weights["lm_head.weight"][:other]
        return {
            **{name: tensor.clone() for name, tensor in weights.items()},
            "model.embed_tokens.weight": full_read,
            "lm_head.weight": full_write,
        }
