"""What counts as a leak of a node."""

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from plait.node.control import serve_control
from plait.testnet.folder import data_dir
from plait.testnet.leaks import SLACK, TAPE_FOLDER, Holdings, NodeHoldings, grown, holdings

STATUS = {
    "supervisor_pid": os.getpid(),
    "disk_mb": 0,
    "nodes": [{"name": "node-1", "pid": os.getpid()}, {"name": "node-2", "pid": None}],
}
FIGURES = {"threads": 10, "descriptors": 50, "tasks": 30, "gossip_tasks": 70}


def test_what_is_kept_for_audits_is_no_leak_and_what_is_spilt_is(tmp_path: Path) -> None:
    for folder in (TAPE_FOLDER, "spill"):
        (tmp_path / folder).mkdir()
        before = holdings(tmp_path, STATUS)
        files = [tempfile.TemporaryFile(dir=tmp_path / folder) for _ in range(30)]  # noqa: SIM115
        leaked = grown(before, holdings(tmp_path, STATUS))["descriptors"]
        for file in files:
            file.close()
        assert leaked == ({} if folder == TAPE_FOLDER else {"node-1": 30})


class Node:
    """Says how many tasks it has."""

    def status(self) -> dict[str, Any]:
        return {"tasks": 31, "gossip_tasks": 71}

    def drain(self) -> None:
        raise AssertionError("nobody asked for it")


async def test_a_living_node_is_asked_for_its_tasks(tmp_path: Path) -> None:
    folder = data_dir(tmp_path, "node-1")
    folder.mkdir(parents=True)
    async with serve_control(folder, Node()):
        found = (await asyncio.to_thread(holdings, tmp_path, STATUS)).by_node
    assert found.keys() == {"node-1"}
    assert (found["node-1"].tasks, found["node-1"].gossip_tasks) == (31, 71)
    assert holdings(tmp_path, STATUS).by_node["node-1"].tasks is None, "it does not answer"


def of_node(pid: int = 1, **changes: int | None) -> Holdings:
    return Holdings(3, 1, {"node-1": NodeHoldings(pid, **FIGURES | changes)})  # type: ignore[arg-type]


@pytest.mark.parametrize("what", SLACK)
def test_more_than_what_a_busy_process_keeps_is_a_leak_of_a_process_that_lived_on(
    what: str,
) -> None:
    before, usual = of_node(), FIGURES[what] + SLACK[what]
    assert not any(grown(before, of_node(**{what: usual})).values())
    found = grown(before, of_node(**{what: usual + 1}))
    assert {name for name, leaked in found.items() if leaked} == {what}
    assert found[what] == {"node-1": SLACK[what] + 1}
    assert not any(grown(before, of_node(2, **{what: 1000})).values()), "another process"


def test_a_node_that_does_not_say_how_many_tasks_it_has_is_not_compared() -> None:
    assert not any(grown(of_node(tasks=None), of_node(tasks=99)).values())
    assert not any(grown(of_node(), of_node(tasks=None, gossip_tasks=None)).values())
