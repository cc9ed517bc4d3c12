"""The node daemon: builds the parts, keeps them in one task group, ends them cleanly."""

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.clock import clock_ms
from plait.errors import ConfigError, LedgerError, PlaitError
from plait.heap import freeze_heap
from plait.identity import load_or_create_key
from plait.logs import get_logger, to_stderr
from plait.model.catalog import load
from plait.net.tls import load_or_create
from plait.network_file import Authority, NetworkFile, load_network_file
from plait.node.config import NodeConfig
from plait.node.control import serve_control
from plait.node.state import DrainEnd, DrainFile, NodeState, StateFile, lock_data_dir
from plait.parent import watching_parent
from plait.task_scope import TaskScope
from plait.types import PeerId

if TYPE_CHECKING:  # torch and the ledger's storage are imported only for their roles
    from plait.ledger.service.serving import RunningAuthority
    from plait.node.stage_node import StageNode

log = get_logger(__name__)

_DRAIN_POLL_S = 0.05


def main(config: NodeConfig) -> int:
    """Run a node until SIGTERM or SIGINT, which drain it; return its exit code.

    A ``PlaitError`` becomes one line on standard error and its exit code.
    """
    to_stderr(logging.INFO)
    try:
        if "stage" in config.roles:
            load(config.model or "")  # before a data folder is made for a model that is not there
        with lock_data_dir(config.data_dir), asyncio.Runner(loop_factory=_event_loop) as runner:
            return runner.run(_run_node(config))
    except PlaitError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.remedy:
            print(f"try: {error.remedy}", file=sys.stderr)
        return error.exit_code


def _event_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


@dataclass
class _Node:
    """A running node, as its control socket sees it."""

    config: NodeConfig
    peer: PeerId
    state_file: StateFile
    started_s: float = field(default_factory=time.monotonic)
    state: NodeState = "starting"
    stage: "StageNode | None" = None
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: asyncio.Event = field(default_factory=asyncio.Event)

    def become(self, state: NodeState) -> None:
        """Go on to a state, and write it for whoever watches."""
        self.state = state
        self.state_file.write(state)

    def on_signal(self) -> None:
        """The first signal drains; the second ends at once."""
        (self.at_once if self.ending.is_set() else self.ending).set()

    def drain(self) -> None:
        """Take nothing new, tell the clients to move, end when nothing is left."""
        self.ending.set()

    def status(self) -> dict[str, Any]:
        """State, and what holds anything."""
        return {
            "name": self.config.name,
            "peer": self.peer,
            "roles": sorted(self.config.roles),
            "state": "draining" if self.ending.is_set() else self.state,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self.started_s, 1),
            "tasks": len(asyncio.all_tasks()),
            **(self.stage.status() if self.stage is not None else {}),
        }


async def _run_node(config: NodeConfig) -> int:
    network = load_network_file(config.network_file)
    peer = load_or_create_key(config.data_dir / "identity.key").peer_id
    node = _Node(config, peer, StateFile(config.data_dir / "state"))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.on_signal)
    drain_file = DrainFile(config.data_dir)
    drain_file.clear()
    node.become("starting")
    try:
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(TaskScope())
            if config.with_parent:
                stack.enter_context(watching_parent(node.drain))
            await stack.enter_async_context(serve_control(config.data_dir, node))
            await _start_roles(config, network, stack, tasks, node)
            freeze_heap()
            node.become("ready")
            log.info("ready", name=config.name)
            await node.ending.wait()
            node.become("draining")
            log.info("draining", name=config.name)
            drain_file.write(await _drained(node))  # before the control socket goes
            log.info("stopping", name=config.name)
    except* PlaitError as group:
        raise _first(group) from None
    finally:
        node.become("stopped")
    return 0


async def _drained(node: _Node) -> DrainEnd:
    """Return once no session is left, the time is up, or a second signal came."""
    if node.stage is None:
        return DrainEnd(os.getpid())
    node.stage.drain()
    deadline_s = time.monotonic() + node.config.drain_s
    while not node.stage.is_empty:
        if not node.at_once.is_set() and time.monotonic() < deadline_s:
            await asyncio.sleep(_DRAIN_POLL_S)
            continue
        end = DrainEnd(
            os.getpid(),
            node.stage.status()["sessions"],
            "a second signal" if node.at_once.is_set() else "the time to drain was up",
        )
        log.warning("sessions are ended", reason=end.reason, sessions=end.sessions_ended)
        return end
    return DrainEnd(os.getpid())


async def _start_roles(
    config: NodeConfig, network: NetworkFile, stack: AsyncExitStack, tasks: TaskScope, node: _Node
) -> None:
    if "ledger" in config.roles:
        authority = await _start_ledger(config, network, stack)
        tasks.create_task(_watch_writer(authority, config.data_dir), name="ledger writer")
    if "witness" in config.roles and "stage" not in config.roles:
        await _start_witness(config, network, stack)
    if "stage" in config.roles:
        # Torch and libp2p are imported only where they are needed.
        from plait.node.stage_start import start_stage

        node.stage = await start_stage(config, network, stack, clock_ms)


async def _watch_writer(authority: "RunningAuthority", data_dir: Path) -> None:
    """End the process when its disk failed: an authority that cannot write must not linger."""
    await authority.stopped.wait()
    raise LedgerError(
        f"the ledger's writer has stopped: its disk failed, see the log; {data_dir} is intact "
        "up to the last entry it acknowledged",
        remedy="mend the disk (is it full?) and start the node again",
    )


async def _start_ledger(
    config: NodeConfig, network: NetworkFile, stack: AsyncExitStack
) -> "RunningAuthority":
    from plait.ledger.service.serving import AuthorityKeys, serve_authority
    from plait.ledger.service.witness_edge import RemoteCosigner

    peer = load_or_create_key(config.data_dir / "identity.key").peer_id
    tls = load_or_create(config.data_dir, peer)
    authority = _own_authority(network, peer)
    keys = AuthorityKeys(
        ledger=load_or_create_key(config.data_dir / "ledger.key"),
        log=load_or_create_key(config.data_dir / "log.key"),
    )
    cosigners = [RemoteCosigner(one) for one in network.witnesses if one.address]
    for cosigner in cosigners:
        stack.push_async_callback(cosigner.close)
    return await stack.enter_async_context(
        serve_authority(
            config.data_dir / "journal.db",
            network,
            authority,
            keys,
            config.host,
            config.ledger_port,
            (tls.cert_pem, tls.key_pem),
            cosigners=cosigners,
            database=config.ledger_database,
        )
    )


async def _start_witness(config: NodeConfig, network: NetworkFile, stack: AsyncExitStack) -> None:
    """A witness without a stage has the public port to itself."""
    from plait.ledger.service.witness_edge import serve_witness

    peer = load_or_create_key(config.data_dir / "identity.key").peer_id
    tls = load_or_create(config.data_dir, peer)
    await stack.enter_async_context(
        serve_witness(
            config.data_dir / "witness",
            network,
            load_or_create_key(config.data_dir / "witness.key"),
            (config.host, config.public_port),
            (tls.cert_pem, tls.key_pem),
        )
    )


def _own_authority(network: NetworkFile, peer: str) -> Authority:
    for authority in network.authorities:
        if authority.peer == peer:
            return authority
    raise ConfigError(
        f"the network file names no ledger authority {peer}",
        remedy="use the data folder of the authority that the network file names",
    )


def _first(group: BaseExceptionGroup[PlaitError]) -> PlaitError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PlaitError)
    return error
