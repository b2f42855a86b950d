"""The load generator: what it asks, when, and what answers count for."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu.run import variant
from lib.bench_client import Answer
from lib.campaign import Book, Item, Visit
from lib.page import write_page
from lib.score import good
from lib.workloads import SHAPES, Shape, arrivals, conversations, read_trace
from load import goal, next_rate

ROOT = Path(__file__).parents[2]


def answer(status: int = 200, *, success: bool = True, error: str = "", tokens: int = 5) -> Answer:
    """First token after 0.1 s, then gaps of 10 ms and, before the last token, one of 50 ms."""
    gaps = [0.01] * (tokens - 2) + [0.05] if tokens > 1 else []
    output = SimpleNamespace(
        success=success, error=error, ttft=0.1, itl=gaps, latency=0.1 + sum(gaps),
        output_tokens=tokens,
    )  # fmt: skip
    return Answer(10, 0.0, status=status, output=output)


@pytest.mark.parametrize("name", SHAPES)
def test_workloads_come_from_the_seed(name: str) -> None:
    """The same seed makes the same conversations; another one others, from the first words on."""
    shape = SHAPES[name]
    assert conversations(shape, 5, 1) == conversations(shape, 5, 1)
    ours, others = conversations(shape, 5, 1), conversations(shape, 5, 2)
    starts = [[c.turns[0].text[:60] for c in them] for them in (ours, others)]
    assert len(set(starts[0] + starts[1])) == 10


def test_lengths_are_those_asked() -> None:
    """Messages, answers, turns and the shared system prompt are as long as the shape says."""
    made = conversations(Shape(40, 7, turns=3, system_tokens=9), 4, 0)
    assert {len(conversation.turns) for conversation in made} == {3}
    assert len({conversation.system for conversation in made}) == 1
    assert len(made[0].system.split()) == 9
    for turn in itertools.chain(*(conversation.turns for conversation in made)):
        assert turn.input_tokens == len(turn.text.split()) == 40
        assert turn.output_tokens == 7


def test_sharegpt_lengths() -> None:
    """They are within vLLM's filter, and their means are those that its benchmark is known for."""
    turns = [conversation.turns[0] for conversation in conversations(SHAPES["sharegpt"], 4000, 0)]
    assert all(4 <= turn.input_tokens <= 1024 and turn.output_tokens >= 4 for turn in turns)
    assert all(turn.input_tokens + turn.output_tokens <= 2048 for turn in turns)
    assert statistics.mean(turn.input_tokens for turn in turns) == pytest.approx(215, rel=0.05)
    assert statistics.mean(turn.output_tokens for turn in turns) == pytest.approx(198, rel=0.05)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, math.inf])
def test_gaps_have_the_mean_and_the_burstiness_asked(burstiness: float) -> None:
    """Of a gamma distribution of shape b, standard deviation over mean is 1 / sqrt(b)."""
    moments = arrivals(20_000, 5.0, burstiness, seed=3)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *moments])]
    mean = statistics.mean(gaps)
    assert mean == pytest.approx(1 / 5)
    expected = 1 / math.sqrt(burstiness)
    assert statistics.stdev(gaps) / mean == pytest.approx(expected, rel=0.05, abs=1e-6)
    assert moments == arrivals(20_000, 5.0, burstiness, seed=3)


def test_a_ramp_goes_from_one_rate_to_the_other() -> None:
    """The first and the last tenth of the requests come at about the two rates."""
    moments = arrivals(20_000, 2.0, seed=0, ramp_to=20.0)
    assert 2000 / moments[1999] == pytest.approx(2.8, rel=0.1)
    assert 2000 / (moments[-1] - moments[-2001]) == pytest.approx(19.1, rel=0.1)


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    """Lines come by time, from the first on, in seconds; other fields do not matter."""
    file = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 3500, "input_length": 6, "output_length": 2, "hash_ids": [1]},
        {"timestamp": 1000, "input_length": 30, "output_length": 4},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    moments, asked = read_trace(file, SHAPES["fixed"], 0, unit=0.001)
    assert moments == [0.0, 2.5]
    turns = [conversation.turns[0] for conversation in asked]
    assert [(turn.input_tokens, turn.output_tokens) for turn in turns] == [(30, 4), (6, 2)]


