"""Passing notices on: each party asks a few others every few seconds, and both sides learn.

An exchange is one call in which both tell what they hold. What one party knows, all know
after a few rounds, without a broadcast that could be flooded: every call is bounded, each
caller's address may call a few times a second, and nothing false is checked twice.
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from plait.errors import BadProof, PeerUnreachable, PlaitError, VerificationError
from plait.ledger.exposures import Reported
from plait.ledger.notices import Action, Compare, Frozen, NoticeBoard, Revoked, Told
from plait.ledger.service.channels import pinned_channel
from plait.ledger.tiles import Tile, TileMissing, TileTree
from plait.logs import get_logger
from plait.network_file import Authority, NetworkFile
from plait.v1 import log_pb2, log_pb2_grpc
from plait.v1.ledger_pb2 import GetConsistencyRequest
from plait.v1.ledger_pb2_grpc import LedgerServiceStub

log = get_logger(__name__)

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
PERIOD_S = 5.0
TARGETS_PER_ROUND = 3
DEADLINE_S = 2.0
CALLS_PER_S = 4.0
CALLS_BURST = 16.0
CALLERS_MAX = 4_096
TILES_PER_COMPARISON_MAX = 64
COMPARISONS_PER_ROUND = 4


@dataclass(frozen=True, slots=True)
class Post:
    """Where somebody takes notices: an address, pinned to a DER certificate."""

    address: str
    certificate: bytes


def posts_of(authorities: Sequence[Authority]) -> list[Post]:
    """The posts of ledger authorities."""
    return [Post(one.address, one.certificate) for one in authorities]


def _to_message(told: Told) -> log_pb2.Notices:
    return log_pb2.Notices(
        checkpoints=told.checkpoints,
        fork_proofs=told.fork_proofs,
        revocations=told.revocations,
        exposures=told.exposures,
    )


def _from_message(message: log_pb2.Notices) -> Told:
    return Told(
        tuple(message.checkpoints),
        tuple(message.fork_proofs),
        tuple(message.revocations),
        tuple(message.exposures),
    )


class NoticeFile:
    """A board's memory: what it holds survives the process. An unreadable file is left alone."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, board: NoticeBoard) -> None:
        """Fill a board with what was saved; every signature is checked again."""
        try:
            board.restore(_from_message(log_pb2.Notices.FromString(self._path.read_bytes())))
        except FileNotFoundError:
            return
        except (OSError, DecodeError) as error:
            log.error("the notices on disk cannot be read", reason=str(error))

    def save(self, board: NoticeBoard) -> None:
        """Replace what was saved."""
        part = self._path.with_suffix(".part")
        try:
            part.write_bytes(_to_message(board.stored()).SerializeToString())
            part.replace(self._path)
        except OSError as error:
            log.error("the notices cannot be kept on disk", reason=str(error))


