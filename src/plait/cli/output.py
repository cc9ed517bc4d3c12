"""What commands write: results on stdout, everything else on stderr.

With ``--json`` a result is one object on one line of stdout, the last one.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plait.types import Span

Progress = Callable[[str, int, int], None]
"""Called with what is being fetched, bytes so far and bytes in all (0: unknown)."""


def emit_json(value: object) -> None:
    """Write one JSON value on one line of stdout.

    A span becomes ``[start, end]``, bytes hexadecimal, a set a sorted list, a dataclass an
    object. Raises ``TypeError`` for anything else that JSON cannot say.
    """
    print(json.dumps(value, ensure_ascii=False, default=_plain), flush=True)


def status(message: str) -> None:
    """Tell the user what is going on, on stderr."""
    print(message, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Print rows in aligned columns on stdout; ``None`` is shown as a dash."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if title:
        print(title)
    drawn = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        drawn.add_row(*("-" if cell is None else str(cell) for cell in row))
    # Piped output is not cut to a terminal's width: a script reads it.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, markup=False, highlight=False).print(drawn)


@contextmanager
def download_progress() -> Iterator[Progress]:
    """Give a callback that draws progress bars on stderr while the context is open."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Bars(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done_bytes: int, total_bytes: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total_bytes or None)
            bars.update(tasks[what], completed=done_bytes, total=total_bytes or None)

        yield advance


def _plain(value: object) -> object:
    match value:
        case Span():
            return [value.start, value.end]
        case bytes():
            return value.hex()
        case Path():
            return str(value)
        case set() | frozenset():
            return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"JSON cannot say {type(value).__name__}")


def flag(option: str) -> str:
    """How the command line spells an option that a remedy names."""
    if option == "explain":
        return "plait route MODEL --explain"
    return "--" + option.replace("_", "-")
