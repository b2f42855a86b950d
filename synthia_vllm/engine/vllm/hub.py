"""Whether a model can be had, before anything slow is done for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable


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
        return
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
