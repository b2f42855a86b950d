"""`synthia-vllm chat`: the model card's conversation loop, as a client of a running server.

    read a line  ->  a command, or a question  ->  stream the answer  ->  keep and save the turn

A turn is kept in the conversation, and saved, exactly if the user saw an answer to it: a stopped
or broken answer counts with what arrived of it, a question without an answer is forgotten.
Answers go to stdout; everything the program itself has to say goes to stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from synthia_vllm.errors import StartupError
from synthia_vllm.template.prompt import TREE_OF_THOUGHT

if TYPE_CHECKING:
    from types import FrameType

    from openai import APIError, OpenAI
    from openai.types.chat import ChatCompletionMessageParam

_EXAMPLES: Final = """\
examples:
  synthia-vllm chat                                   talk to the server on this machine
  synthia-vllm chat --tot                             with the Tree-of-Thought system message
  synthia-vllm chat --url http://gpu-box:8000 --system "Answer in one sentence."
  synthia-vllm chat --no-save < questions.txt > answers.txt

/help in the chat lists its commands. Every turn is appended to the --save file as one line,
{"prompt": ..., "answer": ...}. An API key, if the server wants one, is read from the environment
variable OPENAI_API_KEY. With questions from a pipe (one a line) the exit code is 1 if any failed.
"""

_HELP: Final = """\
/system TEXT   set the system message; alone: show it; /system - removes it
/tot           turn the Tree-of-Thought system message on or off
/reset         forget the conversation, keep the system message
/examples      list the questions that a demo model knows
/help          this list
/quit          leave; so does Ctrl-D
//...          send a line that begins with /
Ctrl-C stops an answer; what arrived of it is kept."""

_LOST: Final = "The answer broke off: the connection was lost."

# A model's answer must not be able to command the terminal it is shown on.
CONTROLS: Final = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = "Talk to a running server; the conversation is saved as in the model card."
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_url(parser)
    parser.add_argument("--model", metavar="NAME", help="default: the first the server lists")
    front = parser.add_mutually_exclusive_group()
    front.add_argument("--system", metavar="TEXT", help="system message")
    front.add_argument("--tot", action="store_true", help="Tree-of-Thought system message")
    parser.add_argument(
        "--save",
        metavar="FILE",
        default="Synthia-7B-conversations.jsonl",
        help="append every turn to FILE (default %(default)s)",
    )
    parser.add_argument(
        "--no-save", dest="save", action="store_const", const=None, help="save nothing"
    )
    sampling = parser.add_argument_group("sampling", "Unset: the server's, which are the card's.")
    sampling.add_argument("--temperature", metavar="T", type=float)
    sampling.add_argument("--top-p", metavar="P", type=float)
    sampling.add_argument("--top-k", metavar="K", type=int)
    sampling.add_argument("--max-tokens", metavar="N", type=int, help="longest answer, in tokens")


def add_url(parser: argparse.ArgumentParser) -> None:
    """Describe the option that says where the server is."""
    parser.add_argument(
        "--url",
        type=_url,
        default=os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1",
        help="the server's API (default: OPENAI_BASE_URL if set, else http://127.0.0.1:8000/v1)",
    )


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not like http://127.0.0.1:8000/v1")
    return text


def _listed(body: bytes) -> dict[str, list[str]]:
    """The names in a list of models, each with its examples; none if it is not such a list."""
    try:
        return {
            str(model["id"]): [str(example) for example in model.get("examples") or ()]
            for model in json.loads(body)["data"]
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _find_api(url: str, key: str) -> tuple[OpenAI, dict[str, list[str]]]:
    """A client of the API at `url`, or at ``/v1`` below it, and what is served there.

    Raises `StartupError`, in words for the user, if it is at neither.
    """
    import openai

    url = url.rstrip("/")
    places = [url] if url.endswith("/v1") else [url, f"{url}/v1"]
    for place in places:
        client = openai.OpenAI(base_url=place, api_key=key, max_retries=0)
        try:
            with client.models.with_streaming_response.list() as response:
                if listed := _listed(response.read()):
                    return client, listed
            why = f"{place} lists no models. Is it an OpenAI-compatible server's /v1?"
        except openai.APIError as error:
            why = explain(error, place)
            if not isinstance(error, openai.NotFoundError):
                break
    else:
        if len(places) > 1:
            why = f"Neither {places[0]} nor {places[1]} lists models. Is it another server?"
    client.close()
    raise StartupError(why)


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves or the input ends; return the exit code."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    try:
        client, listed = _find_api(args.url, key)
    except StartupError as refused:
        say(str(refused))
        return 1
    args.url = str(client.base_url).rstrip("/")
    with client:
        try:
            return _Chat(client, args, listed).loop()
        except BrokenPipeError:  # whoever read the answers has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


class _Chat:
    """One conversation, and the loop that carries it on."""

    def __init__(
        self, client: OpenAI, args: argparse.Namespace, served: dict[str, list[str]]
    ) -> None:
        name = args.model or next(iter(served))
        self._client = client
        self._args = args
        self._served = served
        self._model = name.removesuffix(f"-{TREE_OF_THOUGHT.suffix}")
        self._examples = served.get(name, [])
        self._tot = args.tot or (name != self._model and not args.system)
        self._system: str | None = args.system
        self._turns: list[ChatCompletionMessageParam] = []
        self._interactive = sys.stdin.isatty()
        self._failed = False
        self._told_unsaved = False
        self._interrupted = False

    def loop(self) -> int:
        """Take lines until the user leaves or they end."""
        if self._interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  # importing it gives `input` editing and history
            where = f"; saving to {self._args.save}" if self._args.save else ""
            say(f"{self._model} at {self._args.url}{where}. /help lists the commands.")
            if self._examples:
                few = self._examples[:: -(-len(self._examples) // 3)]
                say(
                    f"{self._model} is a small demo that knows {len(self._examples)} questions; "
                    f"try: {' / '.join(few)} (/examples lists all)"
                )
        interrupted = False
        while True:
            self._hear_interrupts(True)
            try:
                line = self._read()
            except EOFError:
                if self._interactive:
                    print()
                break
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()
                if interrupted:
                    break
                interrupted = True
                say("Press Ctrl-C again to quit.")
                continue
            interrupted = False
            if line.startswith("/") and not line.startswith("//"):
                if not self._command(line):
                    break
            elif line.strip():
                self._ask(line.removeprefix("/"))
        return 1 if self._failed and not self._interactive else 0

    def _hear_interrupts(self, hear: bool) -> None:
        """On a terminal: whether the next Ctrl-C raises, once, or is passed over."""
        if self._interactive:
            self._interrupted = False
            signal.signal(signal.SIGINT, self._interrupt if hear else signal.SIG_IGN)

    def _read(self) -> str:
        if not self._interactive or sys.stdout.isatty():
            return input("You: " if self._interactive else "")
        print("You: ", end="", file=sys.stderr, flush=True)
        return input()

    def _command(self, line: str) -> bool:
        """Carry out a /command; return whether the loop goes on."""
        name, _, text = line.partition(" ")
        text = text.strip()
        match name:
            case "/quit":
                return False
            case "/help":
                say(_HELP)
            case "/reset":
                self._turns.clear()
                say("The conversation is forgotten.")
            case "/tot":
                self._tot = not self._tot
                say(f"Tree of Thought is {'on' if self._tot else 'off'}.")
            case "/examples":
                say("\n".join(self._examples) or f"{self._model} lists none: ask it anything.")
            case "/system":
                if text:
                    self._system = None if text == "-" else text
                    self._tot = False
                in_force = "Tree of Thought (/tot)" if self._tot else self._system or "none"
                say(f"System message: {in_force}")
            case _:
                self._failed = True
                say(f"There is no command {name}; nothing was sent. See /help, or begin with //.")
        return True

    def _ask(self, question: str) -> None:
        """Show the answer to `question` as it arrives; keep the turn if there is an answer."""
        import openai

        parts: list[str] = []
        finish = problem = None
        stopped = False
        try:
            finish = self._stream(question, parts)
            if finish is None:
                problem = "The answer broke off: the server ended it early."
        except KeyboardInterrupt:
            stopped = True
        except openai.APIError as error:
            problem = explain(error, self._args.url, begun=bool(parts))
        except Exception as error:
            # In mid-stream openai before 3.54 lets its transport's own errors (httpx*) through.
            if not type(error).__module__.startswith("httpx"):
                raise
            problem = _LOST
        self._failed |= problem is not None

        self._hear_interrupts(False)  # an impatient second Ctrl-C must not lose the turn
        answer = "".join(parts)
        if answer or finish or (stopped and self._interactive):
            print(flush=True)
        if answer or finish:
            self._keep(question, answer)
        kept = "What arrived is kept." if answer else "The question is forgotten."
        if stopped:
            say(f"Stopped. {kept}")
            if not self._interactive:
                raise KeyboardInterrupt  # a batch has no prompt to come back to
        elif problem is not None:
            say(f"{problem} {kept}")
        elif finish == "length":
            say("The answer reached its limit of tokens (--max-tokens, or the model's context).")
        elif not answer:
            say("The answer is empty.")

    def _stream(self, question: str, parts: list[str]) -> str | None:
        """Show the answer, adding it to `parts`; return its finish reason, `None` without an end.

        Leaving early, by whatever exception, closes the connection, on which the server stops
        the answer in its engine.
        """
        model, messages = self._request(question)
        top_k = self._args.top_k
        finish = None
        with self._client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            temperature=self._args.temperature,
            top_p=self._args.top_p,
            max_tokens=self._args.max_tokens,
            extra_body=None if top_k is None else {"top_k": top_k},
        ) as stream:
            if dropped := stream.response.headers.get("x-synthia-dropped-messages"):
                say(f"The oldest {dropped} messages no longer fit and were left out.")
            for chunk in stream:
                if self._interrupted:
                    raise KeyboardInterrupt
                for choice in chunk.choices:
                    finish = choice.finish_reason or finish
                    if delta := choice.delta.content:
                        parts.append(delta)
                        shown = delta.translate(CONTROLS) if sys.stdout.isatty() else delta
                        print(shown, end="", flush=True)
        return finish

    def _request(self, question: str) -> tuple[str, list[ChatCompletionMessageParam]]:
        """The model to ask, and the whole conversation with `question` at its end."""
        model, system = self._model, self._system
        if self._tot:
            preset = f"{model}-{TREE_OF_THOUGHT.suffix}"
            # The server puts the sentence in front itself, if it has a name for that.
            model, system = (
                (preset, None) if preset in self._served else (model, TREE_OF_THOUGHT.system)
            )
        front: list[ChatCompletionMessageParam] = (
            [{"role": "system", "content": system}] if system else []
        )
        return model, [*front, *self._turns, {"role": "user", "content": question}]

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        """Raise for the first Ctrl-C; more are passed over until the loop hears again.

        Noted as well as raised: an exception that happens to rise in a finaliser is swallowed.
        """
        self._interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def _keep(self, question: str, answer: str) -> None:
        """Add the turn to the conversation and, as the model card does, to the file."""
        self._turns.append({"role": "user", "content": question})
        self._turns.append({"role": "assistant", "content": answer})
        if self._args.save is None:
            return
        try:
            with open(self._args.save, "a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": question, "answer": answer}) + "\n")
        except OSError as error:
            if not self._told_unsaved:
                self._told_unsaved = True
                say(f"Cannot save to {self._args.save}: {error.strerror}. The chat goes on.")


def explain(error: APIError, url: str, *, begun: bool = False) -> str:
    """What went wrong and what to do about it, in words for the user."""
    import openai

    said = error.body.get("message") if isinstance(error.body, dict) else None
    if not isinstance(error, openai.APIStatusError):
        if begun:
            lost = isinstance(error, openai.APIConnectionError)
            return _LOST if lost else f"The answer broke off: {error.message}"
        if isinstance(error, openai.APITimeoutError):
            return f"The server at {url} did not answer in time."
        if isinstance(error, openai.APIConnectionError):
            return (
                f"No server can be reached at {url}. Start one with `synthia-vllm serve`, "
                "or say where it is with --url."
            )
        return error.message
    said = said or f"{url} answered HTTP {error.status_code}."
    if error.status_code == 503:
        return f"{said} Wait a moment and ask again."
    if error.code == "context_length_exceeded":
        return f"{said} /reset forgets the conversation so far."
    if error.status_code == 404 and error.code != "model_not_found":
        return f"{said} The URL usually ends in /v1; it is {url}."
    if error.status_code in (401, 403):
        return f"{said} The key is read from the environment variable OPENAI_API_KEY."
    return str(said)


def say(text: str) -> None:
    """Tell the user something that is not an answer: on stderr, dim on a terminal."""
    if sys.stderr.isatty():
        text = text.translate(CONTROLS)
        if "NO_COLOR" not in os.environ:
            text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)
