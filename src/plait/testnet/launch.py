"""Bringing a testnet up until a complete route exists, and taking it down."""

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from plait.envelope import seal
from plait.errors import ConfigError, DeadlineExceeded, PlaitError
from plait.identity import load_key
from plait.network_file import NetworkFile, load_network_file
from plait.testnet import tun
from plait.testnet.cluster import check_reusable, create
from plait.testnet.control import (
    DOWN_TIMEOUT_S,
    POLL_S,
    NodeFailed,
    NotRunning,
    acquire_lock,
    request,
    wait_until_gone,
)
from plait.testnet.folder import (
    CLIENT_DIR,
    CONTROL_SOCKET,
    ISSUER_DIR,
    NETWORK_FILE,
    SUPERVISOR_NAME,
    log_path,
)
from plait.testnet.layout import Placed
from plait.testnet.ports import check_free
from plait.testnet.wan import Wan, profile_shape, translated_node
from plait.v1.ledger_pb2 import IssueOrder

CLIENT_CREDIT_MICROCREDITS = 10_000_000
START_TIMEOUT_S = 180.0
ROUTE_TIMEOUT_S = 30.0

SUPERVISOR_COMMAND = (sys.executable, "-P", "-m", "plait.testnet.supervisor")

# Read by the numeric libraries when they are imported: no thread pool before the fork.
_SUPERVISOR_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "GRPC_VERBOSITY": "NONE",
}

Tell = Callable[[str], None]
"""Told what is going on, in a line for the user."""


def start(
    directory: Path,
    placed: tuple[Placed, ...],
    *,
    model: str,
    dtype: str = "fp32",
    device: str = "cpu",
    wan: Wan | None = None,
    disk_mb: int = 0,
    with_parent: bool = False,
    authorities: int = 1,
    witnesses: int | None = None,
    command: Sequence[str] = SUPERVISOR_COMMAND,
) -> subprocess.Popen[bytes]:
    """Make the files and start the supervisor; returns its process at once.

    ``with_parent`` ends the testnet when the calling process ends. Raises ``ConfigError``
    if a testnet lives in ``directory`` already, or foreign files do.
    """
    check_reusable(directory)
    lock = acquire_lock(directory)
    try:
        cluster = create(
            directory,
            placed,
            model=model,
            dtype=dtype,
            device=device,
            wan=wan,
            disk_mb=disk_mb,
            authorities=authorities,
            witnesses=witnesses,
        )
        check_free(port for member in cluster.members for port in member.ports.used())
        arguments = [*command, str(directory)]
        if with_parent:
            arguments += ["--parent", str(os.getpid())]
        with log_path(directory, SUPERVISOR_NAME).open("ab") as log:
            return subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | _SUPERVISOR_ENVIRONMENT,
                pass_fds=(lock,),  # the processes of the testnet hold the lock from now on
                start_new_session=True,  # Ctrl-C reaches the command only, which then ends it
            )
    finally:
        os.close(lock)


def choose_wan(
    profile: str, placed: tuple[Placed, ...], *, unprivileged: bool = False, seed: int = 1
) -> Wan:
    """Decide who carries the traffic of a profile, and why.

    Network namespaces where we may make them, else the forwarder, which ``unprivileged``
    asks for. Raises ``ConfigError`` for an unknown profile and one that cannot be.
    """
    profile_shape(profile)
    hidden = ""
    if profile == "nat":
        hidden = translated_node([p.name for p in placed], [p.span for p in placed])
    reason = "asked for" if unprivileged else tun.missing()
    if not reason:
        why = "root, with network namespaces and TUN devices"
        return Wan(profile, "tun", why, tun.free_subnet(), seed, hidden)
    if hidden:
        raise ConfigError(
            f"the nat profile needs network namespaces: {reason}", remedy="run as root"
        )
    return Wan(profile, "forwarder", reason, 1 + os.getpid() % 250, seed)


def wait_until_ready(
    directory: Path, process: subprocess.Popen[bytes], *, timeout_s: float, tell: Tell
) -> None:
    """Wait until every node is ready.

    Raises ``NodeFailed`` with the end of its log if a node or the supervisor ends first,
    and ``DeadlineExceeded``.
    """
    deadline = time.monotonic() + timeout_s
    told: dict[str, str] = {}
    while True:
        for node in _nodes(directory, process):
            name, state = node["name"], node["state"]
            if state in ("dead", "stopped"):
                raise NodeFailed(directory, name)
            if told.get(name) != state:
                told[name] = state
                tell(f"{name}: {state}")
        if told and set(told.values()) == {"ready"}:
            return
        if time.monotonic() > deadline:
            waiting = ", ".join(name for name, state in told.items() if state != "ready")
            raise DeadlineExceeded(
                f"not ready after {timeout_s:g} s: {waiting or 'the supervisor'}",
                remedy=f"read the logs in {log_path(directory, SUPERVISOR_NAME).parent}",
            )
        time.sleep(POLL_S)


def wait_until_routable(directory: Path, model: str, *, timeout_s: float) -> None:
    """Wait until a client of the network sees a complete route; raises ``NoRoute``."""
    asyncio.run(_wait_for_route(directory, model, timeout_s))


def issue_credit(directory: Path) -> None:
    """Give the testnet's client its credit; issuing again changes nothing."""
    network = load_network_file(directory / NETWORK_FILE)
    asyncio.run(_issue(network, directory))


def abandon(directory: Path, process: subprocess.Popen[bytes]) -> None:
    """Take down a testnet whose start failed or was interrupted; raises nothing expected."""
    process.terminate()
    try:
        process.wait(DOWN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its nodes die with it
        process.wait()
    with suppress(PlaitError):
        wait_until_gone(directory, DOWN_TIMEOUT_S)


def _nodes(directory: Path, process: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    if process.poll() is not None:
        raise NodeFailed(directory, SUPERVISOR_NAME)
    if not (directory / CONTROL_SOCKET).exists():
        return []  # still importing
    with suppress(NotRunning):
        nodes: list[dict[str, Any]] = request(directory, "status")["nodes"]
        return nodes
    return []


async def _wait_for_route(directory: Path, model: str, timeout_s: float) -> None:
    from plait.client import AsyncClient

    account = directory / CLIENT_DIR
    async with AsyncClient(directory / NETWORK_FILE, account=account, audits=False) as client:
        await client.wait_ready(model, timeout_s)


async def _issue(network: NetworkFile, directory: Path) -> None:
    from plait.ledger.service.remote import RemoteLedger

    account = load_key(directory / CLIENT_DIR / "identity.key").peer_id
    order = IssueOrder(
        network_id=network.network_id,
        account=account,
        amount=CLIENT_CREDIT_MICROCREDITS,
        order_id=hashlib.sha256(f"{network.network_id} first credit".encode()).digest()[:16],
        memo="testnet",
        issued_ms=time.time_ns() // 1_000_000,
    )
    signed = seal(load_key(directory / ISSUER_DIR / "issuer.key"), order)
    for authority in network.authorities:
        ledger = RemoteLedger(authority)
        try:
            await ledger.issue(signed)
        finally:
            await ledger.close()
