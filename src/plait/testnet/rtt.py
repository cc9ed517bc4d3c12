"""Round trips of a testnet as they are, not as they were configured.

Between namespaces: the time of a TCP handshake, from each end in turn, the median of a few.
Through the forwarder, whose handshakes are local: what the nodes and a new client measure
with their own pings.
"""

import asyncio
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from plait.testnet import tun
from plait.testnet.cluster import Cluster, load
from plait.testnet.control import request
from plait.testnet.folder import CLIENT_DIR, NETWORK_FILE
from plait.testnet.wan import CLIENT_LEG

CONNECT_TIMEOUT_S = 3.0
REPORTS_WAIT_S = 4.0
"""Long enough for a handful of a client's pings."""


def measure_links(directory: Path, *, repeats: int = 5) -> list[dict[str, Any]]:
    """Every ordered pair of ends: ``source``, ``target``, ``rtt_ms`` (None: no answer), ``method``.

    Raises ``NotRunning`` and, through the forwarder, what a client of the network raises.
    """
    status = request(directory, "status")
    cluster = load(directory)
    if cluster.wan is not None and cluster.wan.backend == "tun":
        pids = {node["name"]: node["pid"] for node in status["nodes"] if node["pid"] is not None}
        return _handshakes(cluster, pids, repeats)
    return asyncio.run(_reports(directory, cluster))


def _handshakes(cluster: Cluster, pids: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    rows = []
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for source in (*pids, CLIENT_LEG):
            if source != CLIENT_LEG:
                tun.enter_process(pids[source])
            try:
                rows += [
                    _row(source, member.name, _handshake_s(member.host, port, repeats), "handshake")
                    for member in cluster.members
                    if member.name != source and member.name in pids
                    for port in (member.ports.ledger or member.ports.public,)
                ]
            finally:
                tun.enter(home)
    finally:
        os.close(home)
    return rows


def _handshake_s(host: str, port: int, repeats: int) -> float | None:
    took_s = []
    for _ in range(repeats):
        started_s = time.monotonic()
        try:
            with socket.create_connection((host, port), CONNECT_TIMEOUT_S):
                pass
        except ConnectionRefusedError:
            pass  # a refusal has come the whole way, too
        except OSError:
            break
        took_s.append(time.monotonic() - started_s)
    return statistics.median(took_s) if took_s else None


async def _reports(directory: Path, cluster: Cluster) -> list[dict[str, Any]]:
    from plait.client import AsyncClient

    names = {member.peer: member.name for member in cluster.members}
    async with AsyncClient(
        directory / NETWORK_FILE, account=directory / CLIENT_DIR, audits=False
    ) as client:
        names[client.account.peer] = CLIENT_LEG
        await client.wait_settled()
        await asyncio.sleep(REPORTS_WAIT_S)
        measured = client.view().rtt_us
    return [
        _row(names[source], names[target], rtt_us / 1e6, "ping")
        for (source, target), rtt_us in measured.items()
        if source in names and target in names
    ]


def _row(source: str, target: str, rtt_s: float | None, method: str) -> dict[str, Any]:
    rtt_ms = None if rtt_s is None else round(rtt_s * 1000, 3)
    return {"source": source, "target": target, "rtt_ms": rtt_ms, "method": method}
