"""The daemon's own decisions: when it ends, and what it leaves behind."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plait.errors import LedgerError
from plait.node.config import NodeConfig
from plait.node.daemon import _drained, _Node, _watch_writer, main
from plait.node.state import DrainEnd, StateFile
from plait.testing.accounting import key_of


class FakeStageNode:
    """Is empty after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.draining = False

    def drain(self) -> None:
        self.draining = True

    @property
    def is_empty(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def status(self) -> dict[str, Any]:
        return {"sessions": max(0, self.looks)}


def node_of(tmp_path: Path, looks: int, *, drain_s: float = 30.0) -> _Node:
    config = NodeConfig(
        name="one",
        network_file=tmp_path / "network.toml",
        data_dir=tmp_path,
        model="tiny-random",
        drain_s=drain_s,
    )
    node = _Node(config, key_of("one").peer_id, StateFile(tmp_path / "state"))
    node.stage = FakeStageNode(looks)  # type: ignore[assignment]
    return node


async def test_a_drained_node_ends_when_its_last_session_has_gone(tmp_path: Path) -> None:
    node = node_of(tmp_path, 2)
    node.on_signal()
    assert node.status()["state"] == "draining"
    assert await _drained(node) == DrainEnd(os.getpid())
    assert isinstance(node.stage, FakeStageNode)
    assert (node.stage.draining, node.stage.looks) == (True, -1)


@pytest.mark.parametrize(
    ("drain_s", "reason"), [(0.0, "the time to drain was up"), (30.0, "a second signal")]
)
async def test_a_node_does_not_wait_for_ever_and_says_what_it_ended(
    tmp_path: Path, drain_s: float, reason: str
) -> None:
    node = node_of(tmp_path, 10**9, drain_s=drain_s)
    node.on_signal()
    if drain_s:
        node.on_signal()
    async with asyncio.timeout(5):
        end = await _drained(node)
    assert (end.reason, end.sessions_ended) == (reason, 10**9 - 1)


async def test_the_state_is_told_inside_and_outside(tmp_path: Path) -> None:
    node = node_of(tmp_path, 3)
    node.become("ready")
    assert (tmp_path / "state").read_text() == "ready\n"
    told = node.status()
    assert (told["state"], told["sessions"], told["tasks"]) == ("ready", 3, 1)


async def test_a_ledger_whose_writer_stopped_ends_with_a_clear_error(tmp_path: Path) -> None:
    authority = SimpleNamespace(stopped=asyncio.Event())
    authority.stopped.set()
    with pytest.raises(LedgerError, match="writer has stopped") as caught:
        await _watch_writer(authority, tmp_path)  # type: ignore[arg-type]
    assert "disk" in caught.value.remedy


def test_an_unknown_model_leaves_no_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    config = NodeConfig(
        name="one", network_file=tmp_path / "network.toml", data_dir=folder, model="nosuch"
    )
    assert main(config) == 4
    assert not folder.exists()
    assert "nosuch" in capsys.readouterr().err
