"""The control socket: commands, answers, and what is said when no node runs."""

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from plait.errors import ConfigError, NetworkError
from plait.node.control import SOCKET_NAME, answer, ask, serve_control
from plait.node.state import Incarnations


class FakeNode:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.drained = 0

    def status(self) -> dict[str, Any]:
        return {"state": "draining" if self.drained else "ready"}

    def drain(self) -> None:
        self.drained += 1


def test_commands_are_obeyed_and_nonsense_is_told_so() -> None:
    node = FakeNode()
    assert json.loads(answer(b'{"command": "status"}\n', node)) == {"state": "ready"}
    assert json.loads(answer(b'{"command": "drain"}\n', node)) == {"state": "draining"}
    assert node.drained == 1
    for line in (b"", b"drain\n", b"[]\n", b'{"command": 1}\n', b'{"command": "explode"}\n'):
        assert "error" in json.loads(answer(line, node))


async def test_a_command_asks_over_a_private_socket_in_however_deep_a_folder(
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    node = FakeNode()
    async with serve_control(folder, node):
        mode = (folder / SOCKET_NAME).stat().st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
        assert await asyncio.to_thread(ask, folder, "drain") == {"state": "draining"}
        with pytest.raises(NetworkError, match="explode"):
            await asyncio.to_thread(ask, folder, "explode")
    assert not (folder / SOCKET_NAME).exists()
    with pytest.raises(ConfigError, match="no node runs"):
        ask(folder, "status")


async def test_a_socket_left_by_a_dead_node_is_replaced_and_recognised(tmp_path: Path) -> None:
    import socket

    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / SOCKET_NAME))
    dead.close()
    with pytest.raises(ConfigError, match="no node runs"):
        ask(tmp_path, "status")
    async with serve_control(tmp_path, FakeNode()):
        assert await asyncio.to_thread(ask, tmp_path, "status") == {"state": "ready"}


def test_an_incarnation_rises_although_the_clock_is_put_back(tmp_path: Path) -> None:
    folder = Incarnations(tmp_path)
    assert folder.next(1_000) == 1_000
    assert folder.next(900) == 1_001
    assert folder.next(2_000) == 2_000
    (tmp_path / "incarnation").write_text("damaged")
    assert folder.next(3_000) == 3_000


def test_an_incarnation_is_above_all_that_was_said_while_the_clock_ran_ahead(
    tmp_path: Path,
) -> None:
    second_ns = 1_000_000_000
    first = Incarnations(tmp_path).next(1 * second_ns)
    Incarnations(tmp_path).note_issued(60_000)
    assert first < 60 * second_ns < Incarnations(tmp_path).next(2 * second_ns)


def test_what_was_said_before_the_clock_was_put_back_still_counts(tmp_path: Path) -> None:
    second_ns = 1_000_000_000
    running = Incarnations(tmp_path)
    running.next(1 * second_ns)
    running.note_issued(60_000)
    running.note_issued(20_000)
    assert Incarnations(tmp_path).next(21 * second_ns) > 60 * second_ns


def test_a_full_disk_does_not_end_a_node_that_publishes(tmp_path: Path) -> None:
    Incarnations(tmp_path / "absent").note_issued(60_000)
