"""``plait node drain --wait-s``: how it ended, in words, JSON and exit code."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from plait.cli.root import invoke
from plait.node.control import serve_control
from plait.node.state import DrainEnd, DrainFile

PID = os.getpid()
TIME_UP = DrainEnd(PID, 3, "the time to drain was up")


class FakeNode:
    """Ends its drain as it is told to."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def status(self) -> dict[str, Any]:
        return {
            "name": "one",
            "peer": "12D3KooW",
            "roles": ["stage"],
            "state": "draining" if self.asked.is_set() else "ready",
            "pid": PID,
            "sessions": 3,
        }

    def drain(self) -> None:
        self.asked.set()


async def drained(folder: Path, end: DrainEnd | None, *options: str) -> int:
    """The exit code of the command while a node drains that leaves ``end`` behind."""
    node = FakeNode()
    arguments = ["node", "drain", "--data-dir", str(folder), "--json", *options]
    async with asyncio.TaskGroup() as tasks:
        async with serve_control(folder, node):
            command = tasks.create_task(asyncio.to_thread(invoke, arguments))
            await node.asked.wait()
            if not options:
                return await command
            if end is not None:
                DrainFile(folder).write(end)
        return await command


@pytest.mark.parametrize(
    ("end", "code", "left", "words"),
    [
        (DrainEnd(PID), 0, 0, "the node is drained"),
        (TIME_UP, 1, 3, "3 sessions were ended before they had moved: the time to drain was up"),
        (None, 1, None, "ended without saying how"),
        (DrainEnd(PID + 1), 1, None, "ended without saying how"),
    ],
    ids=["moved", "time up", "killed", "of an earlier process"],
)
async def test_how_a_drain_ended_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    end: DrainEnd | None,
    code: int,
    left: int | None,
    words: str,
) -> None:
    assert await drained(tmp_path, end, "--wait-s", "30") == code
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert (told["state"], told["sessions_ended"]) == ("stopped", left)
    assert (told["name"], told["pid"]) == ("one", PID)
    assert words in captured.err


async def test_without_waiting_it_only_says_that_it_drains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await drained(tmp_path, None) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == "draining"
    assert "the node is draining" in captured.err


async def test_a_node_that_still_runs_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve_control(tmp_path, FakeNode()):
        arguments = ["node", "drain", "--data-dir", str(tmp_path), "--wait-s", "0.01"]
        assert await asyncio.to_thread(invoke, arguments) == 5
    assert "still runs after 0.01 s" in capsys.readouterr().err


def test_what_an_earlier_process_left_is_forgotten(tmp_path: Path) -> None:
    file = DrainFile(tmp_path)
    file.write(TIME_UP)
    assert file.read(PID) == TIME_UP
    file.clear()
    assert file.read(PID) is None
    (tmp_path / "drained").write_text('{"sessions": 3}')
    assert file.read(PID) is None
    DrainFile(tmp_path / "absent").write(TIME_UP)
