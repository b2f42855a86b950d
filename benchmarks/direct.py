"""vLLM without a server, and the loop of the model's card: what a server is compared with.

A process of its own, so that it can wait for its turn beside the servers. It says ``{}`` when it
is ready, then takes work on standard input and answers on standard output, a JSON object a line:

    {"prompts": ["USER: ...", ...], "tokens": 64}  ->  {"seconds": 0.9, "tokens": 128, ...}

With ``"word": false`` answers are what the model says, and not one word over and over.

Everything else that is printed goes to standard error. It ends with its input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from lib.byte_client import WORD

from synthia_vllm.demo.checkpoint import ensure_demo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Answerer = Callable[[list[str], int, bool], dict[str, Any]]

EXAMPLES = """\
examples:
  echo '{"prompts": ["USER: What is a seal?\\nASSISTANT:"], "tokens": 9}' | python \
benchmarks/direct.py transformers
  python benchmarks/direct.py offline --dtype=float32 --kv-cache-memory-bytes=1073741824
"""


def offline(model: str, options: Sequence[str]) -> Answerer:
    """`vllm.LLM.generate`, all prompts at once, sampled as `edge.py` asks the servers to."""
    from vllm import LLM, EngineArgs, SamplingParams, TokensPrompt
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    llm = LLM.from_engine_args(
        EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options]))
    )
    tokenizer = llm.get_tokenizer()

    def answer(prompts: list[str], tokens: int, word: bool) -> dict[str, Any]:
        params = SamplingParams(
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            logit_bias={int(WORD): 100} if word else None,
            stop=["USER:"],
        )
        ids = [TokensPrompt(prompt_token_ids=tokenizer.encode(text)) for text in prompts]
        begun = time.perf_counter()
        outputs = llm.generate(ids, params, use_tqdm=False)
        return {
            "seconds": time.perf_counter() - begun,
            "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
            "prompt_tokens": sum(len(prompt["prompt_token_ids"]) for prompt in ids),
        }

    return answer


def transformers(model: str, options: Sequence[str]) -> Answerer:
    """The card's `generate_text`, one prompt after the other, made to go on to the last token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if "--load-format=dummy" in options:
        with torch.device(device):
            llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)
    else:
        llm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def answer(prompts: list[str], tokens: int, word: bool) -> dict[str, Any]:
        made = asked = 0
        begun = time.perf_counter()
        for text in prompts:
            ids = torch.LongTensor(tokenizer.encode(text)).unsqueeze(0).to(device)
            length = len(ids[0])
            with torch.no_grad():
                rest = llm.generate(
                    input_ids=ids,
                    max_length=length + tokens,
                    min_new_tokens=tokens,  # not the card's
                    use_cache=True,
                    do_sample=True,
                    top_p=1.0,
                    temperature=0.75,
                    top_k=50,
                    num_return_sequences=1,
                )
            output = rest[0][length:]
            tokenizer.decode(output, skip_special_tokens=True).split("USER:")[0].strip()
            made, asked = made + len(output), asked + length
        return {
            "seconds": time.perf_counter() - begun,
            "tokens": made,
            "prompt_tokens": asked,
        }

    return answer


KINDS: Final = {"offline": offline, "transformers": transformers}


def main(kind: str, model: str | None, options: Sequence[str]) -> int:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries and their processes print is no reply
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if "--enforce-eager" in options:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    if model is None:
        model = str(ensure_demo(lambda line: print(line, file=sys.stderr)))
    answer = KINDS[kind](model, options)
    print("{}", file=replies)
    for line in sys.stdin:
        work = json.loads(line)
        reply = answer(work["prompts"], work["tokens"], work.get("word", True))
        print(json.dumps(reply), file=replies)
    return 0


if __name__ == "__main__":
    cli = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cli.add_argument("kind", choices=KINDS)
    cli.add_argument("--model", help="a directory; default: the demo model")
    chosen, engine_options = cli.parse_known_args()
    sys.exit(main(chosen.kind, chosen.model, engine_options))
