"""`synthia-vllm batch`: a file of requests, answered into a file.

    a server (there, or started here)  ->  upload, batch  ->  wait  ->  output, errors

Where it is kept beside the output, so that the same command goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.cli.chat import explain, say
from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from openai import OpenAI
    from openai.types import Batch

_EXAMPLES: Final = """\
examples:
  synthia-vllm batch questions.jsonl -o answers.jsonl          starts a server, and ends it
  synthia-vllm batch questions.jsonl -o answers.jsonl --model demo
  synthia-vllm batch questions.jsonl -o answers.jsonl --url http://gpu-box:8000

A line of the input is OpenAI's: {"custom_id": "1", "method": "POST", "url":
"/v1/chat/completions", "body": {"model": ..., "messages": [...]}}. All lines have one url. Lines
that could not be answered go to answers.errors.jsonl. Broken off, the same command goes on where it
was. A running server must take batches (its setting batches.directory); an API key for it is read
from OPENAI_API_KEY. The exit code is 1 if a line failed.
"""
_POLL_S: Final = 1.0
_SAY_EVERY_S: Final = 2.0
_LAST_LINES: Final = 12
_CLOSING_S: Final = 30.0
_PR_SET_PDEATHSIG: Final = 1  # of <linux/prctl.h>


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`, which has the options of a server besides."""
    parser.description = "Answer a file of requests, on a running server or on one started for it."
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("input", type=Path, metavar="INPUT.jsonl")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUTPUT.jsonl", help="for the answers"
    )
    parser.add_argument(
        "--url", help="a running server's API; without it one is started, with the options below"
    )


def run(args: argparse.Namespace, serve_options: Sequence[str]) -> int:
    """Answer the file; return the exit code. Raises `StartupError`."""
    import openai

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    progress = _Progress(args.input, args.output, args.url)
    with _server(args, serve_options) as url, openai.OpenAI(base_url=url, api_key=key) as client:
        try:
            batch = progress.batch_of(client)
            batch = _wait(client, batch)
            if batch.status == "failed":
                progress.forget()
                raise StartupError(_faults(args.input, batch))
            failed = _fetch(client, batch, args.output)
        except openai.APIError as error:
            raise StartupError(explain(error, url)) from None
        except KeyboardInterrupt:
            say("broken off; the same command goes on from here")
            raise
        progress.forget()
    return 1 if failed or batch.status != "completed" else 0


class _Progress:
    """What is known of an earlier run with the same output. Raises `StartupError`."""

    def __init__(self, source: Path, output: Path, url: str | None) -> None:
        self._file = output.with_name(f"{output.name}.progress.json")
        self._source = source
        try:
            with source.open("rb") as file:
                self._is = {"url": url, "input": hashlib.file_digest(file, "sha256").hexdigest()}
        except OSError as error:
            raise StartupError(f"Cannot read {source}: {error.strerror}.") from None
        self._batch_id: str | None = None
        if self._file.exists():
            was = json.loads(self._file.read_text(encoding="utf-8"))
            self._batch_id = was.pop("batch")
            if was != self._is:
                raise StartupError(
                    f"{self._file} is of another input or server. Finish that with the command it "
                    "was begun with, or remove it to begin anew."
                )
        elif output.exists():
            raise StartupError(f"{output} is there already; remove it, or name another.")

    def batch_of(self, client: OpenAI) -> Batch:
        """The batch that was begun before, or else a new one."""
        import openai

        if self._batch_id is not None:
            try:
                return client.batches.retrieve(self._batch_id)
            except openai.NotFoundError:
                say("the server no longer has the batch that was begun: it is begun anew")
        with self._source.open("rb") as file:
            first = next((line for line in file if line.strip()), b"{}")
        try:
            endpoint: Any = json.loads(first)["url"]
        except (ValueError, LookupError, TypeError):
            raise StartupError(
                f'{self._source}: the first line is not a request: {{"custom_id": ..., "method": '
                '"POST", "url": "/v1/chat/completions", "body": {...}}.'
            ) from None
        uploaded = client.files.create(file=self._source, purpose="batch")
        batch = client.batches.create(
            input_file_id=uploaded.id, endpoint=endpoint, completion_window="24h"
        )
        _replace(self._file, json.dumps({**self._is, "batch": batch.id}).encode())
        return batch

    def forget(self) -> None:
        """It is over."""
        self._file.unlink(missing_ok=True)


