"""A ledger authority as a running service: its store, its server and its chores."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from plait.errors import ConfigError, LedgerError
from plait.identity import SigningKey
from plait.ledger.exposure import judging_of
from plait.ledger.journal import GRACE_MS
from plait.ledger.notices import NoticeBoard, Told
from plait.ledger.service.authority import LedgerServicer
from plait.ledger.service.channels import server_options
from plait.ledger.service.head import HeadFile
from plait.ledger.service.notices import NoticeExchange, NoticeFile, NoticeServicer, posts_of
from plait.ledger.service.recorder import LogIdentity, Recorder
from plait.ledger.service.records import LedgerStore
from plait.ledger.service.store import open_store
from plait.ledger.service.tiles import LogServicer, TileFolder
from plait.ledger.service.witness import Cosigner, WitnessedLog
from plait.logs import get_logger
from plait.network_file import Authority, NetworkFile
from plait.v1.committee_pb2_grpc import add_CommitteeServiceServicer_to_server
from plait.v1.ledger_pb2_grpc import add_LedgerServiceServicer_to_server
from plait.v1.log_pb2_grpc import (
    add_LogServiceServicer_to_server,
    add_NoticeServiceServicer_to_server,
)

log = get_logger(__name__)

MESSAGE_BYTES_MAX = 64 * 1024
EXPIRY_INTERVAL_S = 1.0
_STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class AuthorityKeys:
    """The two keys of an authority: grants are signed by one, checkpoints by the other."""

    ledger: SigningKey
    log: SigningKey


@dataclass(frozen=True, slots=True)
class RunningAuthority:
    """A serving authority. ``stopped`` is set when its disk failed and it must be restarted."""

    host: str
    port: int
    recorder: Recorder
    stopped: asyncio.Event = field(repr=False)


class Clock:
    """Wall time, and a time for expiry that no jump of the wall clock brings forward."""

    def __init__(
        self,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        steady_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        self._wall_ms, self._steady_ms = wall_ms, steady_ms
        self._wall_start_ms, self._steady_start_ms = wall_ms(), steady_ms()

    def now_ms(self) -> int:
        """Wall time."""
        return self._wall_ms()

    def elapsed_ms(self) -> int:
        """Time since the authority started."""
        return self._steady_ms() - self._steady_start_ms

    def expiry_ms(self) -> int:
        """The earlier of wall time and start time plus what has elapsed."""
        return min(self._wall_ms(), self._wall_start_ms + self.elapsed_ms())


@asynccontextmanager
async def serve_authority(
    store_path: Path,
    network: NetworkFile,
    authority: Authority,
    keys: AuthorityKeys,
    host: str,
    port: int,
    tls: tuple[bytes, bytes],
    *,
    clock: Clock | None = None,
    cosigners: Sequence[Cosigner] = (),
    database: str = "",
) -> AsyncIterator[RunningAuthority]:
    """Serve a ledger authority while the context is open.

    ``tls`` is certificate and key in PEM; port 0 lets the kernel choose. ``cosigners`` are
    ways to witnesses of the network file, asked for each checkpoint. The log is published
    as tiles in the folder ``log`` beside the store. ``database`` is a PostgreSQL connection
    string; empty keeps the journal in the file ``store_path``. Raises
    ``ConfigError`` for keys that are not the network file's or an address in use, and
    ``LedgerError`` for a store that cannot be used.
    """
    if (keys.ledger.public, keys.log.public) != (authority.ledger_key, authority.log_key):
        raise ConfigError("the authority's keys are not those of the network file")
    clock = clock or Clock()
    store = _open_store(store_path, network.network_id, database)
    try:
        identity = LogIdentity(authority.log_origin, keys.log)
        escrow = judging_of(network).terms
        recorder = Recorder(store, network.network_id, identity, clock.now_ms, escrow)
    except BaseException:
        store.close()
        raise
    try:
        witnessed = WitnessedLog(
            recorder,
            network.witnesses,
            network.witness_quorum,
            cosigners,
            publish=TileFolder(store_path.with_name("log"), recorder).publish,
        )
        notices = _notices(network, authority, NoticeFile(store_path.with_name("notices")))
        servicer = LedgerServicer(recorder, network, keys.ledger, clock.now_ms, witnessed, notices)
        server, bound = _server(servicer, host, port, tls)
        add_LogServiceServicer_to_server(LogServicer(recorder, lambda: witnessed.shown), server)
        add_NoticeServiceServicer_to_server(NoticeServicer(notices, network.network_id), server)
        await server.start()
        try:
            failure: Exception | None = None
            async with asyncio.TaskGroup() as tasks:
                chores = tasks.create_task(
                    _chores(recorder, witnessed, notices, clock), name="ledger-chores"
                )
                telling = tasks.create_task(notices.run(), name="ledger-notices")
                try:
                    yield RunningAuthority(host, bound, recorder, recorder.stopped)
                except Exception as error:  # noqa: BLE001 - raised below, out of the group's wrapping
                    failure = error
                finally:
                    chores.cancel()
                    telling.cancel()
            if failure is not None:
                raise failure
        finally:
            await server.stop(_STOP_GRACE_S)
    finally:
        recorder.close()


def _notices(network: NetworkFile, authority: Authority, file: NoticeFile) -> NoticeExchange:
    others = [one for one in network.authorities if one.peer != authority.peer]
    board = NoticeBoard(network, own_log=authority.log_origin)
    return NoticeExchange(board, network, lambda: posts_of(others), file=file)


def _open_store(path: Path, network_id: str, database: str) -> LedgerStore:
    if not database:
        return open_store(path, network_id)
    try:
        from plait.ledger.service.postgres import open_postgres
    except ImportError as error:
        raise ConfigError(
            "a ledger in PostgreSQL needs psycopg", remedy="pip install 'plait[postgres]'"
        ) from error
    return open_postgres(database, network_id, HeadFile(path.with_name(path.name + ".head")))


def _server(
    servicer: LedgerServicer, host: str, port: int, tls: tuple[bytes, bytes]
) -> tuple[grpc.aio.Server, int]:
    cert_pem, key_pem = tls
    server = grpc.aio.server(
        options=server_options(message_bytes_max=MESSAGE_BYTES_MAX, streams_max=256)
    )
    add_LedgerServiceServicer_to_server(servicer, server)
    add_CommitteeServiceServicer_to_server(servicer, server)
    credentials = grpc.ssl_server_credentials([(key_pem, cert_pem)])
    try:
        bound = server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise ConfigError(f"the ledger cannot listen on {host}:{port}: {error}") from error
    return server, bound


async def _chores(
    recorder: Recorder, witnessed: WitnessedLog, notices: NoticeExchange, clock: Clock
) -> None:
    """Sign checkpoints and void what has expired, until the recorder stops."""
    try:
        while True:
            _, note = await witnessed.checkpoint(recorder.committed_size)
            notices.take(Told(checkpoints=(note,)))
            # After a long outage the payees get their grace time again before anything expires.
            if clock.elapsed_ms() >= GRACE_MS:
                await recorder.expire(clock.expiry_ms())
            await asyncio.sleep(EXPIRY_INTERVAL_S)
    except LedgerError as error:
        log.error("the ledger refuses all requests until it is restarted", reason=str(error))
