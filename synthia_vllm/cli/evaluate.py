"""`synthia-vllm eval`: the model card's table, filled by the LM Evaluation Harness.

The harness asks a running server for log-probabilities of raw prompts; nothing of the model is
loaded here. What it has done is kept, so that a run that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.cli.chat import add_url, explain, say
from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The Open LLM Leaderboard's tasks and numbers of examples, which are the card's.
_CARD: Final = ("arc_challenge:25", "hellaswag:10", "mmlu:5", "truthfulqa_mc2:0")
# What stands for a task, if it reports several: what the card names first.
_METRICS: Final = ("acc_norm", "acc", "exact_match")
# Prompts of the four tasks are below; servers let prompts be scored up to a limit.
_MAX_LENGTH: Final = 4096

_EXAMPLES: Final = f"""\
examples:
  synthia-vllm eval                                the card's four tasks, hours without a GPU
  synthia-vllm eval --limit 20 --tasks arc_challenge:25     a try: is all in place?
  synthia-vllm eval --url http://gpu-box:8000/v1 --output results/synthia

A task is a name of the harness's and, behind a colon, the number of examples in front of each
question. The default is the Open LLM Leaderboard's: {", ".join(_CARD)}.
The harness fetches the tasks' data; with HF_HUB_OFFLINE=1 it uses what was fetched before.
What was done is kept in the --output directory, and done again only there where it is missing.
Needs the extra `eval`: pip install 'synthia-vllm[eval]'. An API key is read from OPENAI_API_KEY.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = "Run benchmarks of the LM Evaluation Harness on a running server."
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_url(parser)
    parser.add_argument("--model", metavar="NAME", help="default: the first the server lists")
    parser.add_argument(
        "--tasks", nargs="+", default=_CARD, metavar="TASK[:SHOTS]", help="default: the card's"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation"), metavar="DIR", help="default %(default)s"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only N questions of each task")
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests at a time (default 16)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="longest prompt; longer ones lose their beginning (default: the context, to "
        f"{_MAX_LENGTH})",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="tokenize here with these files of transformers' (default: ask the server)",
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="prompts without the beginning-of-text token, as in the Leaderboard's harness of 2023;"
        " default: with it, as in the harness's own in-process models of today",
    )
    parser.add_argument(
        "--include-path", metavar="DIR", help="also take tasks that are described in this directory"
    )


def run(args: argparse.Namespace) -> int:
    """Run the tasks that are not done; print the table. Raises `StartupError`."""
    try:
        import lm_eval
    except ImportError:
        raise StartupError(
            "The LM Evaluation Harness is not installed: pip install 'synthia-vllm[eval]'."
        ) from None
    tasks = [_task(text) for text in args.tasks]
    server = _server(args.url, args.model)
    about = {
        "model": server["model"],
        "root": server["root"],
        "limit": args.limit,
        "bos": not args.no_bos,
    }
    _claim(args.output, about)
    done = []
    for number, (name, shots) in enumerate(tasks, 1):
        file = args.output / f"{name}-{shots}.json"
        if file.exists():
            say(f"[{number}/{len(tasks)}] {name}, {shots} examples: done before, in {file}")
        else:
            say(f"[{number}/{len(tasks)}] {name}, {shots} examples")
            result = _evaluate(name, shots, server, args)
            file.write_text(json.dumps(result, indent=2) + "\n")
        done.append(json.loads(file.read_text()))
    report = {
        "model": server["model"],
        "harness": lm_eval.__version__,
        "server": server["versions"],
        "limit": args.limit,
        "bos": not args.no_bos,
        "tasks": done,
        "average": sum(task["value"] for task in done) / len(done),
    }
    table = _table(report)
    (args.output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.output / "results.md").write_text(table)
    print(table, end="")
    return 0


def _task(text: str) -> tuple[str, int]:
    name, _, shots = text.partition(":")
    if not name or not (shots or "0").isdigit():
        raise StartupError(f"{text!r} is not like arc_challenge:25.")
    return name, int(shots or 0)


def _server(url: str, model: str | None) -> dict[str, Any]:
    """What the server at `url` serves. Raises `StartupError`."""
    import openai

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        try:
            listed = client.models.list().data
            versions: Any = client.get(url.removesuffix("/v1") + "/version", cast_to=object)
        except openai.APIError as error:
            raise StartupError(explain(error, url)) from None
    cards = {card.id: card.model_dump() for card in listed}
    if model is None:
        model = next(iter(cards), "")
    if model not in cards:
        raise StartupError(f"{url} does not serve {model!r}, but: {', '.join(cards)}.")
    context = cards[model].get("max_model_len")
    return {
        "model": model,
        "root": cards[model].get("root"),
        "context": context,
        "versions": {"synthia-vllm": versions.pop("version", "?"), **versions},
    }


