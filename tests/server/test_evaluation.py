"""The LM Evaluation Harness through this server, against itself on the same checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serving import running

from synthia_vllm import __version__
from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from serving import Running

HERE = Path(__file__).parents[1] / "eval"
TASKS = ("seas_choice", "seas_text")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own tasks, with their data where they say it is."""
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "seas.jsonl").write_text((HERE / "seas.jsonl").read_text())
    for task in TASKS:
        text = (HERE / f"{task}.yaml").read_text().replace("DIRECTORY", str(directory))
        (directory / f"{task}.yaml").write_text(text)
    return directory


def harness(runs: list[tuple[str, dict[str, Any]]], tasks: Path, shots: int) -> Any:
    done = subprocess.run(
        [sys.executable, HERE / "harness.py", json.dumps(runs), tasks, str(shots), *TASKS],
        capture_output=True, text=True, check=False, env=OFFLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def evaluate(*args: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "synthia_vllm.cli.main", "eval", *map(str, args)],
        capture_output=True, text=True, check=False, env=OFFLINE,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done


@pytest.mark.costly
def test_harness_agrees_with_itself(live: Running, demo: Path, tasks: Path) -> None:
    """Through the server and in process: the same log-likelihoods, texts and scores.

    With the beginning-of-text token as `synthia-vllm eval` has it, and with the harness's stock
    model for servers, which leaves it out.
    """
    hf = {"pretrained": str(demo), "dtype": "float32", "device": "cpu"}
    served = {"model": "synthia-demo", "num_concurrent": 8, "max_length": 2048}
    with_bos, ours, without, stock = harness(
        [
            ("hf", hf),
            ("served", served | {"url": f"{live.url}/v1"}),
            ("hf", hf | {"add_bos_token": False}),
            (
                "local-completions",
                served | {"base_url": f"{live.url}/v1/completions", "tokenizer_backend": "remote"},
            ),
        ],
        tasks,
        2,
    )
    assert with_bos["samples"] != without["samples"]
    _require_same(with_bos, ours)
    _require_same(without, stock)


def _require_same(inside: Any, served: Any) -> None:
    scores = 0
    choices = (found["samples"]["seas_choice"] for found in (inside, served))
    for here, there in zip(*choices, strict=True):
        assert here[0] == there[0]
        for (mine, mine_greedy), (yours, yours_greedy) in zip(here[1], there[1], strict=True):
            assert float(yours) == pytest.approx(float(mine), abs=1e-2)
            assert str(yours_greedy) == str(mine_greedy)
            scores += 1
    assert scores == 8 * 4
    assert served["samples"]["seas_text"] == inside["samples"]["seas_text"]
    for task in TASKS:
        for name, value in inside["results"][task].items():
            if isinstance(value, float):
                assert served["results"][task][name] == pytest.approx(value), (task, name)


def test_command_fills_a_table_and_goes_on(live: Running, tasks: Path, tmp_path: Path) -> None:
    """The table in Markdown and JSON; a second run does only what is missing."""
    to = tmp_path / "results"
    options = ("--url", f"{live.url}/v1", "--include-path", tasks, "--output", to)

    def asked() -> float:
        return live.value(
            "synthia_requests_total", route="/v1/completions", model="synthia-demo", status="200"
        )

    done = evaluate(*options, "--tasks", "seas_choice:1")
    assert "[1/1] seas_choice, 1 examples" in done.stderr
    report = json.loads((to / "results.json").read_text())
    [task] = report["tasks"]
    assert (task["task"], task["shots"], task["metric"]) == ("seas_choice", 1, "acc_norm")
    assert report["average"] == task["value"]
    assert report["server"]["synthia-vllm"] == __version__
    assert any(name.startswith("vllm") for name in report["server"])
    assert done.stdout == (to / "results.md").read_text()
    assert f"| seas_choice | 1 | acc_norm | {task['value']:.4f} ± " in done.stdout
    assert f"lm-eval {report['harness']}" in done.stdout

    before = asked()
    again = evaluate(*options, "--tasks", "seas_choice:1")
    assert "done before" in again.stderr
    assert again.stdout == done.stdout
    assert asked() == before
    # A run broken off inside a task: what the server answered is not asked again.
    (to / "seas_choice-1.json").unlink()
    assert evaluate(*options, "--tasks", "seas_choice:1").stdout == done.stdout
    assert asked() == before
    other = evaluate(*options, "--limit", "2", ok=False)
    assert "holds another evaluation" in other.stderr


def test_command_says_what_is_wrong(tmp_path: Path, tasks: Path) -> None:
    """No server, no such model, no such task, no task at all: words, and no traceback."""
    with running(FakeEngine()) as server:
        options = ("--url", f"{server.url}/v1", "--output", tmp_path)
        for wrong, words in (
            (("--url", "http://127.0.0.1:9/v1"), "No server can be reached"),
            ((*options, "--model", "x"), "does not serve 'x', but: synthia-demo"),
            ((*options, "--tasks", "a:b"), "is not like arc_challenge:25"),
            ((*options, "--include-path", tasks, "--tasks", "no_such_task"), "no_such_task"),
        ):
            done = evaluate(*wrong, ok=False)
            assert words in done.stderr
            assert "Traceback" not in done.stderr
