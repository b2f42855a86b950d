"""`synthia-vllm render`: show what the model would be sent for a request, by a running server."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from synthia_vllm.cli.chat import CONTROLS, add_url, explain, say
from synthia_vllm.errors import StartupError

_EXAMPLES: Final = """\
examples:
  synthia-vllm render request.json           the prompt of a chat request, or of a list of messages
  echo '[{"role": "user", "content": "Hi"}]' | synthia-vllm render -
  synthia-vllm render request.json --json    with its token ids, stops and sampling

The prompt goes to stdout, what is to be said of it to stderr: how many tokens it is, how many
messages were dropped to fit, how many role markers in contents were made harmless. Nothing is
generated. An API key is read from the environment variable OPENAI_API_KEY.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = "Show the exact prompt that a running server makes of a chat request."
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "file", metavar="FILE", help="a chat request or a list of messages, as JSON; - for stdin"
    )
    add_url(parser)
    parser.add_argument("--model", metavar="NAME", help="default: the request's, else the first")
    parser.add_argument("--json", action="store_true", help="print all that the server says of it")


def run(args: argparse.Namespace) -> int:
    """Print the prompt; return the exit code. Raises `StartupError` for a file that is no use."""
    import openai

    request = _read(args.file)
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    with openai.OpenAI(base_url=args.url, api_key=key, max_retries=0) as client:
        try:
            if args.model or not request.get("model"):
                request["model"] = args.model or client.models.list().data[0].id
            found: Any = client.post("/chat/completions/render", cast_to=object, body=request)
        except openai.APIError as error:
            say(explain(error, args.url))
            return 1
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    prompt = str(found["prompt"])
    if sys.stdout.isatty():
        prompt = prompt.translate(CONTROLS)
    print(prompt)
    say(
        f"{found['count']} tokens of {found['max_model_len']}, the beginning-of-text token "
        f"included; room for an answer of {found['max_tokens']}. "
        f"Role markers made harmless: {found['escaped_markers']}. "
        f"Messages dropped to fit: {found['dropped_messages']}."
    )
    return 0


def _read(name: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise StartupError(f"Cannot read {name}: {error.strerror}.") from error
    except ValueError as error:
        raise StartupError(f"{name} is not JSON: {error}.") from error
    if isinstance(content, list):
        content = {"messages": content}
    if not isinstance(content, dict):
        raise StartupError(f"{name} must hold a chat request or a list of messages.")
    return content
