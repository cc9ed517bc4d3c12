"""Testnets and gateways of real processes that live as long as a context.

For end-to-end tests and benchmarks: everything goes through the ``plait`` command, as a user's
does, in XDG folders of its own, so that the user's last testnet stays the last one.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from plait.errors import NetworkError
from plait.testnet.control import is_live

PLAIT = (sys.executable, "-m", "plait")
START_TIMEOUT_S = 240.0
COMMAND_TIMEOUT_S = 180.0
END_TIMEOUT_S = 30.0
LOG_LINES = 30
START_LINES_MAX = 100


class CommandFailed(NetworkError):
    """A ``plait`` command ended with another code than the expected one."""


def run_plait(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = COMMAND_TIMEOUT_S,
) -> "subprocess.CompletedProcess[str]":
    """Run ``plait`` and wait for it, whatever its exit code; raises ``TimeoutExpired``.

    If the wait is interrupted the command is told to end, and has the time to.
    """
    with subprocess.Popen(
        [*PLAIT, *arguments],
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except BaseException:
            _end(process)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@dataclass(frozen=True, slots=True)
class Testnet:
    """A running testnet and the environment its commands run in."""

    directory: Path
    model: str
    environment: dict[str, str]

    __test__ = False

    @property
    def network(self) -> Path:
        """The network file."""
        return self.directory / "network.toml"

    @property
    def account(self) -> Path:
        """The folder with the client's keys."""
        return self.directory / "client"

    def plait(
        self, *arguments: str, expect: int = 0, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> "subprocess.CompletedProcess[str]":
        """Run a ``plait`` command in this environment; raises ``CommandFailed``."""
        done = run_plait(*arguments, environment=self.environment, timeout_s=timeout_s)
        if done.returncode != expect:
            told = f"plait {' '.join(arguments)}: exit code {done.returncode}"
            raise CommandFailed(f"{told}, not {expect}\n{done.stdout}{done.stderr}")
        return done

    def json(self, *arguments: str, expect: int = 0) -> dict[str, Any]:
        """Run a command with ``--json`` and return the object on its last line."""
        done = self.plait(*arguments, "--json", expect=expect)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def nodes(self) -> dict[str, dict[str, Any]]:
        """``testnet status`` by node name."""
        return {node["name"]: node for node in self.control("status", as_json=True)["nodes"]}

    def run(self, prompt: str, *arguments: str) -> dict[str, Any]:
        """One generation by ``plait run``."""
        return self.json("run", self.model, prompt, "--network", str(self.network), *arguments)

    def control(self, command: str, *nodes: str, as_json: bool = False) -> dict[str, Any]:
        """Run ``plait testnet COMMAND [NODE]`` on this testnet."""
        arguments = ("testnet", command, *nodes, "--dir", str(self.directory))
        if as_json:
            return self.json(*arguments)
        self.plait(*arguments)
        return {}

    def logs(self) -> str:
        """The end of every process's log."""
        parts = []
        for path in sorted((self.directory / "logs").glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
            parts.append(f"== {path.name}\n" + "\n".join(tail))
        return "\n".join(parts)


@contextlib.contextmanager
def running_testnet(model: str, *options: str, folder: Path | None = None) -> Iterator[Testnet]:
    """A testnet that ends with the context; ``options`` are those of ``plait testnet up``.

    It is made in ``folder``, by default in a temporary one. SIGTERM to this process ends it too,
    as Ctrl-C does. Raises ``CommandFailed``, with the nodes' logs, if it does not start.
    """
    with contextlib.ExitStack() as ends:
        if folder is None:
            folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="plait-")))
        ends.enter_context(_sigterm_interrupts())
        xdg = {f"XDG_{name}_HOME": str(folder / name) for name in ("STATE", "CONFIG", "DATA")}
        net = Testnet(folder / "net", model, xdg)
        where = ("--dir", str(net.directory))
        ends.callback(_down, net)
        try:
            up = ("testnet", "up", "--detach", "--model", model, *options, *where)
            net.plait(*up, timeout_s=START_TIMEOUT_S)
        except CommandFailed as error:
            raise CommandFailed(f"{error}\n{net.logs()}") from None
        yield net


def _down(net: Testnet) -> None:
    if is_live(net.directory):  # it may have been ended by whoever used it
        net.control("down")


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises ``KeyboardInterrupt``, as Ctrl-C does, so that contexts are left."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, slots=True)
class ServedGateway:
    """A gateway's process and the URL of its API, up to ``/v1``."""

    url: str
    process: "subprocess.Popen[str]"

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.removesuffix("/v1").rpartition(":")[2])


@contextlib.contextmanager
def serving(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    command: tuple[str, ...] = (*PLAIT, "serve", "--port", "0"),
) -> Iterator[ServedGateway]:
    """A gateway on a free port that ends with the context, and at SIGTERM to this process.

    ``command`` is what serves; it must print the base URL. Raises ``NetworkError`` if it does not.
    """
    with (
        _sigterm_interrupts(),
        subprocess.Popen(
            [*command, *arguments],
            env=os.environ | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            url = _base_url(process.stdout)
            # Whatever else it prints is read and dropped, or it would wait for us.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield ServedGateway(url, process)
        finally:
            _end(process)


def _base_url(output: IO[str]) -> str:
    lines: list[str] = []
    for line in output:
        if found := re.search(r"http://\S+?/v1", line):
            return found[0]
        lines.append(line)
        if len(lines) >= START_LINES_MAX:
            break
    raise NetworkError("the gateway did not start:\n" + "".join(lines))


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
