"""That vLLM reads a prompt as the model was trained to, whatever files its tokenizer has."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.engine.tokenizer_model import TokenizerModel
from synthia_vllm.engine.vllm.tokenizer import encoders
from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable

_NO_LIMIT: Final = int(1e30)
"""What transformers writes as `model_max_length` where there is none."""


def settle_tokenizer(args: Any, run_directory: str, progress: Callable[[str], None]) -> None:
    """Have `args` (`AsyncEngineArgs`) name a tokenizer whose tokens are SentencePiece's.

    Where the model's files give another one, the right one is made of its ``tokenizer.model`` in
    the run directory, which stays as long as the engine. A tokenizer of a kind that the user has
    chosen is the user's. Raises `StartupError`.
    """
    if args.tokenizer_mode not in ("auto", "hf"):
        return
    from vllm.tokenizers import get_tokenizer

    source = args.tokenizer or args.model
    revision = args.tokenizer_revision or args.revision

    def find(name: str) -> Path | None:
        return _find(source, name, revision, args.download_dir)

    file = find("tokenizer.model")
    if file is None:  # then what there is has to be right
        return
    model = _read(file)
    try:
        loaded = get_tokenizer(
            source,
            tokenizer_mode=args.tokenizer_mode,
            revision=revision,
            trust_remote_code=args.trust_remote_code,
            download_dir=args.download_dir,
        )
        wrong = _wrong(loaded, model)
    except Exception as error:  # of any kind: these are other people's files
        told = str(error).partition("\n")[0] or type(error).__name__
        wrong = f"transformers cannot read its files ({told})"
    if wrong is None:
        return
    progress(f"making the tokenizer from tokenizer.model, as {wrong}")
    added = _added_tokens(find, model)
    made = model.tokenizer(added)
    made.encode_special_tokens = True
    difference = model.difference(lambda text: list(made.encode(text).ids), added)
    if difference is not None:
        raise StartupError(
            f"No tokenizer can be made that reads texts as {file} does: {difference}. This is not "
            "Synthia's tokenizer, which is SentencePiece's BPE with a space in front."
        )
    max_len = _json(find("tokenizer_config.json")).get("model_max_length", _NO_LIMIT)
    args.tokenizer = os.path.join(run_directory, "tokenizer")
    model.save(args.tokenizer, added, max_len)
    if config := find("config.json"):  # vLLM looks for one beside a tokenizer
        shutil.copy(config, args.tokenizer)


def _wrong(tokenizer: Any, model: TokenizerModel) -> str | None:
    """What `tokenizer` does otherwise than `model`; None if nothing."""
    encoder = encoders(tokenizer)[False]
    names = [token.content for token in encoder.get_added_tokens_decoder().values()]
    difference = model.difference(lambda text: list(encoder.encode(text).ids), names)
    if difference is not None:
        return f"with transformers {difference}"
    if (tokenizer.bos_token, tokenizer.unk_token) != (model.bos, model.unk):
        return f"its files call {tokenizer.bos_token!r} what is {model.bos!r}"
    return None if tokenizer.eos_token else "its files name no token that ends a text"


def _find(source: str, name: str, revision: str | None, cache: str | None) -> Path | None:
    """The file `name` of a model, on this machine or the hub; None if there is none."""
    directory = Path(source).expanduser()
    if directory.exists():
        file = directory / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(source, name, revision=revision, cache_dir=cache))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None  # not there, or not on this machine and the hub out of reach
    except HfHubHTTPError as error:  # it may be there: without it nobody knows what is right
        raise StartupError(
            f"The model hub does not give out {name} of {source}: {error}"
        ) from error


def _read(file: Path) -> TokenizerModel:
    try:
        return TokenizerModel(file)
    except (OSError, RuntimeError) as error:
        text = file.read_bytes()[:40]
        pointer = text.startswith(b"version https://git-lfs")
        way_out = "run `git lfs pull` there" if pointer else "fetch it again"
        kind = "a pointer of Git LFS" if pointer else "damaged, or not SentencePiece's"
        raise StartupError(f"{file} is {kind}: {way_out}.") from error


def _added_tokens(find: Callable[[str], Path | None], model: TokenizerModel) -> dict[str, int]:
    """Tokens that the model's files add to those of ``tokenizer.model``, with their ids."""
    listed = dict(_json(find("added_tokens.json")))
    for number, token in (
        _json(find("tokenizer_config.json")).get("added_tokens_decoder", {}).items()
    ):
        listed[token["content"]] = int(number)
    first: int = model.pieces.vocab_size()
    return {name: number for name, number in listed.items() if number >= first}


def _json(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{file} is not JSON: {error}. Fetch it again.") from error
    if not isinstance(found, dict):
        raise StartupError(f"{file} does not hold a JSON object. Fetch it again.")
    return found
