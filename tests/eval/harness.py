"""Run the harness on several of its models; print what each got for each sample, as JSON.

python tests/eval/harness.py [[MODEL, ARGS], ...] INCLUDE_PATH SHOTS TASK...

The MODEL `served` is that of `synthia-vllm eval`.
"""

from __future__ import annotations

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from synthia_vllm.cli.evaluate import harness_model

runs, path, shots, *tasks = sys.argv[1:]
told = []
for model, args in json.loads(runs):
    found = simple_evaluate(
        model=harness_model(**args) if model == "served" else model,
        model_args=None if model == "served" else args,
        tasks=tasks,
        num_fewshot=int(shots),
        task_manager=TaskManager(include_path=path),
        bootstrap_iters=0,
    )
    samples = {
        task: [[sample["doc_id"], sample["filtered_resps"]] for sample in found["samples"][task]]
        for task in tasks
    }
    told.append({"results": found["results"], "samples": samples})
print(json.dumps(told, default=str))
