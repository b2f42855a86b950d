"""The chat client as a user has it: a process of its own, talking to a real server."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from serving import Running, free_port, running, wait_until

from synthia_vllm.cli.main import main
from synthia_vllm.engine.base import ModelInfo
from synthia_vllm.engine.fake import FIRST_BYTE, FakeEngine
from synthia_vllm.errors import EngineFault
from synthia_vllm.template.prompt import TREE_OF_THOUGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHAT = "import sys; from synthia_vllm.cli.main import main; sys.exit(main())"
# A terminal is only one from which Ctrl-C reaches the process: make it the controlling one.
# A test run in the background, as CI may be, has Ctrl-C switched off for all it starts.
HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
ON_TERMINAL = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {CHAT}"
FILE = "Synthia-7B-conversations.jsonl"
CTRL_C, CTRL_D = "\x03", "\x04"
PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<p>Hi</p>"
LOST = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
MODELS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'
)
BEGINNING = b'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"


def command(code: str, url: str, arguments: tuple[str, ...]) -> list[str]:
    place = () if "--url" in arguments else ("--url", f"{url}/v1")
    return [sys.executable, "-c", code, "chat", *place, *arguments]


def environment(**changes: str) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")}
    return own | {"TERM": "dumb", "NO_PROXY": "*", "PYTHONUTF8": "1"} | changes


@pytest.fixture
def piped(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the chat in `tmp_path` with its questions from a pipe."""

    def run(url: str, questions: str, *arguments: str, **env: str) -> Any:
        return subprocess.run(
            command(CHAT, url, arguments),
            input=questions,
            capture_output=True,
            encoding="utf-8",
            cwd=tmp_path,
            env=environment(**env),
            timeout=60,
            check=False,
        )

    return run