def _claim(directory: Path, about: Mapping[str, Any]) -> None:
    """Make `directory` this evaluation's. Raises `StartupError` if it is another's."""
    note = directory / "evaluation.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            note.write_text(json.dumps(about, indent=2) + "\n")
        found = json.loads(note.read_text())
    except (OSError, ValueError) as error:
        raise StartupError(f"{directory} cannot be used for results: {error}.") from error
    if found != about:
        raise StartupError(
            f"{directory} holds another evaluation ({found}, and this is {dict(about)}). "
            "Name another directory with --output."
        )


def _evaluate(
    name: str, shots: int, server: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Have the harness run one task; its result. Raises `StartupError`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    model = harness_model(
        args.url,
        server["model"],
        bos=not args.no_bos,
        tokenizer=args.tokenizer,
        num_concurrent=args.concurrency,
        max_length=args.max_length or min(server["context"] or _MAX_LENGTH, _MAX_LENGTH),
    )
    try:
        found = simple_evaluate(
            model=model,
            tasks=[name],
            num_fewshot=shots,
            limit=args.limit,
            use_cache=str(args.output / "requests"),
            task_manager=TaskManager(include_path=args.include_path),
            log_samples=False,
            bootstrap_iters=1000,
        )
    except KeyError as error:
        raise StartupError(f"The harness knows no task {name!r} ({error}).") from error
    results = found["results"][name]
    metric, key = _metric(results)
    return {
        "task": name,
        "shots": shots,
        "metric": metric,
        "value": results[key],
        "stderr": results.get(key.replace(",", "_stderr,")),
        "version": found["versions"].get(name),
        "all": {k: v for k, v in results.items() if isinstance(v, int | float)},
    }


def harness_model(
    url: str, model: str, *, bos: bool = True, tokenizer: str | None = None, **options: Any
) -> Any:
    """The harness's own model for servers; `options` are its parameters.

    But that with `bos` a prompt begins with that token, as with the harness's in-process models,
    and that no text is tokenised twice in a row: the server is asked for each.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class Served(LocalCompletionsAPI):  # type: ignore[misc]
        def tok_encode(
            self,
            string: str | list[str],
            left_truncate_len: int | None = None,
            add_special_tokens: bool | None = None,
            **more: Any,
        ) -> Any:
            if not isinstance(string, str):
                return [
                    self.tok_encode(each, left_truncate_len, add_special_tokens, **more)
                    for each in string
                ]
            wanted = bos if add_special_tokens is None else add_special_tokens
            ids = list(self._ids_of(string))
            if wanted and ids[:1] != self._bos:
                ids = [*self._bos, *ids]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        @lru_cache(maxsize=1024)  # noqa: B019  # as many as the questions of one model
        def _ids_of(self, text: str) -> list[int]:
            found: list[int] = super().tok_encode(text, add_special_tokens=False)
            return found

        @cached_property
        def _bos(self) -> list[int]:
            return [self.tokenizer.bos_token_id]

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    backend = {"tokenizer_backend": "remote", "auth_token": key}
    if tokenizer is not None:
        backend = {"tokenizer_backend": "huggingface", "tokenizer": tokenizer}
    return Served(
        model=model,
        base_url=url.rstrip("/") + "/completions",
        add_bos_token=bos,
        max_retries=5,
        **backend,
        **options,
    )


def _metric(results: Mapping[str, Any]) -> tuple[str, str]:
    """The metric that stands for the task, and its key: the harness writes ``metric,filter``."""
    keys = [key for key, value in results.items() if "," in key and isinstance(value, float)]
    for metric in _METRICS:
        for key in keys:
            if key.startswith(f"{metric},"):
                return metric, key
    return keys[0].split(",")[0], keys[0]


def _table(report: Mapping[str, Any]) -> str:
    """The card's table."""
    rows: list[Sequence[object]] = [
        (task["task"], task["shots"], task["metric"], _shown(task)) for task in report["tasks"]
    ]
    rows.append(("**Average**", "", "", f"**{report['average']:.4f}**"))
    lines = ["| Task | Examples | Metric | Value |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    below = ", ".join(f"{name} {version}" for name, version in report["server"].items())
    lines += ["", f"{report['model']}; lm-eval {report['harness']}; server: {below}."]
    if not report["bos"]:
        lines.append("Prompts without the beginning-of-text token.")
    if report["limit"]:
        lines.append(f"Only {report['limit']} questions of each task: a try, not a result.")
    return "\n".join(lines) + "\n"


def _shown(task: Mapping[str, Any]) -> str:
    error = task["stderr"]
    return f"{task['value']:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
