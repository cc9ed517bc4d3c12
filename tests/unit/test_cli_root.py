"""The command line as a whole: help, lazy commands, errors, exit codes."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType

import pytest

from plait import __version__, cli
from plait.cli import COMMANDS, Command, main, overview
from plait.errors import BadSignature, ConfigError, NoRoute

HELP_BUDGET_S = 0.25


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``plait probe …``, where the command does what the test says."""

    def act(action: Callable[[], object], *arguments: str) -> int:
        module = ModuleType("probe_command")

        def probe(json: bool = False) -> object:
            """Do what the test says."""
            return action()

        module.__dict__["probe"] = probe
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(COMMANDS, "probe", Command("probe_command", "probe", "Test."))
        monkeypatch.setattr(sys, "argv", ["plait", "probe", *arguments])
        return main()

    return act


def fails(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "plait", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plait", *arguments])
    assert main() == 0
    out = capsys.readouterr().out
    assert out == overview() + "\n"
    assert all(f"  {name} " in out and command.help in out for name, command in COMMANDS.items())


@pytest.mark.slow
def test_help_is_quick_and_loads_no_command() -> None:
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        finished = run("--help")
        durations.append(time.perf_counter() - start)
    assert finished.stdout == overview() + "\n"
    assert min(durations) <= HELP_BUDGET_S


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plait", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"plait {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_points_at_commands_that_exist(name: str) -> None:
    command = COMMANDS[name]
    assert callable(getattr(importlib.import_module(command.module), command.attribute))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    finished = run(name, "--help")
    assert finished.returncode == 0, finished.stderr
    assert f"plait {name}" in finished.stdout


def test_a_command_runs_and_its_integer_is_the_exit_code(act: Callable[..., int]) -> None:
    assert act(lambda: None) == 0
    assert act(lambda: 2) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no such file", remedy="another one"), 3),
        (NoRoute("nobody hosts 3:5", remedy="wait"), 7),
        (BadSignature("not signed"), BadSignature.exit_code),
    ],
)
def test_an_error_is_one_line_and_its_remedy(
    act: Callable[..., int],
    error: ConfigError,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert act(fails(error)) == code
    captured = capsys.readouterr()
    expected = f"error: {error}\n" + (f"try: {error.remedy}\n" if error.remedy else "")
    assert (captured.out, captured.err) == ("", expected)


def test_with_json_an_error_is_an_object_too(
    act: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert act(fails(NoRoute("nobody", remedy="wait")), "--json") == 7
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "error": {"code": "no-route", "message": "nobody", "remedy": "wait"}
    }
    assert captured.err == "error: nobody\ntry: wait\n"


def test_an_unexpected_error_is_called_a_bug_without_traceback(
    act: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PLAIT_DEBUG", raising=False)
    assert act(fails(ZeroDivisionError("division\nby zero"))) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[0] == (
        "error: ZeroDivisionError: division by zero (this is a bug in Plait)"
    )
    assert "Traceback" not in err
    monkeypatch.setenv("PLAIT_DEBUG", "1")
    assert act(fails(ZeroDivisionError())) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_silent(
    act: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert act(fails(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_reader_that_goes_away_causes_no_message() -> None:
    script = (
        "import sys; sys.argv = ['plait', 'probe']; from types import ModuleType\n"
        "from plait.cli import COMMANDS, Command, main\n"
        "module = ModuleType('probe'); sys.modules['probe'] = module\n"
        "module.probe = lambda: [print('x' * 1000) for _ in range(1000)] and None\n"
        "COMMANDS['probe'] = Command('probe', 'probe', '')\n"
        "sys.exit(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("arguments", "error", "remedy"),
    [
        (["testnt"], "there is no command 'testnt'", "plait testnet"),
        (["xyzzy"], "there is no command 'xyzzy'", "plait --help"),
        (["net", "shw"], "No such command 'shw'", "plait net --help"),
        (["net", "show", "--loud"], "No such option: --loud", "plait net show --help"),
        (["net", "create"], "Missing argument", "plait net create --help"),
    ],
)
def test_wrong_usage_is_a_configuration_error(
    arguments: list[str],
    error: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["plait", *arguments])
    assert main() == ConfigError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {error}")
    assert lines[-1] == f"try: {remedy}"


def test_a_group_without_a_command_shows_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plait", "net"])
    assert main() == 0
    assert "create" in capsys.readouterr().out


def test_importing_the_table_is_light() -> None:
    assert not {"typer", "rich"} & set(vars(cli))
