"""What is alive while a client is: its ledger, its view of the network, and its tasks."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from plait.client.account import Account
from plait.client.dialer import Dialer
from plait.clock import clock_ms
from plait.errors import ConfigError
from plait.ledger.notices import NoticeBoard
from plait.ledger.service.committee import Ledger, connect
from plait.ledger.service.notices import NoticeExchange, NoticeFile, Post, posts_of
from plait.net.watch import NetworkWatch, targets_of
from plait.network_file import NetworkFile
from plait.task_scope import TaskScope


@dataclass(frozen=True, slots=True)
class Connection:
    """One client's parts that hold sockets and tasks."""

    ledger: Ledger
    dialer: Dialer
    tasks: TaskScope
    watch: NetworkWatch
    notices: NoticeExchange


@asynccontextmanager
async def connected(
    network: NetworkFile, account: Account, folder: Path
) -> AsyncIterator[Connection]:
    """A connection to a network, whose notices and missed grants are kept in ``folder``.

    Raises ``ConfigError`` for a network without a ledger, ``NetworkError`` subclasses.
    """
    if not network.authorities:
        raise ConfigError("the network file names no ledger authority")
    board = NoticeBoard(network)
    watch = NetworkWatch(network, account.peer)

    def posts() -> list[Post]:
        """Whom to exchange notices with: the nodes in view, and the ledger."""
        nodes = targets_of(watch.view(), account.peer)
        found = [Post(target.address, target.certificate) for target in nodes]
        return found + posts_of(network.authorities)

    exchange = NoticeExchange(board, network, posts, file=NoticeFile(folder / "notices"))
    ledger = await connect(network, exchange, folder / "missed")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(ledger.close)
        dialer = Dialer(account, network.network_id, clock_ms)
        stack.push_async_callback(dialer.close)
        tasks = await stack.enter_async_context(TaskScope())
        await stack.enter_async_context(watch)
        tasks.create_task(exchange.run(), name="notices")
        yield Connection(ledger, dialer, tasks, watch, exchange)
