"""Checks grammars in a process that may be lost.

What compiles a grammar is native code, which one made for it can send into deep recursion or keep
busy for minutes. So an API process has a child that knows the tokenizer and forks for each check:
the fork has a bounded stack, memory and CPU time, and may crash. A check is given up when nobody
waits for it any more. Checks go one at a time, in the order of the requests' priorities, behind
the server's own work; what was found is remembered.

The child is this module, run by itself, with a socket for its standard input. It reads a line of
JSON, the tokenizer, and then one for each check; each is answered with a line. An empty line says
that the check it is at need not be finished.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import heapq
import itertools
import json
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.engine.base import Grammar
from synthia_vllm.engine.grammar import Refused, check, explain
from synthia_vllm.errors import EngineFault, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from llguidance import LLTokenizer

logger = logging.getLogger(__name__)

_CPU_SECONDS: Final = 0.5
_WALL_SECONDS: Final = 5.0  # where the machine has other things to do
_MEMORY_BYTES: Final = 256 << 20  # beyond what the child has
_STACK_BYTES: Final = 1 << 20  # less than the threads of vLLM have in which it is compiled again
_NICE: Final = 10
_REMEMBERED: Final = 1024
_AGAIN_SECONDS: Final = 1.0
_TOO_MUCH: Final = "it takes too much time, memory or depth to compile; make it simpler"


class GrammarChecker:
    """The API process's side. To be made and used on the event loop.

    The child starts at once and is replaced should it die. `tokenizer` is what is in
    ``tokenizer.json``, or ``byte`` for one whose tokens are bytes.
    """

    def __init__(
        self, tokenizer: str, vocab_size: int | None = None, eos_token: int | None = None
    ) -> None:
        self._setup = {"tokenizer": tokenizer, "n_vocab": vocab_size, "eos_token": eos_token}
        self._waiting: list[tuple[int, int, Grammar, asyncio.Future[Mapping[str, Any]]]] = []
        self._numbers = itertools.count()
        self._wanted = asyncio.Event()
        self._found: OrderedDict[bytes, Mapping[str, Any]] = OrderedDict()
        self._life = asyncio.create_task(self._live())

    async def check(self, grammar: Grammar, priority: int) -> None:
        """Return if `grammar` can be enforced; of those that wait, the smallest `priority` first.

        Raises `InvalidRequest`, which names what is wrong and where, and `EngineFault` if there is
        no child to tell.
        """
        found = self._remembered(_key(grammar))
        if found is None:
            done = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (priority, next(self._numbers), grammar, done))
            self._wanted.set()
            found = await done
        if found:
            param = grammar.param + "".join(map(_step, found["path"]))
            param = param if len(param) <= 200 else f"{param[:197]}..."
            raise InvalidRequest(
                f"`{param}`: {found['message']}.", param=param, code="unsupported_grammar"
            )

    async def close(self) -> None:
        """End the child. Who still waits is told that the engine failed."""
        self._life.cancel()
        await asyncio.wait((self._life,))

    def _remembered(self, key: bytes) -> Mapping[str, Any] | None:
        found = self._found.get(key)
        if found is not None:
            self._found.move_to_end(key)
        return found

    async def _live(self) -> None:
        try:
            while True:
                try:
                    await self._work()
                except (OSError, EOFError):
                    logger.exception("the grammar checker was lost; another takes its place")
                self._fail()
                await asyncio.sleep(_AGAIN_SECONDS)
        finally:
            self._fail()

    def _fail(self) -> None:
        """Let nobody wait who waits now."""
        while self._waiting:
            *_, done = self._waiting.pop()
            if not done.done():
                done.set_exception(EngineFault())

    async def _work(self) -> None:
        """Have a child check what is wanted. Raises `EOFError` when it dies."""
        here, there = socket.socketpair()
        with there:  # which is the child's alone, so that either side sees the other's end
            command = (sys.executable, "-m", "synthia_vllm.engine.grammar_checker")
            child = await asyncio.to_thread(subprocess.Popen, command, stdin=there.fileno())
        reader, writer = await asyncio.open_connection(sock=here)
        try:
            writer.write(json.dumps(self._setup).encode() + b"\n")
            await _line(reader)
            while True:
                while not self._waiting:
                    self._wanted.clear()
                    await self._wanted.wait()
                *_, grammar, done = heapq.heappop(self._waiting)
                if done.done():  # its client has left
                    continue
                found: Mapping[str, Any] = {"message": _TOO_MUCH, "path": ()}
                try:
                    found = await self._ask(reader, writer, grammar, done)
                finally:  # if it is what killed the child, it was too much
                    if not done.done():
                        done.set_result(found)
        finally:
            writer.close()
            child.kill()
            child.wait()

    async def _ask(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        grammar: Grammar,
        done: asyncio.Future[Mapping[str, Any]],
    ) -> Mapping[str, Any]:
        """What there is to be said against `grammar`; empty if it is fine."""
        key = _key(grammar)
        found = self._remembered(key)
        if found is not None:
            return found
        writer.write(json.dumps([grammar.kind, grammar.text]).encode() + b"\n")
        answer = asyncio.ensure_future(_line(reader))
        await asyncio.wait((answer, done), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            writer.write(b"\n")
        found = await answer
        if "given_up" not in found:
            self._found[key] = found
            if len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)
        return found


async def _line(reader: asyncio.StreamReader) -> Mapping[str, Any]:
    line = await reader.readline()
    if not line:
        raise EOFError("the child is gone")
    found: Mapping[str, Any] = json.loads(line)
    return found


def _key(grammar: Grammar) -> bytes:
    return hashlib.sha256(f"{grammar.kind} {grammar.text}".encode()).digest()


def _step(step: str | int) -> str:
    """A step of a path, as `param` has it: ``.properties``, ``[2]``, ``["a b"]``."""
    plain = isinstance(step, str) and step.removeprefix("$").isidentifier()
    return f".{step}" if plain else f"[{json.dumps(step)}]"


def main() -> None:
    """The child's side: answer until nobody asks any more."""
    from llguidance import LLTokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this
    os.nice(_NICE)
    asked = _lines()
    setup = json.loads(next(asked))
    tokenizer = LLTokenizer(setup.pop("tokenizer"), **setup)
    gc.collect()
    gc.freeze()  # the forks leave it alone, and so share it
    found: Mapping[str, Any] = {}
    while True:
        os.write(0, json.dumps(found).encode() + b"\n")
        line = next(asked, None)
        if line is None:
            return
        kind, text = json.loads(line)
        found = _check_apart(Grammar(kind, text, param=""), tokenizer)


