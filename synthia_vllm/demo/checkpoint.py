"""A small real model, made on the machine itself, so that the server can be tried without weights.

    ensure_demo(progress)  ->  a directory any engine loads: config, weights, tokenizer

It is a Mistral of two layers with the tokenizer of Mistral-7B-v0.1, trained on this machine's
processor in about three minutes to know the dialogues of ``dialogues.json`` by heart, in both
prompt formats, and to say of other questions that it does not know them. It is kept in a cache and
made once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from synthia_vllm.demo.training import (
    BOS,
    EOS,
    RECIPE,
    Recipe,
    dialogues,
    lessons,
    mistral_tokenizer,
    train,
)
from synthia_vllm.engine.examples import EXAMPLES
from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WAIT_S: Final = 0.5
_SAY_EVERY_S: Final = 2.0


def ensure_demo(progress: Callable[[str], None], cache_dir: Path | None = None) -> Path:
    """The directory of the demo model, which is made now if it is not there yet.

    `cache_dir` is by default ``synthia-vllm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. `progress`
    gets one line at least every few seconds. It is made in a process of its own, which leaves
    nothing of torch behind in this one. Raises `StartupError` if it cannot be made.
    """
    cache = cache_dir if cache_dir is not None else _default_cache()
    final = directory(cache, RECIPE)
    if final.is_dir():  # made by one rename, so it is whole
        return final
    with subprocess.Popen(  # noqa: S603 - this very module
        [sys.executable, "-m", "synthia_vllm.demo.checkpoint", str(cache)],
        stderr=subprocess.PIPE,
        text=True,
    ) as maker:
        said = ""
        for line in maker.stderr or ():
            said = line.strip()
            if said.startswith("demo model: "):
                progress(said)
    if maker.returncode != 0:
        raise StartupError(said or "The process that makes the demo model was ended.")
    return final


def make_demo(progress: Callable[[str], None], cache: Path, recipe: Recipe = RECIPE) -> Path:
    """Make the demo model in `cache`, in this process, unless it is there; return its directory.

    Of several processes one makes the model and the others wait for it. A process that dies on
    the way leaves nothing that counts as a model.

    Raises `StartupError` if the cache cannot be written or the libraries are missing.
    """
    final = directory(cache, recipe)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{final.name}.lock", progress):
            if not final.is_dir():
                _remove_leftovers(final)
                _make(final, recipe, progress)
    except OSError as error:
        raise StartupError(
            f"The demo model cannot be stored in {cache}: {error.strerror or error}. "
            "Set XDG_CACHE_HOME to a directory that can be written to and has 100 MB free."
        ) from error
    except ImportError as error:
        raise StartupError(
            f"The demo model cannot be made: {error}. It needs torch, transformers, "
            "mistral_common and sentencepiece, which come with vLLM: install synthia-vllm[cpu] "
            "or synthia-vllm[gpu]."
        ) from error
    return final


def directory(cache: Path, recipe: Recipe) -> Path:
    """Where the model of `recipe` and the present dialogues is kept; any other has another name."""
    made_of = json.dumps([asdict(recipe), lessons()], sort_keys=True)
    return cache / f"demo-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification wants a relative path to be ignored.
    home = Path(base) if base.startswith("/") else Path("~/.cache").expanduser()
    return home / "synthia-vllm"


@contextlib.contextmanager
def _lock(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it when the process ends, however it does.

    The file stays: removing it would let two processes lock two files of one name.
    """
    with path.open("a") as file:
        said = -math.inf
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said >= _SAY_EVERY_S:
                    said = time.monotonic()
                    progress("demo model: another process is making it, waiting")
                time.sleep(_WAIT_S)
        yield


def _remove_leftovers(final: Path) -> None:
    """Remove what dead processes left; to be called with the lock, under which nobody is alive."""
    for left in final.parent.glob(f"{final.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def _make(final: Path, recipe: Recipe, progress: Callable[[str], None]) -> None:
    """Make the checkpoint beside `final` and rename it to `final` when all of it is on the disk."""
    building = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    building.mkdir()  # first, so that a cache without write permission fails at once
    try:
        _build(building, recipe, progress)
        for path in (*building.iterdir(), building):
            _fsync(path)
        building.rename(final)
        _fsync(final.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build(directory: Path, recipe: Recipe, progress: Callable[[str], None]) -> None:
    """Write a whole checkpoint in Hugging Face's layout into `directory`."""
    progress("demo model: loading torch and transformers (once, then it is cached)")
    from safetensors.torch import save

    tokenizer = mistral_tokenizer()
    config, weights = train(tokenizer.tokenizer(), recipe, progress)
    progress("demo model: writing it to the cache")
    config.save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    # No sampling parameters: what is sampled by default is the server's to say.
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}, indent=2) + "\n"
    )
    (directory / EXAMPLES).write_text(
        json.dumps([dialogue[0].user for dialogue in dialogues()], indent=2) + "\n"
    )
    tokenizer.save(directory, {}, config.max_position_embeddings)


if __name__ == "__main__":
    try:
        made = make_demo(
            lambda line: print(line, file=sys.stderr, flush=True),
            Path(sys.argv[1]) if len(sys.argv) > 1 else _default_cache(),
        )
    except StartupError as refused:
        sys.exit(str(refused))
    print(made)