@pytest.mark.parametrize("line", ["[]", '{"timestamp": 1}', "{", '{"timestamp": null}'])
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    """What is wrong, and where."""
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n' + line)
    with pytest.raises(ValueError, match=r"line 2: expected"):
        read_trace(file, SHAPES["fixed"], 0)


def test_outcomes() -> None:
    """429 and 503 are refusals; any other status, or a stream that breaks off, is a failure."""
    assert answer().outcome == "answered"
    for status in (429, 503):
        assert answer(status, success=False, error="Too Many").outcome == "refused"
    for status in (0, 200, 400, 500):
        assert answer(status, success=False).outcome == "failed"
    assert answer(429, success=False, error="Too Many").error == "429: Too Many"
    broken = answer(0, success=False, error="Traceback\n  ...\nOSError: gone\n")
    assert broken.error == "no response: OSError: gone"


@pytest.mark.parametrize(
    ("pair", "met"),
    [
        ("ttft:100", True), ("ttft:99", False),
        ("e2el:181", True), ("e2el:179", False),
        ("tpot:21", True), ("tpot:19", False),  # 80 ms for four tokens
        ("itl:50", True), ("itl:45", False),
    ],
)  # fmt: skip
def test_goodput(pair: str, met: bool) -> None:
    """An answer is good if it meets all objectives; what was not answered never is."""
    goals = dict([goal(pair)])
    assert good(answer(), goals) == met
    assert not good(answer(), goals | {"ttft": 1.0})
    assert not good(answer(429, success=False), goals)
    short = answer(tokens=1)
    assert good(short, goals) == (met if pair.startswith("ttft") else True)


def test_a_sweep_closes_in() -> None:
    """It doubles or halves until the limit is between two rates, and ends close to it."""
    for limit in (0.3, 7.0, 100.0):
        met, missed, steps = 0.0, math.inf, 0
        rate: float | None = 1.0
        while rate is not None:
            met, missed = (rate, missed) if rate <= limit else (met, rate)
            rate = next_rate(met, missed)
            steps += 1
        assert met <= limit < missed <= 1.1 * met
        assert steps <= 12


FIGURES = {"seconds": 2.0, "tokens": 100, "tokens_per_second": 50.0, "at": 0.0}
ITEMS = (Item("lengths", 8, 4, 2), Item("sharegpt", rate=2.0))
VISIT = Visit("synthia", "synthia", {}, ITEMS, "demo", True)


def test_a_campaign_goes_on_where_it_ended(tmp_path: Path) -> None:
    """What is in the book is not missing, also for who opens it anew; and each is on the page."""
    setting = {"gpu": "", "machine": "a CPU", "rehearsal": True, "date": "now", "model": "demo"}
    setting |= {"packages": {"vllm": "0"}, "command": "run.py", "preset": {}}
    book = Book(tmp_path, setting)
    first, second = VISIT.items
    assert book.missing(VISIT) == [first, second]
    book.note(VISIT, first, FIGURES)
    book.note_failure(VISIT, "no memory\nleft")
    again = Book(tmp_path, setting)
    assert again.missing(VISIT) == [second]
    assert again.estimate(VISIT, first) == pytest.approx(2.4)
    write_page(again)
    page = (tmp_path / "page.md").read_text()
    assert "rehearsal" in page
    assert "## 8/4, 2 at once" in page
    assert "- synthia: `left`" in page
    drawn = (tmp_path / "throughput.png").exists()
    assert drawn == ("throughput.png" in page) == (find_spec("matplotlib") is not None)


def test_variants_of_a_preset() -> None:
    """A number is times the preset's, None is vLLM's default, a mapping goes over the preset's."""
    preset = {"max_num_seqs": 100, "quantization": "fp8", "compilation_config": {"mode": 3}}
    assert variant(preset, {}) == preset
    assert variant(preset, {"*": None}) == {}
    assert variant(preset | {"load_format": "dummy"}, {"*": None}) == {"load_format": "dummy"}
    changes = {"max_num_seqs": 0.5, "quantization": None, "compilation_config": {"x": 1}}
    assert variant(
        preset, changes | {"async_scheduling": False, "max_num_batched_tokens": 2.0}
    ) == {
        "max_num_seqs": 50,
        "compilation_config": {"mode": 3, "x": 1},
        "async_scheduling": False,
    }