def _lines() -> Iterator[bytes]:
    """The lines that come in, but for empty ones: those come too late for what they would stop."""
    rest = b""
    while data := os.read(0, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from filter(None, lines)


def _check_apart(grammar: Grammar, tokenizer: LLTokenizer) -> Mapping[str, Any]:
    """Check in a fork, for as long as it is wanted."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _check_bounded(grammar, tokenizer, writing)
        finally:
            os._exit(0)
    os.close(writing)
    said = b""
    given_up = False
    deadline = time.monotonic() + _WALL_SECONDS
    while not given_up:
        ready, _, _ = select.select([reading, 0], [], [], max(0.0, deadline - time.monotonic()))
        if reading in ready:
            data = os.read(reading, 1 << 16)
            if not data:
                break
            said += data
        else:
            given_up = True
            if ready:
                os.read(0, 1)  # the line end that says so
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    whole = said.split(b"\n")[:-1]  # the last is the most exact; it may have been stopped before
    if whole:
        found: Mapping[str, Any] = json.loads(whole[-1])
        return found
    return {"message": _TOO_MUCH, "path": ()} | ({"given_up": True} if given_up else {})


def _check_bounded(grammar: Grammar, tokenizer: LLTokenizer, writing: int) -> None:
    """Check with a bound on all that it may take, and write down what is found."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # how native code dies is nobody's concern
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES, size + _MEMORY_BYTES))
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)

    def say(refused: Refused) -> None:
        found = {"message": refused.message, "path": refused.path}
        os.write(writing, json.dumps(found).encode() + b"\n")

    def run() -> None:
        try:
            check(grammar, tokenizer)
        except Refused as refused:
            say(refused)
            if grammar.kind == "json" and not refused.path:
                say(explain(grammar, tokenizer, refused))
        else:
            os.write(writing, b"{}\n")

    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
