"""Real testnets for end-to-end tests: processes on loopback, driven by the command line."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = "tiny-random"
START_TIMEOUT_S = 240.0
COMMAND_TIMEOUT_S = 180.0


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

    def plait(self, *arguments: str, expect: int = 0) -> "subprocess.CompletedProcess[str]":
        """Run a ``plait`` command against this network and check its exit code."""
        finished = run_plait(self.environment, *arguments, timeout_s=COMMAND_TIMEOUT_S)
        assert finished.returncode == expect, f"plait {' '.join(arguments)}\n{finished.stderr}"
        return finished

    def json(self, *arguments: str, expect: int = 0) -> dict[str, Any]:
        """Run a command with ``--json`` and return the object on its last line."""
        finished = self.plait(*arguments, "--json", expect=expect)
        answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        return answer

    def nodes(self) -> dict[str, dict[str, Any]]:
        """``testnet status`` by node name."""
        return {node["name"]: node for node in self.control("status", as_json=True)["nodes"]}

    def run(self, prompt: str, *arguments: str) -> dict[str, Any]:
        """One generation."""
        return self.json("run", self.model, prompt, "--network", str(self.network), *arguments)

    def control(self, command: str, *nodes: str, as_json: bool = False) -> dict[str, Any]:
        """Run ``plait testnet COMMAND [NODE]`` on this testnet."""
        arguments = ("testnet", command, *nodes, "--dir", str(self.directory))
        if as_json:
            return self.json(*arguments)
        self.plait(*arguments)
        return {}

    def logs(self) -> str:
        """The end of every process's log, for a failing test to print."""
        parts = []
        for path in sorted((self.directory / "logs").glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-30:]
            parts.append(f"== {path.name}\n" + "\n".join(tail))
        return "\n".join(parts)


StartTestnet = Callable[..., Testnet]


def run_plait(
    environment: dict[str, str], *arguments: str, timeout_s: float
) -> "subprocess.CompletedProcess[str]":
    """Run ``plait`` in an environment and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "plait", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture(scope="package")
def testnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartTestnet]:
    """Give ``testnet(model, stages, replicas)``: a testnet of that shape, shared by this folder.

    Without ``stages`` it is the default: three spans and a second host of the first. A test
    that leaves a testnet other than it found it asks ``own_testnet`` for one. All end with the
    folder's last test: nodes that nobody uses would slow down what comes after.
    """
    started: dict[tuple[str, int | None, int, int], Testnet] = {}
    with contextlib.ExitStack() as ends:

        def start(
            model: str = TINY, stages: int | None = None, replicas: int = 1, *, authorities: int = 1
        ) -> Testnet:
            shape = (model, stages, replicas, authorities)
            if shape not in started:
                folder = tmp_path_factory.mktemp("testnet")
                started[shape] = ends.enter_context(_running(folder, *shape))
            return started[shape]

        yield start


@pytest.fixture(scope="module")
def own_testnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartTestnet]:
    """Give ``own_testnet(…)``: as ``testnet``, another one each time; all end with the module."""
    with contextlib.ExitStack() as ends:

        def start(
            model: str = TINY, stages: int | None = None, replicas: int = 1, *, authorities: int = 1
        ) -> Testnet:
            folder = tmp_path_factory.mktemp("own_testnet")
            return ends.enter_context(_running(folder, model, stages, replicas, authorities))

        yield start


@contextlib.contextmanager
def _running(
    folder: Path, model: str, stages: int | None, replicas: int, authorities: int
) -> Iterator[Testnet]:
    environment = {f"XDG_{name}_HOME": str(folder / name) for name in ("STATE", "CONFIG", "DATA")}
    made = Testnet(folder / "net", model, environment)
    shape = ["--model", model, "--authorities", str(authorities)]
    if stages is not None:
        shape += ["--stages", str(stages), "--replicas", str(replicas)]
    try:
        finished = run_plait(
            environment,
            *("testnet", "up", *shape, "--detach", "--dir", str(made.directory)),
            timeout_s=START_TIMEOUT_S,
        )
        assert finished.returncode == 0, f"{finished.stderr}\n{made.logs()}"
        yield made
    finally:
        run_plait(
            environment,
            *("testnet", "down", "--dir", str(made.directory)),
            timeout_s=COMMAND_TIMEOUT_S,
        )