class Terminal:
    """A chat on a terminal of its own; what it shows is collected as it comes."""

    def __init__(self, url: str, cwd: Path, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command(ON_TERMINAL, url, arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment(),
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""
        self._seen = 0
        self._reader = threading.Thread(target=self._collect)
        self._reader.start()

    def _collect(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # EIO: the process has left
                return
            if not data:
                return
            self.shown += data.decode()

    def expect(self, text: str) -> None:
        """Wait until `text` is shown after what was expected last."""
        wait_until(lambda: text in self.shown[self._seen :])
        self._seen = self.shown.index(text, self._seen) + len(text)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def exit_code(self) -> int:
        return self.process.wait(20)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts chats in `tmp_path`; waits for the first prompt."""
    started: list[Terminal] = []

    def start(url: str, *arguments: str) -> Terminal:
        started.append(Terminal(url, tmp_path, *arguments))
        started[-1].expect("You: ")
        return started[-1]

    yield start
    for chat in started:
        chat.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine((" Hel", "lo", ".", " \nUSER:", " more"))


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine) as here:
        yield here


@contextmanager
def answering(*parts: bytes) -> Iterator[str]:
    """A server that gives the first connection `parts[0]`, the second `parts[1]`, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for part in parts:
                connection, _ = listener.accept()
                with connection:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        request += connection.recv(65536)
                    connection.sendall(part)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(20)
        assert not thread.is_alive()


def prompts(engine: FakeEngine) -> list[str]:
    """The prompts the engine got, as text."""
    return [
        bytes(token - FIRST_BYTE for token in work.prompt_token_ids[1:]).decode()
        for work in engine.seen
    ]


def by_the_card(file: Path, turns: list[tuple[str, str]]) -> bytes:
    """What the model card's loop leaves in its file; its lines, its names."""
    output_file_path = file
    for user_input, answer in turns:
        json_data = {"prompt": user_input, "answer": answer}

        with open(output_file_path, "a") as output_file:
            output_file.write(json.dumps(json_data) + "\n")
    return file.read_bytes()


def test_questions_from_a_pipe(
    piped: Callable[..., Any], server: Running, engine: FakeEngine
) -> None:
    """Answers alone go to stdout, and each request carries the conversation before it."""
    done = piped(server.url, "Hi\n\nAnd you?\n", "--system", "Be brief.")
    assert (done.stdout, done.stderr, done.returncode) == ("Hello.\nHello.\n", "", 0)
    assert prompts(engine) == [
        "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT:",
        "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT: Hello.\nUSER: And you?\nASSISTANT:",
    ]


def test_file_is_the_cards(
    piped: Callable[..., Any], server: Running, engine: FakeEngine, tmp_path: Path
) -> None:
    """The file is to the byte what the card's loop writes, appended to what was there."""
    engine.pieces = (" Gr\u00fc\u00df", "e, \u4f60\u597d \U0001f433", '\n"two" lines\t', "\\")
    answer = 'Gr\u00fc\u00dfe, \u4f60\u597d \U0001f433\n"two" lines\t\\'
    questions = ["Hi", "  \u00e9t\u00e9 ", "\U0001f433?\u2028 x", '{"a": "\\n"}']
    for first in (0, 2):  # the second run appends to what the first has left
        lines = "".join(f"{question}\n" for question in questions[first : first + 2])
        assert piped(server.url, lines).returncode == 0
    card = by_the_card(tmp_path / "card.jsonl", [(question, answer) for question in questions])
    assert (tmp_path / FILE).read_bytes() == card


def test_no_save(piped: Callable[..., Any], server: Running, tmp_path: Path) -> None:
    """`--no-save` leaves no file; `--save` says which."""
    assert piped(server.url, "Hi\n", "--no-save").returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert piped(server.url, "Hi\n", "--save", "other.jsonl").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


def test_unwritable_file(piped: Callable[..., Any], server: Running, tmp_path: Path) -> None:
    """A file that cannot be written is said once, and the chat goes on."""
    done = piped(server.url, "Hi\nHi\n", "--save", str(tmp_path))
    assert (done.stdout, done.returncode) == ("Hello.\nHello.\n", 0)
    assert done.stderr == f"Cannot save to {tmp_path}: Is a directory. The chat goes on.\n"


def test_sampling(piped: Callable[..., Any], server: Running, engine: FakeEngine) -> None:
    """What is set reaches the engine, what is not set is the card's."""
    piped(server.url, "Hi\n")
    options = ("--temperature", "0", "--top-p", "0.5", "--top-k", "7", "--max-tokens", "3")
    done = piped(server.url, "Hi\n", *options)
    card, own = (work.sampling for work in engine.seen)
    assert (card.temperature, card.top_p, card.top_k, card.max_tokens) == (0.75, 1.0, 50, 1024)
    assert (own.temperature, own.top_p, own.top_k, own.max_tokens) == (0, 0.5, 7, 3)
    assert done.stdout == "He\n"
    assert "limit of tokens" in done.stderr


def test_commands(piped: Callable[..., Any], server: Running, engine: FakeEngine) -> None:
    """The commands change what is sent next, and are not sent themselves."""
    lines = [
        "/system Be brief.", "1", "/reset", "2", "/system -", "/reset", "//etc?", "/help",
        "/system A", "/tot", "/reset", "3", "/system", "/tot", "/system", "/reset", "4",
        "/quit", "never",
    ]  # fmt: skip
    done = piped(server.url, "\n".join(lines))
    assert prompts(engine) == [
        "SYSTEM: Be brief.\nUSER: 1\nASSISTANT:",
        "SYSTEM: Be brief.\nUSER: 2\nASSISTANT:",
        "USER: /etc?\nASSISTANT:",
        f"SYSTEM: {TREE_OF_THOUGHT.system}\nUSER: 3\nASSISTANT:",
        "SYSTEM: A\nUSER: 4\nASSISTANT:",
    ]
    assert done.returncode == 0
    assert "System message: Tree of Thought (/tot)\n" in done.stderr
    assert "System message: A\n" in done.stderr
    assert all(f"\n{name}" in f"\n{done.stderr}" for name in ("/system", "/tot", "/reset", "/quit"))


def test_a_demo_says_what_it_knows(
    piped: Callable[..., Any], terminal: Callable[..., Terminal], server: Running
) -> None:
    """A model with examples is said to be one, with a few of them; /examples lists them all."""
    known = [f"Question {number}?" for number in range(7)]
    info = replace(FakeEngine().model_info, examples=tuple(known))
    with running(FakeEngine(model_info=info)) as demo:
        chat = terminal(demo.url)
        assert (
            "synthia-demo is a small demo that knows 7 questions; "
            "try: Question 0? / Question 3? / Question 6? (/examples lists all)"
        ) in chat.shown
        done = piped(demo.url, "/examples\n")
    assert (done.stdout, done.returncode) == ("", 0)
    assert done.stderr.splitlines() == known
    assert "small demo" not in terminal(server.url).shown
    assert piped(server.url, "/examples\n").stderr.startswith("synthia-demo lists none")


@pytest.mark.parametrize(
    "arguments", [("--tot",), ("--model", "synthia-demo-tot"), ("--model", "synthia-demo", "--tot")]
)
def test_tree_of_thought(
    piped: Callable[..., Any], server: Running, engine: FakeEngine, arguments: tuple[str, ...]
) -> None:
    """Tree of Thought is asked for by the server's model name, so that its sentence is used."""
    piped(server.url, "Hi\n/tot\n/reset\nHi\n", *arguments)
    assert prompts(engine) == [
        f"SYSTEM: {TREE_OF_THOUGHT.system}\nUSER: Hi\nASSISTANT:",
        "USER: Hi\nASSISTANT:",
    ]
    for model in ("synthia-demo", "synthia-demo-tot"):
        assert server.value("synthia_end_to_end_seconds_count", model=model) == 1


def test_unknown_command(piped: Callable[..., Any], server: Running, engine: FakeEngine) -> None:
    """A command that does not exist is said and not sent; for a batch it is a failure."""
    done = piped(server.url, "/sytem x\n")
    assert done.stderr.startswith("There is no command /sytem;")
    assert (engine.seen, done.stdout, done.returncode) == ([], "", 1)


def test_url_from_the_environment(tmp_path: Path, server: Running) -> None:
    """OPENAI_BASE_URL is honoured where --url is not given."""
    done = subprocess.run(
        [sys.executable, "-c", CHAT, "chat"],
        input="Hi\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(OPENAI_BASE_URL=f"{server.url}/v1"),
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("Hello.\n", "", 0)


def test_no_server(piped: Callable[..., Any]) -> None:
    """Where no server is, the URL and the way to start one are said."""
    url = f"http://127.0.0.1:{free_port()}"
    done = piped(url, "Hi\n")
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith(f"No server can be reached at {url}/v1. Start one with `synthia-")
    assert done.stderr.count("\n") == 1


def test_no_api_there(piped: Callable[..., Any]) -> None:
    """A server of another kind is told from one that is not there."""
    with answering(PAGE) as url:
        done = piped(url, "Hi\n")
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith(f"{url}/v1 lists no models.")
    with answering(LOST) as url:
        done = piped(url, "Hi\n")
    assert "answered HTTP 404. The URL usually ends in /v1" in done.stderr


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_url_of_the_server(piped: Callable[..., Any], server: Running, end: str) -> None:
    """The server's own URL will do, as its API's does, with a slash at the end or not."""
    done = piped(server.url, "Hi\n", "--url", f"{server.url}{end}")
    assert (done.stdout, done.stderr, done.returncode) == ("Hello.\n", "", 0)


def test_url_of_a_server_with_a_page(piped: Callable[..., Any]) -> None:
    """A server that answers every path with a page is asked at /v1 as well."""
    with answering(PAGE, MODELS, STREAM + b"\r\n" + BEGINNING) as url:
        assert piped(url, "Hi\n", "--url", url).stdout == "Hel\n"


@pytest.mark.parametrize("end", ["", "/"])
def test_no_api_at_either_place(piped: Callable[..., Any], end: str) -> None:
    """Where the API is neither at the URL nor at /v1 below it, both are named."""
    for responses in ((LOST, PAGE), (PAGE, LOST), (LOST, LOST)):
        with answering(*responses) as url:
            done = piped(url, "Hi\n", "--url", f"{url}{end}")
        assert (done.stdout, done.returncode) == ("", 1)
        assert done.stderr.startswith(f"Neither {url} nor {url}/v1 lists models.")


def test_refused_at_the_second_place(piped: Callable[..., Any]) -> None:
    """What the API itself says goes before what is not there."""
    refused = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with answering(LOST, refused) as url:
        done = piped(url, "Hi\n", "--url", url)
    assert done.stderr.startswith(f"{url}/v1 answered HTTP 401. The key is read from")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://[", "http://:80", "ftp://x", "http://a:99999"]
)
def test_wrong_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no URL is refused before anything is sent."""
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "--url", url])
    assert "error: argument --url" in capsys.readouterr().err


class _Starting(FakeEngine):
    async def start(self, progress: Callable[[str], None]) -> None:
        await asyncio.Event().wait()


def test_server_is_starting(piped: Callable[..., Any]) -> None:
    """A server that loads its model is worth waiting for, and the user is told so."""
    with running(_Starting(), ready=False) as server:
        done = piped(server.url, "Hi\n")
    assert (done.stdout, done.returncode) == ("", 1)
    assert "is starting" in done.stderr
    assert "Wait a moment and ask again." in done.stderr


def test_too_long(piped: Callable[..., Any], tmp_path: Path) -> None:
    """What does not fit is forgotten, /reset is named, and helps."""
    engine = FakeEngine(model_info=ModelInfo(max_model_len=70, vocab_size=32000, longest_token=1))
    with running(engine) as server:
        done = piped(server.url, f"Hi\n{'x' * 40}\nHo\n/reset\n{'x' * 40}\n")
    assert (done.stdout, done.returncode) == ("Hello.\n" * 3, 1)
    assert "/reset forgets the conversation so far. The question is forgotten.\n" in done.stderr
    assert prompts(engine)[1] == "USER: Hi\nASSISTANT: Hello.\nUSER: Ho\nASSISTANT:"
    turns = [("Hi", "Hello."), ("Ho", "Hello."), ("x" * 40, "Hello.")]
    assert (tmp_path / FILE).read_bytes() == by_the_card(tmp_path / "card.jsonl", turns)


def test_dropped_messages(piped: Callable[..., Any]) -> None:
    """The user learns, once for each answer, that the server left out what did not fit."""
    engine = FakeEngine(model_info=ModelInfo(max_model_len=60, vocab_size=32000, longest_token=1))
    with running(engine, overflow="drop-oldest", answer_reserve=10) as server:
        done = piped(server.url, "Hi\nHow are you?\nWell?\n")
    assert done.stdout == "Hello.\n" * 3
    assert done.stderr == (
        "The oldest 2 messages no longer fit and were left out.\n"
        "The oldest 4 messages no longer fit and were left out.\n"
    )


def test_fault_in_mid_answer(
    piped: Callable[..., Any], server: Running, engine: FakeEngine, tmp_path: Path
) -> None:
    """What arrived before an error event is shown, kept in the conversation, and saved."""
    engine.fault, engine.fault_at = EngineFault(), 2
    done = piped(server.url, "Hi\nHo\n")
    assert (done.stdout, done.returncode) == ("Hello\nHello\n", 1)
    line = f"The answer broke off: {EngineFault().message} What arrived is kept.\n"
    assert done.stderr == line * 2
    assert prompts(engine)[1] == "USER: Hi\nASSISTANT: Hello\nUSER: Ho\nASSISTANT:"
    turns = [("Hi", "Hello"), ("Ho", "Hello")]
    assert (tmp_path / FILE).read_bytes() == by_the_card(tmp_path / "card.jsonl", turns)


def test_fault_before_the_answer(
    piped: Callable[..., Any], server: Running, engine: FakeEngine, tmp_path: Path
) -> None:
    """A question that got no answer is neither sent again nor saved."""
    engine.fault = EngineFault()
    done = piped(server.url, "Hi\nHo\n")
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr == f"{EngineFault().message} The question is forgotten.\n" * 2
    assert prompts(engine)[1] == "USER: Ho\nASSISTANT:"
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (STREAM + b"\r\n" + BEGINNING, "the server ended it early."),
        (
            STREAM + b"Content-Length: 9999\r\n\r\n" + BEGINNING,
            "the connection was lost.",
        ),
    ],
    ids=["no end", "cut off"],
)
def test_stream_without_an_end(piped: Callable[..., Any], response: bytes, why: str) -> None:
    """A stream that stops without its last event is an error, not an answer."""
    with answering(MODELS, response) as url:
        done = piped(url, "Hi\n")
    assert (done.stdout, done.returncode) == ("Hel\n", 1)
    assert done.stderr == f"The answer broke off: {why} What arrived is kept.\n"


def test_reader_leaves(tmp_path: Path, server: Running, engine: FakeEngine) -> None:
    """When nobody reads the answers any more the program ends without a traceback."""
    with subprocess.Popen(
        command(CHAT, server.url, ()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(),
    ) as chat:
        assert chat.stdin
        assert chat.stdout
        assert chat.stderr
        chat.stdout.close()
        chat.stdin.write(b"Hi\n")
        chat.stdin.close()
        assert chat.stderr.read() == b""
        assert chat.wait(20) == 1


def test_ctrl_c_stops_the_answer(
    terminal: Callable[..., Terminal], server: Running, engine: FakeEngine, tmp_path: Path
) -> None:
    """Ctrl-C ends the answer in the engine too; what was shown is kept, and the chat goes on."""
    chat = terminal(server.url)
    engine.pieces, engine.delay = [" long"] * 2000, 0.02
    chat.type("Hi\n")
    chat.expect("long long")
    chat.type(CTRL_C)
    chat.expect("Stopped. What arrived is kept.")
    wait_until(lambda: len(engine.aborted) == 1)
    chat.expect("You: ")
    engine.pieces, engine.delay = [" Hello."], 0
    chat.type("Ho\n")
    chat.expect("Hello.")
    chat.expect("You: ")
    chat.type(CTRL_D)
    assert chat.exit_code() == 0
    first, second = (tmp_path / FILE).read_text().splitlines()
    stopped = json.loads(first)["answer"]
    assert f"{stopped}^C" in chat.shown.replace("\r\n", "")
    assert json.loads(second) == {"prompt": "Ho", "answer": "Hello."}
    assert prompts(engine)[1] == f"USER: Hi\nASSISTANT: {stopped}\nUSER: Ho\nASSISTANT:"
    assert len(engine.aborted) == 1


def test_ctrl_c_before_the_answer(
    terminal: Callable[..., Terminal], server: Running, engine: FakeEngine, tmp_path: Path
) -> None:
    """A question stopped before its first word is freed in the engine, and forgotten."""
    chat = terminal(server.url)
    engine.delay = 3600
    chat.type("Hi\n")
    wait_until(lambda: len(engine.seen) == 1)
    chat.type(CTRL_C)
    chat.expect("Stopped. The question is forgotten.")
    wait_until(lambda: len(engine.aborted) == 1)
    chat.expect("You: ")
    engine.delay = 0
    chat.type("Ho\n")
    chat.expect("Hello.")
    chat.expect("You: ")
    assert prompts(engine)[1] == "USER: Ho\nASSISTANT:"
    assert (tmp_path / FILE).read_bytes() == by_the_card(tmp_path / "card", [("Ho", "Hello.")])


def test_ctrl_c_again_and_again(
    terminal: Callable[..., Terminal], server: Running, engine: FakeEngine, tmp_path: Path
) -> None:
    """An impatient user loses nothing: what was shown is kept and saved all the same."""
    chat = terminal(server.url)
    engine.pieces, engine.delay = [" long"] * 2000, 0.02
    chat.type("Hi\n")
    chat.expect("long long")
    for _ in range(3):
        chat.type(CTRL_C)
    # What is shown says nothing here: a terminal throws away with a Ctrl-C what was not read yet.
    wait_until(lambda: len(engine.aborted) == 1)
    wait_until((tmp_path / FILE).exists)
    chat.type("/quit\n")
    assert chat.exit_code() == 0
    assert len((tmp_path / FILE).read_text().splitlines()) == 1
    assert "Traceback" not in chat.shown


def test_ctrl_c_at_the_prompt(terminal: Callable[..., Terminal], server: Running) -> None:
    """The first Ctrl-C at the prompt is answered by a hint, the second in a row quits."""
    chat = terminal(server.url)
    for _ in range(2):  # a line in between makes the next one the first again
        chat.type(CTRL_C)
        chat.expect("Press Ctrl-C again to quit.")
        chat.expect("You: ")
        chat.type("/tot\n")
        chat.expect("Tree of Thought is")
        chat.expect("You: ")
    chat.type(CTRL_C)
    chat.expect("You: ")
    chat.type(CTRL_C)
    assert chat.exit_code() == 0
    assert "Traceback" not in chat.shown


def test_ctrl_c_in_a_batch(tmp_path: Path, server: Running, engine: FakeEngine) -> None:
    """A batch that is interrupted keeps what arrived, asks nothing more, and ends as such."""
    engine.pieces, engine.delay = [" long"] * 2000, 0.02
    with subprocess.Popen(
        command(HEARING + CHAT, server.url, ()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
    ) as chat:
        assert chat.stdin
        assert chat.stdout
        chat.stdin.write("Hi\nHo\n")
        chat.stdin.flush()
        begun = chat.stdout.read(4)
        chat.send_signal(2)
        rest, said = chat.communicate(timeout=20)
    assert (chat.returncode, said) == (130, "Stopped. What arrived is kept.\n")
    wait_until(lambda: len(engine.aborted) == 1)
    assert len(engine.seen) == 1
    answer = (begun + rest).removesuffix("\n")
    assert (tmp_path / FILE).read_bytes() == by_the_card(tmp_path / "card", [("Hi", answer)])


def test_answers_cannot_command_the_terminal(
    terminal: Callable[..., Terminal], server: Running, engine: FakeEngine, tmp_path: Path
) -> None:
    """Control characters of an answer do not reach the terminal; the file has them all."""
    engine.pieces = (" a\x1b]0;owned\x07b",)
    chat = terminal(server.url)
    chat.type("Hi\n")
    chat.expect("a]0;ownedb")
    chat.expect("You: ")
    assert json.loads((tmp_path / FILE).read_text())["answer"] == "a\x1b]0;owned\x07b"


def test_lines_are_edited(terminal: Callable[..., Terminal], server: Running) -> None:
    """On a terminal the last line comes back with the arrow up, where readline is to be had."""
    pytest.importorskip("readline")
    chat = terminal(server.url)
    chat.type("/system One\n")
    chat.expect("System message: One")
    chat.expect("You: ")
    chat.type("\x1b[A\x7f\x7f\x7fTwo\n")
    chat.expect("System message: Two")
