"""The command line: parses, wires the parts together, and runs."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm import __version__
from synthia_vllm.cli import batch, evaluate, keys, usage
from synthia_vllm.cli import chat as terminal
from synthia_vllm.cli import render as rendering
from synthia_vllm.errors import StartupError
from synthia_vllm.telemetry import logs
from synthia_vllm.template.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from synthia_vllm.settings import Settings

_SERVE_EXAMPLES: Final = """\
examples:
  synthia-vllm serve                                the default model of this machine, on port 8000
  synthia-vllm serve --model demo --port 8123       the demo model, without a GPU or weights
  synthia-vllm serve --model /models/Synthia-7B-v3.0 --host 0.0.0.0
  synthia-vllm serve --config config/server.yaml --engine max_model_len=8192
  SYNTHIA_SAMPLING__TEMPERATURE=0.2 synthia-vllm serve --print-config

A file is overruled by the environment (SYNTHIA_PORT, SYNTHIA_SAMPLING__TOP_K, ...), and that by
flags. Every key is explained in config/server.yaml. --engine takes any field of the installed
vLLM's AsyncEngineArgs: `python -c "import vllm; help(vllm.AsyncEngineArgs)"` lists them.
"""

_FLAGS: Final[dict[str, str]] = {
    "host": "address to listen on (default 127.0.0.1: this machine only)",
    "port": "port to listen on (default 8000)",
    "api_workers": "API processes that share the engine and the port (default 1)",
    "model": "'demo', a hub name, or a directory (default: Synthia-7B-v3.0 with a GPU, else demo)",
    "served_name": "model name clients use (default: from the model)",
    "preset": "system message for requests without one: none, tree-of-thought",
    "format": f"prompt format: {', '.join(FORMATS)}",
    "markers": "role markers in content: escape, reject, allow",
    "overflow": "conversations too long for the context: error, drop-oldest",
    "log_level": "debug, info, warning, error",
}
_NUMBERS: Final = ("port", "api_workers")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's own); return the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except StartupError as error:
        logs.tell_end(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synthia-vllm", description="Serve Synthia-7B-v3.0 to many users, on vLLM."
    )
    parser.add_argument("--version", action="version", version=f"synthia-vllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="run the server",
        description="Run the OpenAI-compatible server.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_server_options(serve)
    serve.add_argument(
        "--print-config", action="store_true", help="show the resulting configuration and exit"
    )
    serve.set_defaults(run=_serve)

    chat = commands.add_parser("chat", help="talk to a running server", allow_abbrev=False)
    terminal.add_arguments(chat)
    chat.set_defaults(run=terminal.run)

    render = commands.add_parser(
        "render", help="show the exact prompt of a chat request", allow_abbrev=False
    )
    rendering.add_arguments(render)
    render.set_defaults(run=rendering.run)

    evaluation = commands.add_parser(
        "eval", help="run the model card's benchmarks on a running server", allow_abbrev=False
    )
    evaluate.add_arguments(evaluation)
    evaluation.set_defaults(run=evaluate.run)

    batches = commands.add_parser(
        "batch", help="answer a file of requests into a file", allow_abbrev=False
    )
    batch.add_arguments(batches)
    _add_server_options(batches.add_argument_group("the server that is started"))
    batches.set_defaults(run=lambda args: batch.run(args, _server_options(args)))

    users = commands.add_parser("keys", help="make and remove users and their API keys")
    keys.add_arguments(users)
    users.set_defaults(run=keys.run)

    used = commands.add_parser("usage", help="show who used what", allow_abbrev=False)
    usage.add_arguments(used)
    used.set_defaults(run=usage.run)
    return parser


def _add_server_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file (YAML)")
    for key, text in _FLAGS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", metavar=key.upper(), help=text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key, e.g. sampling.top_k=40",
    )
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of vLLM's AsyncEngineArgs, e.g. max_model_len=8192",
    )


def _server_options(args: argparse.Namespace) -> list[str]:
    """The options in `args` that `_add_server_options` describes, as they were typed."""
    options = [] if args.config is None else ["--config", str(args.config)]
    for key in _FLAGS:
        value = getattr(args, key)
        if value is not None:
            options += [f"--{key.replace('_', '-')}", value]
    for name in ("set", "engine"):
        for text in getattr(args, name):
            options += [f"--{name}", text]
    return options


def _settings(args: argparse.Namespace) -> Settings:
    from synthia_vllm.ledger.place import without_addresses
    from synthia_vllm.settings import load, parse_assignment

    flags: list[tuple[str, str, Any]] = []
    for key in _FLAGS:
        value = getattr(args, key)
        if value is not None:
            flag = f"--{key.replace('_', '-')}"
            flags.append((flag, key, _number(value) if key in _NUMBERS else value))
    for text in args.set:
        key, value = parse_assignment(text)
        flags.append((f"--set {without_addresses(text)}", key, value))
    for text in args.engine:
        key, value = parse_assignment(text)
        flags.append((f"--engine {text}", f"engine.{key}", value))
    return load(args.config, os.environ, flags)


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _serve(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.print_config:
        if settings.engine:
            from synthia_vllm.engine.vllm.options import check_options

            check_options(settings.engine)
        print(settings.to_yaml(), end="")
        return 0

    logs.configure(settings.log_level, settings.log_format)
    progress = logs.Progress()

    from synthia_vllm.engine.vllm.hub import check_model

    model = settings.resolved_model
    if model == "demo":
        from synthia_vllm.demo.checkpoint import ensure_demo

        model = str(ensure_demo(progress))
    else:
        check_model(model, progress)
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to be fetched: ask nobody
    if settings.api_workers > 1:
        from synthia_vllm.serve.supervisor import Supervisor

        supervisor = Supervisor(settings, model, progress)
        if supervisor.admission.open:
            _warn_of_open_server(settings)
        return supervisor.run()
    return _serve_alone(settings, model, progress)


def _serve_alone(settings: Settings, model: str, progress: logs.Progress) -> int:
    """Serve in this process. Raises `StartupError`."""
    from prometheus_client import REGISTRY

    from synthia_vllm.engine.vllm.client import VllmEngine
    from synthia_vllm.serve.app import create_app
    from synthia_vllm.serve.server import Server, listen
    from synthia_vllm.telemetry.metrics import Metrics

    port = listen(settings.host, settings.port)
    settings = settings.model_copy(update={"port": port.getsockname()[1]})
    server: Server | None = None

    def stop() -> None:
        if server is not None:
            server.should_exit = True

    engine = VllmEngine(
        model,
        settings.engine,
        name=settings.base_name,
        stream_pace=settings.stream_pace_ms / 1000,
    )
    app = create_app(
        engine,
        settings,
        Metrics(REGISTRY),
        progress=progress,
        on_failure=stop,
    )
    server = Server(app, settings)
    state = app.server_state
    if state.admission.open:
        _warn_of_open_server(settings)

    def reload_keys(*_: object) -> None:
        state.admission.reload_wanted = True

    signal.signal(signal.SIGHUP, reload_keys)
    server.run([port])
    if server.forced_exit:  # wait for nothing, neither threads nor processes
        engine.kill()
        os._exit(1)
    failure = state.failure
    if isinstance(failure, StartupError):
        raise failure
    if failure is not None:  # the engine died: a supervisor should start us again
        logs.tell_end(failure)
        return 1
    return 0


def _warn_of_open_server(settings: Settings) -> None:
    here = settings.host in ("127.0.0.1", "::1", "localhost")
    logging.getLogger(__name__).warning(
        "No key file: anybody who reaches %s:%d may use this server%s. "
        "`synthia-vllm keys new NAME` makes a key file, `--set keys_file=FILE` uses it.",
        settings.host,
        settings.port,
        ", that is, anybody on this machine" if here else ", FROM OTHER MACHINES TOO",
    )


if __name__ == "__main__":
    sys.exit(main())
