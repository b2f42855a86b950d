"""``synthia-vllm usage``: who used what, from the ledger that servers write."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.errors import StartupError
from synthia_vllm.ledger.place import DEFAULT, NONE, default_file, parse
from synthia_vllm.ledger.rows import COUNTS, GROUPS, parse_groups, parse_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from synthia_vllm.ledger.database import Database

_EXAMPLES: Final = """\
examples:
  synthia-vllm usage                                    all there is, by user and model
  synthia-vllm usage --since 2026-01-01 --until 2026-02-01 --by user
  synthia-vllm usage --by day,model --csv > usage.csv
  synthia-vllm usage --config config/server.yaml --json
  SYNTHIA_LEDGER=postgresql://synthia@db/usage synthia-vllm usage --by user,hour

Times are UTC; a time given without a zone is, too. Rows are of whole hours, in which requests
ended: --since is rounded to the earlier one, --until (that is, before it) to the later. `refused`
are those of the requests that were answered with an error; `cached` is a part of `prompt`. A user
"-" had no valid key, a model "-" was not known when a request was refused.
"""
_HEADINGS: Final = {"prompt_tokens": "prompt", "cached_tokens": "cached", "answer_tokens": "answer"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = "Show who used what, from the ledger that servers write."
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--since", metavar="TIME", help="from this hour on, as 2026-01-31T12:00Z")
    parser.add_argument("--until", metavar="TIME", help="before this hour")
    parser.add_argument(
        "--by",
        default="user,model",
        metavar="NAMES",
        help=f"what to add up by: {', '.join(GROUPS)}, with commas (default: user,model)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="as CSV")
    form.add_argument("--json", action="store_true", help="as a list of objects")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--ledger", metavar="URL", help="the ledger (default: SYNTHIA_LEDGER, or the usual file)"
    )
    where.add_argument(
        "--config", type=Path, metavar="FILE", help="a server's configuration, which names it"
    )


def run(args: argparse.Namespace) -> int:
    """Show it; return the exit code. Raises `StartupError`."""
    since = until = None
    name = "--by"
    try:
        groups = parse_groups(args.by, GROUPS)
        name = "--since"
        if args.since is not None:
            since = parse_time(args.since)
        name = "--until"
        if args.until is not None:
            until = parse_time(args.until, end=True)
    except ValueError as error:
        raise StartupError(f"{name}: {error}.") from None
    from synthia_vllm.ledger.database import Away

    database = _database(args)
    try:
        rows = database.totals(groups, since=since, until=until)
    except Away as error:
        raise StartupError(
            f"The ledger {database} cannot be read: {error}. The server's setting `ledger` says "
            "where it is; `--config FILE` or `--ledger URL` name another."
        ) from None
    finally:
        database.close()
    _show(args, groups, rows)
    return 0


def _database(args: argparse.Namespace) -> Database:
    from synthia_vllm.settings import load

    flags = [] if args.ledger is None else [("--ledger", "ledger", args.ledger)]
    # Of the environment the ledger alone: what else a server is told there may not be for here.
    environ = {name: value for name, value in os.environ.items() if name == "SYNTHIA_LEDGER"}
    setting = load(args.config, environ, flags).ledger
    if setting == NONE:
        raise StartupError("The setting `ledger` is `none`: this server keeps no ledger.")
    from sqlalchemy import URL

    from synthia_vllm.ledger.database import Database

    if setting == DEFAULT:
        url = URL.create("sqlite", database=str(default_file()))
    else:
        url = parse(setting)
    if url.drivername == "sqlite" and not Path(url.database or "").is_file():
        raise StartupError(
            f"There is no ledger {url.database}: a server makes it. Its setting `ledger` says "
            "where; `--config FILE` or `--ledger URL` name another."
        )
    return Database(url)


def _show(args: argparse.Namespace, groups: Sequence[str], rows: list[dict[str, Any]]) -> None:
    names = [*groups, *COUNTS]
    if args.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    elif args.csv:
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif not rows:
        print("Nothing was used in that time.", file=sys.stderr)
    else:
        _table(groups, names, rows)


def _table(groups: Sequence[str], names: Sequence[str], rows: list[dict[str, Any]]) -> None:
    total = {name: sum(row[name] for row in rows) for name in COUNTS}
    lines = [[_HEADINGS.get(name, name) for name in names]]
    lines += [[_cell(row[name]) for name in names] for row in rows]
    lines.append(["all", *[""] * (len(groups) - 1), *(_cell(total[name]) for name in COUNTS)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if position < len(groups) else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    if "day" in groups or "hour" in groups:
        print("Times are UTC.", file=sys.stderr)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
