"""``plait usage``: what the gateway's keys have spent."""

import csv
import sys
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.keys import JsonOption, NetworkOption, open_store
from plait.cli.output import emit_json, table
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.gateway.key_store import UsageRow

_SUMS = ("requests", "prompt_tokens", "completion_tokens", "cost")
_GROUPS = ("key", "label", "team", "day", "model")


def usage(
    by: Annotated[
        str, typer.Option(help="Columns to sum over, of key, label, team, day and model.")
    ] = "key,day,model",
    since: Annotated[str, typer.Option(help="First day (UTC), as 2026-11-25.")] = "",
    until: Annotated[str, typer.Option(help="Last day (UTC).")] = "",
    csv_path: Annotated[
        Path | None, typer.Option("--csv", help="Write CSV here; - is stdout.")
    ] = None,
    network: NetworkOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show requests, tokens and microcredits by key, model and day.

    Example: plait usage --by team,day --since 2026-11-01 --csv usage.csv
    """
    groups = [name.strip() for name in by.split(",")]
    if unknown := [name for name in groups if name not in _GROUPS]:
        raise ConfigError(f"there is no column {unknown[0]!r}", remedy="--by key,day,model")
    for flag, day in (("--since", since), ("--until", until)):
        _check_day(flag, day)
    store = open_store(network)
    try:
        rows = _summed(store.usage(since, until or "9999-99-99"), groups)
    finally:
        store.close()
    columns = [*groups, *_SUMS]
    if csv_path is not None:
        _write_csv(csv_path, columns, rows)
    elif as_json:
        emit_json(rows)
    else:
        table(columns, [[row[name] for name in columns] for row in rows])


def _check_day(flag: str, day: str) -> None:
    try:
        # Days are compared as text: another ISO form of one would compare wrongly.
        ok = not day or date.fromisoformat(day).isoformat() == day
    except ValueError:
        ok = False
    if not ok:
        raise ConfigError(f"{flag} {day}: not a day", remedy=f"{flag} 2026-11-25")


def _summed(rows: "list[UsageRow]", groups: list[str]) -> list[dict[str, Any]]:
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        values = {field.name: getattr(row, field.name) for field in fields(row)}
        group = tuple(values[name] for name in groups)
        named = dict(zip(groups, group, strict=True))
        total = sums.setdefault(group, named | dict.fromkeys(_SUMS, 0))
        for name in _SUMS:
            total[name] += values[name]
    return list(sums.values())


def _write_csv(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    def write(file: Any) -> None:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

    if str(path) == "-":
        write(sys.stdout)
        return
    try:
        with path.open("w", newline="") as file:
            write(file)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}", remedy="--csv - writes to stdout"
        ) from error
