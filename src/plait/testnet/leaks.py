"""What a testnet holds while it is idle: pages, sessions, processes, tasks, descriptors."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.client import AsyncClient
from plait.errors import PlaitError
from plait.node.control import ask
from plait.testnet import disks
from plait.testnet.folder import data_dir

QUIET_TIMEOUT_S = 60.0
"""Sessions whose client is gone end by themselves; offers are repeated every 15 s."""

TAPE_FOLDER = "tape"
"""Of a node: where its frames are kept until nobody may audit them any more."""


@dataclass(frozen=True, slots=True)
class NodeHoldings:
    """Of one node's process; tasks are None where it did not answer, or has none of a kind."""

    pid: int
    threads: int
    descriptors: int
    tasks: int | None = None
    gossip_tasks: int | None = None


SLACK = {"threads": 8, "descriptors": 24, "tasks": 16, "gossip_tasks": 24}
"""Connections and pools that a busy process keeps: more than that is called a leak."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Of the whole testnet: its processes and namespaces; of each living node by name the rest."""

    processes: int
    namespaces: int
    by_node: dict[str, NodeHoldings]


def holdings(directory: Path, status: dict[str, Any]) -> Holdings:
    """Look at the supervisor's process tree and ask its nodes; ``status`` is its answer."""
    supervisor = int(status["supervisor_pid"])
    pids = [supervisor, *_children(supervisor)]
    by_node = {}
    for node in status["nodes"]:
        name, pid = node["name"], node["pid"]
        if pid is not None:
            folder = data_dir(directory, name)
            told = _told(disks.seen_by(supervisor, folder) if status["disk_mb"] else folder)
            by_node[name] = NodeHoldings(
                pid,
                _count(pid, "task"),
                _descriptors(pid),
                told.get("tasks"),
                told.get("gossip_tasks"),
            )
    return Holdings(len(pids), len({_namespace(pid) for pid in pids}), by_node)


def grown(before: Holdings, after: Holdings) -> dict[str, Any]:
    """What there is more of than before; only processes that lived through it are compared."""
    return {
        "processes": max(0, after.processes - before.processes),
        "namespaces": max(0, after.namespaces - before.namespaces),
    } | {what: _grown_nodes(before, after, what, slack) for what, slack in SLACK.items()}


def _grown_nodes(before: Holdings, after: Holdings, what: str, slack: int) -> dict[str, int]:
    more = dict[str, int]()
    for name, now in after.by_node.items():
        old = before.by_node.get(name)
        if old is None or old.pid != now.pid:
            continue
        count, count_old = getattr(now, what), getattr(old, what)
        if count is not None and count_old is not None and count > count_old + slack:
            more[name] = count - count_old
    return more


def _told(folder: Path) -> dict[str, Any]:
    with suppress(PlaitError, OSError):
        return ask(folder, "status")
    return {}


async def wait_until_quiet(
    client: AsyncClient, names: dict[str, str], timeout_s: float = QUIET_TIMEOUT_S
) -> dict[str, Any]:
    """Wait until no offer speaks of sessions or taken pages; returns those that still do.

    ``names`` gives peers' names. A peer without an offer is reported as well.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        offers = client.view().offers
        busy = {
            names[peer]: {
                "kv_tokens": offer.kv_tokens_total - offer.kv_tokens_free,
                "sessions": offer.sessions_active,
            }
            for peer, offer in offers.items()
            if peer in names
            and (offer.kv_tokens_free != offer.kv_tokens_total or offer.sessions_active)
        }
        absent = sorted(name for peer, name in names.items() if peer not in offers)
        if (not busy and not absent) or time.monotonic() > deadline_s:
            return {"pages_and_sessions": busy, "nodes_without_offer": absent}
        await asyncio.sleep(0.5)


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _count(pid: int, what: str) -> int:
    with suppress(OSError):
        return len(list(Path(f"/proc/{pid}/{what}").iterdir()))
    return 0


def _descriptors(pid: int) -> int:
    """Open descriptors, but for the nameless files of what is kept for audits, by design."""
    count = 0
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                count += entry.readlink().parent.name != TAPE_FOLDER
    return count


def _namespace(pid: int) -> str:
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    return ""