class NoticeExchange:
    """One party's part: its board, what it tells, whom it asks. Run ``run`` in a task.

    ``posts`` gives whom to ask; ``checkpoints``, if given, fetches fresh checkpoints.
    """

    def __init__(
        self,
        board: NoticeBoard,
        network: NetworkFile,
        posts: Callable[[], Sequence[Post]],
        *,
        file: NoticeFile | None = None,
        period_s: float = PERIOD_S,
    ) -> None:
        self.board = board
        self._network = network
        self._posts = posts
        self._file = file
        self._period_s = period_s
        self._urgent = asyncio.Event()
        if file is not None:
            file.load(board)

    def take(self, told: Told) -> None:
        """Take notices from anybody."""
        self.perform(self.board.handle(told))

    def perform(self, actions: Sequence[Action]) -> None:
        """Do what the board decided: log, keep, compare later, pass on at once."""
        for action in actions:
            match action:
                case Frozen():
                    log.error("signed twice", peer=action.culprit, statement=action.statement)
                case Reported():
                    log.warning("reported exposed", peer=action.peer, reporter=action.reporter)
                case Revoked():
                    log.info("keys revoked", peer=action.peer, serial_min=action.serial_min)
            self._urgent.set()
        if self._file is not None and not all(isinstance(one, Compare) for one in actions):
            self._file.save(self.board)

    async def run(self) -> None:
        """Exchange for ever: every period, and at once when something new is known."""
        while True:
            try:
                async with asyncio.timeout(self._period_s):
                    await self._urgent.wait()
            except TimeoutError:
                pass
            self._urgent.clear()
            await self.round()

    async def round(self) -> None:
        """One round: compare what waits, then exchange with a few others."""
        for question in self.board.unresolved()[:COMPARISONS_PER_ROUND]:
            await self._compare(question)
        posts = list(self._posts())
        chosen = random.sample(posts, min(TARGETS_PER_ROUND, len(posts)))
        async with asyncio.TaskGroup() as tasks:
            for post in chosen:
                tasks.create_task(self.exchange(post), name=f"notices {post.address}")

    async def exchange(self, post: Post) -> bool:
        """Tell one other and hear it; false if it did not answer."""
        request = log_pb2.ExchangeRequest(
            network_id=self._network.network_id, notices=_to_message(self.board.tell())
        )
        try:
            async with post_channel(post) as channel:
                stub = log_pb2_grpc.NoticeServiceStub(channel)
                answer = await stub.Exchange(request, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            log.debug("no exchange of notices", address=post.address, reason=error.details())
            return False
        self.take(_from_message(answer.notices))
        return True

    async def _compare(self, question: Compare) -> None:
        authority = next(a for a in self._network.authorities if a.log_origin == question.origin)
        try:
            self.perform(await self._compared(question, authority))
        except PeerUnreachable as error:
            log.debug("a log cannot be asked yet", origin=question.origin, reason=str(error))
        except PlaitError as error:
            log.warning(
                "two checkpoints of a log cannot be compared: it withholds its tree",
                origin=question.origin,
                reason=str(error),
            )

    async def _compared(self, question: Compare, authority: Authority) -> list[Action]:
        # The board has opened both.
        first, size = (int(n.split("\n")[1]) for n in (question.smaller, question.larger))
        tiles: dict[Tile, bytes] = {}

        def read(tile: Tile) -> bytes:
            if tile not in tiles:
                raise TileMissing(tile)
            return tiles[tile]

        async with post_channel(Post(authority.address, authority.certificate)) as channel:
            if await self._grown(question, LedgerServiceStub(channel), (first, size)):
                return []
            stub = log_pb2_grpc.LogServiceStub(channel)
            while len(tiles) <= TILES_PER_COMPARISON_MAX:
                try:
                    return self.board.compared(question, TileTree(size, read))
                except TileMissing as missing:
                    tiles[missing.tile] = await _fetch(stub, missing.tile)
        raise BadProof("too many tiles are needed")

    async def _grown(
        self, question: Compare, stub: LedgerServiceStub, sizes: tuple[int, int]
    ) -> bool:
        request = GetConsistencyRequest(first_size=sizes[0], second_size=sizes[1])
        try:
            answer = await stub.GetConsistency(request, timeout=DEADLINE_S)
            self.board.grown(question, tuple(answer.hashes))
        except (grpc.aio.AioRpcError, VerificationError):
            return False
        return True


class NoticeServicer(log_pb2_grpc.NoticeServiceServicer):
    """``plait.v1.NoticeService``."""

    def __init__(self, exchange: NoticeExchange, network_id: str) -> None:
        self._exchange = exchange
        self._network_id = network_id
        self._callers: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def Exchange(
        self, request: log_pb2.ExchangeRequest, context: Any
    ) -> log_pb2.ExchangeResponse:
        """Hear a caller and tell it what is known here."""
        if request.network_id != self._network_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "another network")
        if not self._may(context.peer().rpartition(":")[0]):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls")
        self._exchange.take(_from_message(request.notices))
        return log_pb2.ExchangeResponse(notices=_to_message(self._exchange.board.tell()))

    def _may(self, host: str) -> bool:
        now_s = asyncio.get_running_loop().time()
        left, then_s = self._callers.pop(host, (CALLS_BURST, now_s))
        left = min(CALLS_BURST, left + (now_s - then_s) * CALLS_PER_S)
        self._callers[host] = (max(0.0, left - 1), now_s)
        if len(self._callers) > CALLERS_MAX:
            self._callers.popitem(last=False)
        return left >= 1


async def _fetch(stub: log_pb2_grpc.LogServiceStub, tile: Tile) -> bytes:
    request = log_pb2.GetTileRequest(path=tile.path)
    try:
        response = await stub.GetTile(request, timeout=DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        # Who cannot be reached withholds nothing: it is down, or there is no way to it.
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise PeerUnreachable(f"{tile.path}: {error.details()}") from error
        raise BadProof(f"{tile.path}: {error.details()}") from error
    return bytes(response.data)


def post_channel(post: Post) -> grpc.aio.Channel:
    """A connection to a post."""
    return pinned_channel(post.address, post.certificate, message_bytes_max=MESSAGE_BYTES_MAX)
