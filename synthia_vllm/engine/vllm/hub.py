"""Whether a model can be had, before anything slow is done for it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable


_SMALL: Final = 1 << 20
_NO_GGUF: Final = (
    "this vLLM loads no GGUF. Take the model's own files (config.json with safetensors or .bin "
    "weights); smaller ones are AWQ, GPTQ or FP8 (docs/models.md)."
)


def check_model(model: str, progress: Callable[[str], None]) -> None:
    """Raise `StartupError` in plain words if `model` can be had neither here nor from the hub."""
    ways_out = (
        f"Ways out: give a directory that holds the weights (--model /path/to/{Path(model).name}), "
        "or make the hub reachable (and log in with `hf auth login` for a gated model). "
        "To try the server without weights: --model demo."
    )
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartupError(f"{path} has no config.json, so it is not a model. {ways_out}")
        _check_weights(path)
        return
    if path.suffix == ".gguf":
        raise StartupError(f"{path} cannot be served: {_NO_GGUF}")
    if path.exists() or model.startswith(("/", ".", "~")):
        raise StartupError(f"There is no model directory {path}. {ways_out}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(model, "config.json", local_files_only=True)
        return
    except (LocalEntryNotFoundError, HFValidationError):
        progress(f"asking the model hub for {model}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five tries, two lines each
    try:
        hf_hub_download(model, "config.json")
    except HFValidationError as error:
        raise StartupError(
            f"{model!r} is neither a directory nor a hub name. {ways_out}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise StartupError(
            f"The model {model} is not on this machine and the model hub cannot be reached. "
            f"{ways_out}"
        ) from error
    except HfHubHTTPError as error:
        raise StartupError(f"The model hub does not give out {model}. {ways_out}") from error


def revision_of(model: str, commit: str | None) -> str:
    """What tells the files of a model from others of its name: the hub's `commit`, if it has one.

    Of a directory it is made of the names and sizes of its files, and of what the small ones say:
    weights of other numbers in the same form are taken for the same.
    """
    directory = Path(model)
    if commit is not None or not directory.is_dir():
        return commit or model
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            if file.suffix == ".json" and size < _SMALL:
                digest.update(file.read_bytes())
    return digest.hexdigest()


def quantisation(model: str) -> str | None:
    """How the weights in a directory are quantised; None if they are not, or it is the hub's.

    Imports vLLM, which takes seconds. Raises `StartupError` for a way that vLLM does not know.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    file = Path(model) / "config.json"
    if not file.is_file():
        return None  # vLLM tells of what the hub has
    try:
        method: str | None = (
            json.loads(file.read_text()).get("quantization_config", {}).get("quant_method")
        )
    except (ValueError, AttributeError) as error:
        raise StartupError(f"{file} cannot be read: {error}. Fetch it again.") from error
    if method is not None and method not in QUANTIZATION_METHODS:
        raise StartupError(
            f"{file}: the weights are quantised by {method!r}, which this "
            "vLLM does not load. Take AWQ, GPTQ, FP8 or compressed-tensors ones, or the model's "
            "own, which `--engine quantization=fp8` makes smaller at the start."
        )
    return method


def _check_weights(directory: Path) -> None:
    """Raise `StartupError` if weights are missing in `directory`, or are not what they should be.

    A directory without any is vLLM's business: it may be told to make them up.
    """
    kind = "safetensors" if any(directory.glob("*.safetensors")) else "bin"
    found = [*directory.glob(f"*.{kind}")]
    if not found and any(directory.glob("*.gguf")):
        raise StartupError(f"{directory} has weights in GGUF only: {_NO_GGUF}")
    for file in found:
        with file.open("rb") as content:
            if content.read(24) == b"version https://git-lfs.":
                raise StartupError(f"{file} is a pointer of Git LFS: run `git lfs pull` there.")
    for index in directory.glob(f"*.{kind}.index.json"):
        try:
            named = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise StartupError(f"{index} cannot be read: {error!r}. Fetch it again.") from error
        if missing := sorted(named - {file.name for file in found}):
            raise StartupError(f"{directory} lacks {', '.join(missing)}: fetch what is missing.")
