"""The node daemon: builds the parts, keeps them in one task group, ends them cleanly."""

import asyncio
import logging
import signal
import sys
import time
from contextlib import AsyncExitStack

from plait.errors import ConfigError, PlaitError
from plait.identity import load_or_create_key
from plait.logs import get_logger, to_stderr
from plait.net.tls import load_or_create
from plait.network_file import Authority, NetworkFile, load_network_file
from plait.node.config import NodeConfig
from plait.node.state import StateFile, lock_data_dir

log = get_logger(__name__)


def main(config: NodeConfig) -> int:
    """Run a node until SIGTERM or SIGINT; return its exit code.

    A ``PlaitError`` becomes one line on standard error and its exit code.
    """
    to_stderr(logging.INFO)
    try:
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


async def _run_node(config: NodeConfig) -> int:
    network = load_network_file(config.network_file)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    state = StateFile(config.data_dir / "state")
    state.write("starting")
    try:
        async with AsyncExitStack() as stack:
            await _start_roles(config, network, stack)
            state.write("ready")
            log.info("ready", name=config.name)
            await stop.wait()
            state.write("draining")
            log.info("stopping", name=config.name)
    except* PlaitError as group:
        raise _first(group) from None
    finally:
        state.write("stopped")
    return 0


async def _start_roles(config: NodeConfig, network: NetworkFile, stack: AsyncExitStack) -> None:
    if "ledger" in config.roles:
        await _start_ledger(config, network, stack)
    if "stage" in config.roles:
        # Torch and libp2p are imported only where they are needed.
        from plait.node.stage_node import start_stage

        await start_stage(config, network, stack, _clock_ms)


async def _start_ledger(config: NodeConfig, network: NetworkFile, stack: AsyncExitStack) -> None:
    from plait.ledger.service.authority import AuthorityKeys, serve_authority

    peer = load_or_create_key(config.data_dir / "identity.key").peer_id
    tls = load_or_create(config.data_dir, peer)
    authority = _own_authority(network, peer)
    keys = AuthorityKeys(
        ledger=load_or_create_key(config.data_dir / "ledger.key"),
        log=load_or_create_key(config.data_dir / "log.key"),
    )
    await stack.enter_async_context(
        serve_authority(
            config.data_dir / "journal.db",
            network,
            authority,
            keys,
            config.host,
            config.ledger_port,
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


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
