"""What answers count for: the statistics of `vllm bench serve`, by its code and by its names.

- TTFT: from sending to the first event with a choice in it; ITL: between two such events;
- E2EL: from sending to the last of them; TPOT: (E2EL - TTFT) / (answer tokens - 1);
- refused: status 429 or 503, the server's way to say "not now"; errors: anything else that is not
  a whole answer. vLLM's `failed` is both together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lib.report import table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lib.bench_client import Answer, Run

PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0)
MEASURES: Final = ("ttft", "itl", "tpot", "e2el")


def measured(output: Any, measure: str) -> float:
    """One of `MEASURES` of an answer, in ms, as goodput looks at it.

    ITL is the gap that 99 % of the answer's gaps do not exceed; vLLM's goodput has no such thing.
    TPOT of an answer of one token is 0, as it is for vLLM.
    """
    if measure == "itl":
        return 1e3 * float(np.percentile(output.itl, 99)) if output.itl else 0.0
    if measure == "tpot":
        rest = output.output_tokens - 1
        return 1e3 * (output.latency - output.ttft) / rest if rest > 0 else 0.0
    return 1e3 * float(output.ttft if measure == "ttft" else output.latency)


def good(answer: Answer, goals: Mapping[str, float]) -> bool:
    """Whether it was answered and meets every one of `goals`, in ms by the name of the measure."""
    return answer.outcome == "answered" and all(
        measured(answer.output, measure) <= goal for measure, goal in goals.items()
    )


def summary(run: Run, goals: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of a run that is over, by the names of vLLM's result files where it has them."""
    from vllm.benchmarks.serve import calculate_metrics

    answers = run.answers
    with contextlib.redirect_stdout(io.StringIO()):  # it prints hints and errors, too
        metrics, _ = calculate_metrics(
            [], [a.output for a in answers], run.seconds, None, list(PERCENTILES), {}
        )
    named = {
        name: value
        for name, value in dataclasses.asdict(metrics).items()
        if not name.startswith("percentiles_") and name != "rtfx"
    }
    named["total_input_tokens"] = named.pop("total_input")
    named["total_output_tokens"] = named.pop("total_output")
    for measure in MEASURES:
        for share, value in getattr(metrics, f"percentiles_{measure}_ms"):
            named[f"p{share:g}_{measure}_ms"] = value
    reached = sum(good(answer, goals) for answer in answers)
    refused = Counter(a.error for a in answers if a.outcome == "refused")
    errors = Counter(a.error for a in answers if a.outcome == "failed")
    return {
        "num_prompts": len(answers),
        "duration": run.seconds,
        **named,
        "request_goodput": reached / run.seconds if goals else None,
        "good_share": reached / len(answers) if goals else None,
        "refused": refused.total(),
        "refused_by_reason": refused,
        "errors": errors.total(),
        "errors_by_reason": errors,
        "asked_input_tokens": sum(a.asked_tokens for a in answers if a.output.success),
        "sent_late_p99_ms": 1e3 * float(np.percentile([a.late for a in answers], 99)),
        "client_cpu_share": run.client_cpu / run.seconds,
    }


def report(found: Mapping[str, Any]) -> str:
    """What `summary` brought as Markdown."""
    columns = ["mean", *(f"p{share:g}" for share in PERCENTILES)]
    latencies = [["ms", *columns]]
    for measure in MEASURES:
        values = (found[f"{column}_{measure}_ms"] for column in columns)
        latencies.append([measure.upper(), *(f"{value:.1f}" for value in values)])
    names = ["duration", "num_prompts", "completed", "refused", "errors", "total_input_tokens"]
    names += ["asked_input_tokens", "total_output_tokens", "request_throughput"]
    names += ["request_goodput", "good_share", "output_throughput", "total_token_throughput"]
    names += ["sent_late_p99_ms", "client_cpu_share"]
    rest = [
        [name, f"{found[name]:.3f}" if isinstance(found[name], float) else str(found[name])]
        for name in names
        if found[name] is not None
    ]
    reasons = found["refused_by_reason"] | found["errors_by_reason"]
    lines = [f"- {times} times {reason}" for reason, times in reasons.items()]
    return "\n\n".join([table(latencies), table([["", ""], *rest]), *lines])


def report_steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """The runs of a sweep as a table in Markdown, by rate."""
    names = ["request_rate", "request_goodput", "good_share", "p99_ttft_ms", "p99_itl_ms"]
    names += ["output_throughput", "refused", "errors", "sent_late_p99_ms", "client_cpu_share"]
    rows = [
        [*(f"{step[name]:.3g}" for name in names), "yes" if step["met"] else "no"]
        for step in sorted(steps, key=lambda step: float(step["request_rate"]))
    ]
    return table([[*names, "met"], *rows])
