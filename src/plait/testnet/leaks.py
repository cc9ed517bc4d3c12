"""What a testnet holds while it is idle: pages, sessions, processes, namespaces, descriptors."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.client import AsyncClient

QUIET_TIMEOUT_S = 60.0
"""Sessions whose client is gone end by themselves; offers are repeated every 15 s."""

TAPE_FOLDER = "tape"
"""Of a node: where its frames are kept until nobody may audit them any more."""

_DESCRIPTORS_SLACK = 24
_THREADS_SLACK = 8
"""Connections and pools that a busy process keeps: more than that is called a leak."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Of the whole testnet: its processes and namespaces; of each node: threads, descriptors."""

    processes: int
    namespaces: int
    by_node: dict[str, tuple[int, int, int]]
    """Name to pid, threads, open descriptors."""


def holdings(status: dict[str, Any]) -> Holdings:
    """Look at the supervisor's process tree; ``status`` is its answer."""
    supervisor = int(status["supervisor_pid"])
    pids = [supervisor, *_children(supervisor)]
    by_node = {
        node["name"]: (node["pid"], _count(node["pid"], "task"), _descriptors(node["pid"]))
        for node in status["nodes"]
        if node["pid"] is not None
    }
    return Holdings(len(pids), len({_namespace(pid) for pid in pids}), by_node)


def grown(before: Holdings, after: Holdings) -> dict[str, Any]:
    """What there is more of than before; only processes that lived through it are compared."""
    threads, descriptors = dict[str, int](), dict[str, int]()
    for name, (pid, threads_now, open_now) in after.by_node.items():
        old_pid, threads_old, open_old = before.by_node.get(name, (0, 0, 0))
        if pid != old_pid:
            continue
        if threads_now > threads_old + _THREADS_SLACK:
            threads[name] = threads_now - threads_old
        if open_now > open_old + _DESCRIPTORS_SLACK:
            descriptors[name] = open_now - open_old
    return {
        "processes": max(0, after.processes - before.processes),
        "namespaces": max(0, after.namespaces - before.namespaces),
        "threads": threads,
        "descriptors": descriptors,
    }


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
