"""Healing a testnet of stand-ins: found by looking, each trouble on its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plait.errors import ConfigError
from plait.testnet import disks, launch
from plait.testnet.control import NotRunning, await_node, request
from plait.testnet.folder import data_dir
from plait.testnet.healing import check_whole, heal
from plait.testnet.layout import place
from plait.testnet.slowdown import Quota, is_held, is_stopped, release

pytestmark = pytest.mark.slow

STANDIN = (sys.executable, "-P", "-m", "plait.testing.standin")
IS_ROOT = os.geteuid() == 0


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A testnet with links to cut and, as root, disks to fill."""
    placed, folder = place(30, nodes=4), tmp_path / "net"
    process = launch.start(
        folder,
        placed,
        model="tiny",
        wan=launch.choose_wan("lan", placed, unprivileged=True),
        disk_mb=4 if IS_ROOT else 0,
        command=STANDIN,
    )
    try:
        launch.wait_until_ready(folder, process, timeout_s=30, tell=lambda message: None)
        yield folder
    finally:
        launch.abandon(folder, process)


def node(directory: Path, name: str) -> dict[str, Any]:
    status = request(directory, "status")
    return next(one for one in status["nodes"] if one["name"] == name)


def disk_of(directory: Path, name: str) -> Path:
    supervisor = request(directory, "status")["supervisor_pid"]
    return disks.seen_by(supervisor, data_dir(directory, name))


def cut_off(directory: Path, name: str) -> None:
    request(directory, "shape", change={"sources": [], "targets": [name], "cut": True})


def test_one_node_that_cannot_be_healed_keeps_no_other_from_it(directory: Path) -> None:
    (disk_of(directory, "node-1") / "crash").touch()
    for name in ("node-1", "node-4"):
        request(directory, "kill", name)
        await_node(directory, name, ("dead",))
    request(directory, "hang", "node-2")
    cut_off(directory, "node-3")
    if IS_ROOT:
        disks.fill(disk_of(directory, "node-3"))
    done = heal(directory, timeout_s=10)
    (failed,) = done.failed
    assert failed.startswith("node-1 does not become ready: node-1 ended while starting")
    assert {"node-4 is dead", "node-2 is hung"} <= set(done.healed)
    assert ("the disk of node-3 is full" in done.healed) == IS_ROOT
    assert node(directory, "node-4")["state"] == "ready"
    assert node(directory, "node-2")["hung"] is False
    assert not any(link["cut"] for link in request(directory, "shape")["links"])
    assert not IS_ROOT or not disks.is_filled(disk_of(directory, "node-3"))


def test_what_nobody_remembers_is_found_and_named(directory: Path) -> None:
    check_whole(directory)
    assert heal(directory).healed == ()
    pid = node(directory, "node-2")["pid"]
    os.kill(pid, signal.SIGSTOP)
    request(directory, "stop", "node-1")
    await_node(directory, "node-1", ("stopped",))
    with pytest.raises(ConfigError, match="not whole: node-1 is stopped, node-2 is hung") as caught:
        check_whole(directory)
    assert caught.value.remedy == "plait testnet heal"
    assert heal(directory).healed == ("node-1 is stopped", "node-2 is hung")
    assert not is_stopped(pid)
    check_whole(directory)


def test_of_much_that_is_wrong_the_first_is_named_and_the_rest_counted(directory: Path) -> None:
    cut_off(directory, "node-3")
    cut_off(directory, "node-4")
    with pytest.raises(ConfigError, match=r"the link from \S+ to node-\d is cut.* and 4 more"):
        check_whole(directory)


def test_a_quota_is_ended_by_whom_did_not_make_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        try:
            try:
                Quota(process.pid, 0.5)
            except OSError as error:
                pytest.skip(f"no CPU quota here: {error}")
            assert is_held(process.pid)
            release(process.pid)
            assert not is_held(process.pid)
            Quota(process.pid, 0.5).close()
        finally:
            process.kill()


def test_where_nothing_runs_nothing_is_healed(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        heal(tmp_path)
