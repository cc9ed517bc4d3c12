"""From arguments to an exit code: lazy commands, and errors as one line and one remedy."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from plait.cli import COMMANDS, overview
from plait.cli.output import emit_json, flag
from plait.errors import ConfigError, PlaitError, reworded
from plait.logs import to_stderr

INTERRUPTED = 130
READER_GONE = 141
"""As a shell reports a command that SIGPIPE ended: never 0, which would say "verified"."""


class LazyGroup(TyperGroup):
    """The root command: imports a command's module when that command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and build one command, or ``None`` for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer does, but suggesting from the table."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise ConfigError(f"there is no command {args[0]!r}", remedy=_nearest(args[0]))
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the same text as the fast path of ``plait --help``."""
        formatter.write(overview() + "\n")


def invoke(arguments: Sequence[str]) -> int:
    """Run a command line and report its errors; returns the exit code, raises nothing."""
    wants_json = "--json" in arguments
    to_stderr(logging.INFO if os.environ.get("PLAIT_DEBUG") == "1" else logging.WARNING)
    try:
        result = _root().main(args=list(arguments), prog_name="plait", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except PlaitError as error:
        return _report(error, wants_json)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as request:
        if isinstance(request.__context__, BrokenPipeError):
            return _reader_gone()
        raise
    except typer.TyperException as error:
        return _report_usage(error, wants_json)
    except Exception as error:  # noqa: BLE001 - the task boundary: no traceback reaches a user
        return _report_bug(error, wants_json)


def _reader_gone() -> int:
    """Whoever read our output went away, as in ``plait peers | head``."""
    # The interpreter's own flush at exit must not fail on the same pipe.
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    return READER_GONE


def _root() -> Any:
    app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, add_completion=True)
    app.callback()(_version_is_handled_before)
    return get_command(app)


def _version_is_handled_before() -> None:
    """The root command has no action of its own."""


def _load(name: str) -> Any:
    entry = COMMANDS[name]
    target = getattr(import_module(entry.module), entry.attribute)
    if isinstance(target, typer.Typer):
        command = get_command(target)
    else:
        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        app.command(name)(target)
        command = get_command(app)
    command.name = name
    _make_plain(command)
    return command


def _make_plain(command: Any) -> None:
    """Write help without rich, which takes longer to import than most commands run."""
    command.rich_markup_mode = None
    command.params = [
        parameter
        for parameter in command.params
        if parameter.name not in ("install_completion", "show_completion")
    ]
    for child in getattr(command, "commands", {}).values():
        _make_plain(child)


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    nearest = get_close_matches(name, COMMANDS, n=1)
    return f"plait {nearest[0]}" if nearest else "plait --help"


def _report(error: PlaitError, wants_json: bool) -> int:
    _write_error(error.code, str(error), reworded(error.remedy, flag), wants_json)
    return error.exit_code


def _report_usage(error: typer.TyperException, wants_json: bool) -> int:
    context = getattr(error, "ctx", None)
    if context is not None and type(error).__name__ == "NoArgsIsHelpError":
        print(context.get_help())
        return 0
    path = context.command_path if context is not None else "plait"
    _write_error(ConfigError.code, error.format_message(), f"{path} --help", wants_json)
    return ConfigError.exit_code


def _report_bug(error: Exception, wants_json: bool) -> int:
    if os.environ.get("PLAIT_DEBUG") == "1":
        traceback.print_exception(error)
    message = f"{type(error).__name__}: {error}".rstrip(": ")
    message = " ".join(message.split()) + " (this is a bug in Plait)"
    _write_error("bug", message, "the same command with PLAIT_DEBUG=1", wants_json)
    return PlaitError.exit_code


def _write_error(code: str, message: str, remedy: str, wants_json: bool) -> None:
    sys.stdout.flush()
    from plait.ledger.report import printable

    message = printable(message)  # a peer's words may be in it
    print(f"error: {message}", file=sys.stderr)
    if remedy:
        print(f"try: {remedy}", file=sys.stderr)
    if wants_json:
        emit_json({"error": {"code": code, "message": message, "remedy": remedy}})