def _wait(client: OpenAI, batch: Batch) -> Batch:
    """`batch` when it has ended; tells how far it is meanwhile."""
    began, said, before = time.monotonic(), -_SAY_EVERY_S, None
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        counts = batch.request_counts
        now = time.monotonic()
        if counts is not None and now - said >= _SAY_EVERY_S:
            said = now
            done = counts.completed + counts.failed
            before = done if before is None and counts.total else before
            text = f"{done:,} of {counts.total:,} lines" if counts.total else "looking at the file"
            if counts.failed:
                text += f", {counts.failed:,} failed"
            if before is not None and done > before:
                pace = (done - before) / (now - began)
                left = (counts.total - done) / pace
                time_left = f"{left:.0f} s" if left < 100 else f"{left / 60:,.0f} min"
                text += f"; {pace:,.1f} a second, {time_left} left"
            for error in (batch.errors.data or []) if batch.errors else []:
                text += f"; {error.message}"
            say(text)
        time.sleep(_POLL_S)
        batch = client.batches.retrieve(batch.id)
    return batch


def _fetch(client: OpenAI, batch: Batch, output: Path) -> int:
    """Write what came of `batch`; return how many lines failed. Then the server may forget it."""
    counts = batch.request_counts
    done, failed = (counts.completed, counts.failed) if counts is not None else (0, 0)
    errors = output.with_name(f"{output.stem}.errors{output.suffix}")
    for file_id, path in ((batch.error_file_id, errors), (batch.output_file_id, output)):
        if file_id is None:
            _replace(path, b"") if path is output else path.unlink(missing_ok=True)
            continue
        beside = path.with_name(f".{path.name}.part")
        with client.files.with_streaming_response.content(file_id) as response:
            response.stream_to_file(beside)
        beside.replace(path)
    for file_id in (batch.error_file_id, batch.output_file_id, batch.input_file_id):
        if file_id is not None:
            client.files.delete(file_id)
    say(
        f"{batch.status}: {done:,} lines answered in {output}"
        + (f", {failed:,} failed: {errors}" if failed else "")
    )
    return failed


def _faults(source: Path, batch: Batch) -> str:
    errors = (batch.errors.data if batch.errors else None) or []
    told = [
        f"  line {error.line}: {error.message}" if error.line else f"  {error.message}"
        for error in errors[:10]
    ]
    more = [f"  and {len(errors) - 10} more"] if len(errors) > 10 else []
    return "\n".join([f"{source} is not a file of requests; nothing was run.", *told, *more])


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    beside.replace(path)


@contextmanager
def _server(args: argparse.Namespace, serve_options: Sequence[str]) -> Iterator[str]:
    """The URL of the server to ask: the one that is named, or one for this file alone."""
    if args.url is not None:
        url = args.url.rstrip("/")
        yield url if url.endswith("/v1") else f"{url}/v1"
        return
    from synthia_vllm.serve.server import listen

    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    directory = args.output.with_name(f"{args.output.name}.batch").resolve()
    size = max(args.input.stat().st_size, 1024)
    own = {
        "batches.directory": directory,
        "batches.max_file_bytes": size,
        "batches.max_stored_bytes": 1 << 62,
        "keys_file": "null",
        "page": "false",
    }
    command = [sys.executable, "-m", "synthia_vllm.cli.main", "serve", *serve_options]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    for setting, value in own.items():
        command += ["--set", f"{setting}={value}"]
    with subprocess.Popen(  # noqa: S603 - this very program
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_end_with_us,  # noqa: PLW1509 - this process has one thread yet
    ) as server:
        last: deque[str] = deque(maxlen=_LAST_LINES)
        reader = threading.Thread(target=_show, args=(server, last), daemon=True)
        reader.start()
        try:
            _until_ready(server, port, last)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            reader.join(_CLOSING_S)  # leaving closes the pipe, under whoever reads it
    shutil.rmtree(directory, ignore_errors=True)


def _end_with_us() -> None:
    """Have the system end this process with the one that started it, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _show(server: subprocess.Popen[str], last: deque[str]) -> None:
    """Pass on the steps of a server's start; keep the rest for when it fails."""
    for line in server.stderr or ():
        last.append(line.rstrip())
        if line.startswith("["):
            print(line, end="", file=sys.stderr, flush=True)


def _until_ready(server: subprocess.Popen[str], port: int, last: deque[str]) -> None:
    import httpx

    while True:
        if server.poll() is not None:
            raise StartupError("The server did not start.\n" + "\n".join(last))
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
