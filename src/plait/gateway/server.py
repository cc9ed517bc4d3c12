"""The process: one event loop, one client, one port, and a clean end."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from plait.client import AsyncClient
from plait.errors import ConfigError, PlaitError
from plait.gateway.app import Gateway
from plait.gateway.config import GatewayConfig
from plait.gateway.key_store import KeyStore
from plait.gateway.upstream import ClientUpstream
from plait.heap import freeze_heap
from plait.logs import get_logger
from plait.parent import watching_parent
from plait.task_scope import TaskScope

log = get_logger(__name__)

_BACKLOG = 1024
_LAST_WORDS_S = 5


def serve(
    config: GatewayConfig, network: Path, account: Path, announce: Callable[[str], None]
) -> int:
    """Serve until SIGTERM or Ctrl-C; ``announce`` gets the address once it is open.

    Returns the exit code. Raises ``ConfigError`` if the port cannot be had.
    """
    listener = listen(config.host, config.port)
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, network, account, listener, announce))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ``ConfigError`` if the address is taken or not ours."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(
            (str(address[0]), int(address[1])), family=family, backlog=_BACKLOG
        )
    except OSError as error:
        # The interpreter adds the address to the system's words, which we name ourselves.
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {why}",
            remedy="plait serve --port 0 takes a free port",
        ) from error


def server_config(app: ASGIApp) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )


async def _serve(
    config: GatewayConfig,
    network: Path,
    account: Path,
    listener: socket.socket,
    announce: Callable[[str], None],
) -> None:
    async with AsyncClient(
        network, account=account, audits=config.audits, draft=config.draft
    ) as client:
        freeze_heap()
        upstream = ClientUpstream(client)
        gateway = Gateway(upstream, client.network.network_id, config)
        server = _Server(server_config(gateway.app()))

        def stop() -> None:
            gateway.in_progress.close()
            server.should_exit = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        # Who asks as soon as it is announced should find models and routes.
        await client.wait_settled()
        host, port = listener.getsockname()[:2]
        announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        try:
            async with AsyncExitStack() as stack:
                tasks = await stack.enter_async_context(TaskScope())
                if config.with_parent:
                    stack.enter_context(watching_parent(stop))
                tasks.create_task(_close_revoked(upstream, config), name="revoked keys")
                await server.serve(sockets=[listener])
        finally:
            gateway.close()


async def _close_revoked(upstream: ClientUpstream, config: GatewayConfig) -> None:
    """Close the sub-accounts of keys that were revoked: an account may have so many open."""
    if config.key_store is None:
        return
    store = KeyStore(config.key_store)
    try:
        names = {key.id for key in store.all_keys() if key.revoked_ms and key.budget is not None}
    finally:
        store.close()
    if not names:
        return
    try:
        await upstream.close_shares(names)
    except PlaitError as error:
        log.info("sub-accounts of revoked keys stay open", reason=str(error))


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again once it has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture nothing."""
        yield


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
