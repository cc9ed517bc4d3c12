"""The supervisor with real processes that stand in for nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from plait.errors import ConfigError
from plait.testnet import control, launch
from plait.testnet.control import NodeFailed, NotRunning, await_node, is_live, request
from plait.testnet.folder import data_dir
from plait.testnet.layout import place

pytestmark = pytest.mark.slow

STANDIN = (sys.executable, "-P", "-m", "plait.testing.standin")


class Testnet:
    """One testnet of stand-ins."""

    __test__ = False

    def __init__(self, directory: Path, command: Sequence[str] = STANDIN) -> None:
        self.directory = directory
        self.process = launch.start(
            directory,
            place(30, nodes=4),
            model="tiny",
            command=command,
        )

    def wait_until_ready(self) -> None:
        launch.wait_until_ready(
            self.directory, self.process, timeout_s=30, tell=lambda message: None
        )

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node["name"]: node for node in request(self.directory, "status")["nodes"]}

    def end(self) -> None:
        launch.abandon(self.directory, self.process)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A folder whose path does not fit the address of a Unix socket."""
    return tmp_path / ("d" * 100) / "net"


@pytest.fixture
def testnet(deep: Path) -> Iterator[Testnet]:
    testnet = Testnet(deep)
    try:
        testnet.wait_until_ready()
        yield testnet
    finally:
        testnet.end()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_status_lists_every_node_with_its_process(testnet: Testnet) -> None:
    nodes = testnet.nodes()
    assert [node["span"] for node in nodes.values()] == [[0, 10], [10, 20], [20, 30], [0, 10], None]
    assert {node["state"] for node in nodes.values()} == {"ready"}
    assert nodes["ledger-1"]["roles"] == ["ledger"]
    assert all(runs(node["pid"]) for node in nodes.values())
    log = (testnet.directory / "logs" / "node-2.log").read_text()
    assert log == "node-2 serves 10:20\n"


def test_a_killed_node_stays_listed_as_dead_and_comes_back(testnet: Testnet) -> None:
    before = testnet.nodes()["node-1"]
    request(testnet.directory, "kill", "node-1")
    dead = await_node(testnet.directory, "node-1", ("dead",))
    assert dead["pid"] is None
    assert not runs(before["pid"])
    assert testnet.nodes()["node-4"]["state"] == "ready"
    with pytest.raises(ConfigError, match=r"node-1 is not running \(dead\)"):
        request(testnet.directory, "kill", "node-1")
    request(testnet.directory, "restart", "node-1")
    after = await_node(testnet.directory, "node-1", ("ready",), starts=2)
    assert after["pid"] != before["pid"]
    assert after["peer"] == before["peer"]


def test_a_stopped_node_is_stopped_and_a_restarted_one_is_another_process(
    testnet: Testnet,
) -> None:
    request(testnet.directory, "stop", "node-2")
    assert await_node(testnet.directory, "node-2", ("stopped", "dead"))["state"] == "stopped"
    before = testnet.nodes()["node-3"]
    answer = request(testnet.directory, "restart", "node-3")
    assert answer["nodes"][2]["starts"] == 2, "counted from the moment it is asked for"
    after = await_node(testnet.directory, "node-3", ("ready",), starts=2)
    assert after["pid"] != before["pid"]
    assert not runs(before["pid"])


def test_a_node_that_ignores_the_request_to_stop_is_killed(testnet: Testnet) -> None:
    (data_dir(testnet.directory, "node-1") / "deaf").touch()
    request(testnet.directory, "restart", "node-1")
    await_node(testnet.directory, "node-1", ("ready",), starts=2)
    request(testnet.directory, "stop", "node-1")
    assert await_node(testnet.directory, "node-1", ("stopped", "dead"))["state"] == "dead"


def test_a_node_that_fails_to_come_back_is_reported_with_its_log(testnet: Testnet) -> None:
    (data_dir(testnet.directory, "node-1") / "crash").touch()
    request(testnet.directory, "restart", "node-1")
    with pytest.raises(NodeFailed, match="no luck today"):
        await_node(testnet.directory, "node-1", ("ready",), starts=2)


def test_down_ends_everything_and_waits(testnet: Testnet) -> None:
    pids = [node["pid"] for node in testnet.nodes().values()] + [testnet.process.pid]
    (data_dir(testnet.directory, "node-1") / "deaf").touch()
    request(testnet.directory, "restart", "node-1")
    control.down(testnet.directory)
    assert not any(map(runs, pids))
    assert not is_live(testnet.directory)
    assert not (testnet.directory / "control.sock").exists()
    with pytest.raises(NotRunning):
        control.down(testnet.directory)
    with pytest.raises(NotRunning, match="no testnet is running"):
        request(testnet.directory, "status")


def test_no_node_outlives_a_killed_supervisor(testnet: Testnet) -> None:
    pids = [node["pid"] for node in testnet.nodes().values()]
    testnet.process.kill()
    testnet.process.wait()
    eventually(lambda: not any(map(runs, pids)))
    control.wait_until_gone(testnet.directory, 5)


def test_a_live_folder_is_not_used_again(testnet: Testnet) -> None:
    before = (testnet.directory / "testnet.json").read_bytes()
    with pytest.raises(ConfigError, match="already running"):
        Testnet(testnet.directory)
    assert (testnet.directory / "testnet.json").read_bytes() == before


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"command": "kill", "node": "node-9"}, "there is no node 'node-9'; there are node-1"),
        ({"command": "dance"}, "there is no command 'dance'"),
        ({}, "not a command"),
        ([], "not a command"),
        ({"command": "kill", "node": ["node-1"]}, "there is no node"),
    ],
)
def test_a_wrong_command_is_refused(testnet: Testnet, message: Any, error: str) -> None:
    with control._connected(testnet.directory) as stream:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()
        assert error in json.loads(stream.readline())["error"]
    assert testnet.nodes()["node-1"]["state"] == "ready"


def test_a_node_that_ends_at_the_start_is_named_with_its_log(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAIT_STANDIN_CRASH", "node-3")
    testnet = Testnet(deep)
    try:
        with pytest.raises(NodeFailed, match=r"node-3 ended while starting(.|\n)*no luck today"):
            testnet.wait_until_ready()
    finally:
        testnet.end()
    assert not is_live(deep)


def test_a_supervisor_that_cannot_start_is_reported(deep: Path) -> None:
    testnet = Testnet(deep, (sys.executable, "-c", "raise SystemExit('nothing works')"))
    with pytest.raises(NodeFailed, match="nothing works"):
        testnet.wait_until_ready()
    testnet.end()


def test_the_testnet_of_a_terminal_ends_with_it(deep: Path, tmp_path: Path) -> None:
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import signal\n"
        "from pathlib import Path\n"
        "from plait.testnet import launch\n"
        "from plait.testnet.layout import place\n"
        f"launch.start(Path({str(deep)!r}), place(30, nodes=2), model='tiny',\n"
        f"             with_parent=True, command={STANDIN!r})\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, str(starter)]) as terminal:
        eventually((deep / "control.sock").exists)
        pids = [node["pid"] for node in request(deep, "status")["nodes"]]
        os.kill(terminal.pid, signal.SIGKILL)
    control.wait_until_gone(deep, 10)
    assert len(pids) == 3
    assert not any(map(runs, pids))
