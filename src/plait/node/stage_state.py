"""What a stage's decisions have in common: its state, its load, and how a session ends.

The lowest of four layers: each of ``stage``, ``stage_frames``, ``stage_faults`` and this one
knows only those below it.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from plait.compute.port import StageCompute
from plait.errors import CapacityError, PlaitError
from plait.ledger.fork import VoucherFork
from plait.ledger.stage_books import StageBooks
from plait.logs import get_logger
from plait.network_file import Authority
from plait.node.admission import StageIdentity
from plait.node.faults import DRAINING, fault_of, tell
from plait.node.overload import CostLine, Limits, Load
from plait.node.ports import Links, Settlement, Worker
from plait.node.prefixes import Prefixes
from plait.node.retained import Retained
from plait.node.sessions import DRAINED_MS, SUSPENDED_MS, SessionTable, StageSession
from plait.node.tape import Tape
from plait.router.view import View
from plait.types import PeerId
from plait.v1 import stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)


class StageState:
    """Everything behind the peer port, but for the waiting.

    ``identify`` gives the identity to examine against; ``speeds_us`` the microseconds of a
    decode step and of a prompt token, for predictions. ``authorities`` are the ledger's,
    ``trusted`` those of them that were not caught lying. ``tape`` keeps what audits ask for;
    None keeps nothing, and no audit can be answered. ``caught`` is told of each client that
    signed two vouchers under one number. ``soon`` is given what is better done once the messages
    sent so far have left; it may be done late, or never.
    """

    def __init__(
        self,
        *,
        compute: StageCompute,
        authorities: Sequence[Authority],
        trusted: Callable[[], Sequence[Authority]],
        settlement: Settlement,
        links: Links,
        worker: Worker,
        retained: Retained,
        identify: Callable[[], StageIdentity],
        view: Callable[[], View],
        clock_ms: Callable[[], int],
        monotonic_us: Callable[[], int],
        speeds_us: Callable[[], tuple[int, int]],
        vocabulary: int,
        limits: Limits,
        tape: Tape | None = None,
        caught: Callable[[VoucherFork], object] | None = None,
        soon: Callable[[Callable[[], None]], object] = lambda call: None,
    ) -> None:
        self.sessions = SessionTable(limits.sessions_max)
        self._compute = compute
        self._authorities = authorities
        self._trusted = trusted
        self._settlement = settlement
        self._links = links
        self._worker = worker
        self.retained = retained
        self._identify = identify
        self._view = view
        self._clock_ms = clock_ms
        self._monotonic_us = monotonic_us
        self._speeds_us = speeds_us
        self._vocabulary = vocabulary
        self._limits = limits
        self._prefixes = Prefixes(compute, limits.keep_alive_s_max)
        self.tape = tape
        self._caught = caught
        self._soon = soon
        self._queued_bytes: Counter[PeerId] = Counter()
        self._token = CostLine.guess(speeds_us()[0])
        self._draining = False

    def _accept_voucher(
        self, session: StageSession, books: StageBooks, voucher: SignedEnvelope
    ) -> None:
        """Take a voucher; raises what ``StageBooks.accept_voucher`` raises."""
        try:
            books.accept_voucher(voucher)
        except PlaitError:
            if books.conflict is not None and self._caught is not None:
                self._caught(VoucherFork(books.conflict, (session.client_cert,) * 2))
            raise

    @property
    def wait_us(self) -> int:
        """Predicted wait of a session that were opened now: the prompts that go before it."""
        decode_us, prefill_us = self._speeds_us()
        rows = sum(s.prompt_rows_left for s in self.sessions if s.phase != "suspended")
        return rows * prefill_us + (decode_us if self._worker.queued else 0)

    @property
    def queued_bytes(self) -> int:
        """Bytes of frames that wait."""
        return self._queued_bytes.total()

    def _load(self, client: PeerId) -> Load:
        left = [s.tokens_max - s.positions for s in self.sessions]
        token_us = self._token.cost_us(self._sessions_served() + 1)
        return Load(
            kv_tokens_total=self._compute.kv_tokens_total,
            kv_tokens_free=self._compute.kv_tokens_free,
            wait_ms=self.wait_us // 1000,
            sessions=len(self.sessions),
            sessions_of_client=self.sessions.count_of(client),
            clients=len({client, *(session.terms.client for session in self.sessions)}),
            soonest_free_ms=round(min(left, default=0) * token_us) // 1000,
            token_us=token_us,
            token_alone_us=self._token.one_us,
        )

    def _sessions_served(self) -> int:
        return sum(session.phase != "suspended" for session in self.sessions)

    def _count_bytes(self, sender: PeerId, size: int) -> None:
        if self._queued_bytes[sender] + size > self._limits.peer_queued_bytes_max:
            raise CapacityError(f"too many bytes of frames from {sender} are queued")
        self._queued_bytes[sender] += size

    def _uncount_bytes(self, sender: PeerId, size: int) -> None:
        self._queued_bytes[sender] -= size
        if not self._queued_bytes[sender]:
            del self._queued_bytes[sender]

    def _tell_draining(self, session: StageSession) -> None:
        peer = session.stage.peer
        tell(self._links, session, fault_of(session, peer, DRAINING, "this node is draining"))

    def _lose(self, session: StageSession, peer: PeerId, code: str, reason: str) -> None:
        """Suspend a session because ``peer`` is lost to it, and say so both ways."""
        log.info("session suspended", session=session.id.hex(), lost=peer, reason=reason)
        self._suspend(session)
        tell(self._links, session, fault_of(session, peer, code, reason))

    def _fail(self, session: StageSession, code: str, reason: str) -> None:
        """End a session by a fault of its own, and say so both ways."""
        self._end(session, reason, fault_of(session, session.stage.peer, code, reason))

    def _suspend(self, session: StageSession, for_ms: int | None = None) -> None:
        if for_ms is None:
            for_ms = DRAINED_MS if self._draining else SUSPENDED_MS
        early = sum(message.ByteSize() for message in session.early)
        self._uncount_bytes(session.upstream, early)
        session.suspend(self._clock_ms() + for_ms)

    def _end(
        self, session: StageSession, reason: str, fault: stage_pb2.SessionFault | None = None
    ) -> None:
        """Free a session that did not end well; tell both neighbours once; settle what is owed."""
        if self.sessions.get(session.id) is not session:
            return
        log.info("session ended", session=session.id.hex(), reason=reason[:200])
        self._free(session)
        self._settlement.settle_later(session)
        if fault is not None:
            tell(self._links, session, fault)

    def _free(self, session: StageSession) -> None:
        self._suspend(session, 0)
        self.sessions.remove(session.id)
        self._compute.free(session.id)
        self.retained.free(session.id)
        if self.tape is not None:
            self.tape.end(session.id, self._clock_ms())
