"""The control socket: commands, answers, and what is said when no node runs."""

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from plait.errors import ConfigError, NetworkError
from plait.node.control import SOCKET_NAME, answer, ask, serve_control
from plait.node.state import next_incarnation


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
    path = tmp_path / "incarnation"
    assert next_incarnation(path, 1_000) == 1_000
    assert next_incarnation(path, 900) == 1_001
    assert next_incarnation(path, 2_000) == 2_000
    path.write_text("damaged")
    assert next_incarnation(path, 3_000) == 3_000
