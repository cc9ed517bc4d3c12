"""A node that serves a stage: the production core behind modelled links, worker and disk.

What waits in the daemon (``plait.node.stage_shell``) is a timer or a callback here; every
decision is the core's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from plait.compute.port import Done
from plait.errors import NetworkError, PeerUnreachable, PlaitError, RemoteProtocolError
from plait.identity import SigningKey
from plait.ledger.voucher import voucher_counts
from plait.network_file import NetworkFile
from plait.node.admission import StageIdentity
from plait.node.overload import Limits
from plait.node.own_offer import materially_different
from plait.node.ports import Job
from plait.node.retained import Retained
from plait.node.scheduler import Scheduler
from plait.node.sessions import StageSession
from plait.node.stage import Confirming, Stage
from plait.router.view import Offer
from plait.sim.engine import MS, Engine, S, Violation
from plait.sim.gossip import GossipPeer, Swarming
from plait.sim.host import Reply
from plait.sim.keys import cert_of, key_of, peer_of
from plait.sim.model import CONTEXT_TOKENS, KV_TOKENS, SHAPE
from plait.sim.network import Connection, End, Wires
from plait.sim.settler import SpoolDisk, SpooledSettler
from plait.testing.accounting import NETWORK_ID
from plait.testing.compute import VOCABULARY_SIZE, FakeStage
from plait.testing.offers import paper_offer
from plait.testing.stages import MemorySpill
from plait.types import PeerId, SessionId, Span, TokenCounts
from plait.v1 import session_pb2, stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SessionVoucher

DECODE_US = 2 * MS
PREFILL_US_PER_TOKEN = 300
UPKEEP_US = 500 * MS
LINK_TIMEOUT_US = 3 * S
DISHONEST = {"protocol-remote", "protocol-local", "credit", "internal", "compute", "overspend"}
"""Codes of faults that nobody has cause for where everybody is honest."""
RETAINED_MEMORY_BYTES = 1_024
"""Small, so that the spill is used."""
SPILL_BYTES = 64 * 1_024


@dataclass(slots=True)
class Account:
    """What a node did and was promised in a session, in one life."""

    base_end: int = 0
    """Where it entered: what lies before is not its own work."""
    fed_end: int = 0
    """End of the last live row computed."""
    prompt_tokens: int = 0
    chunk_tokens: int = 0
    prefill_chunk_tokens: int = 0
    promised: int = 0
    paid_for: TokenCounts = field(default_factory=TokenCounts)


class StageHost(Swarming):
    """One node with one span. ``slow`` multiplies what computing takes."""

    def __init__(
        self,
        engine: Engine,
        wires: Wires,
        name: str,
        network: NetworkFile,
        span: Span,
        *,
        neighbours: Sequence[str],
        addresses: Mapping[PeerId, str],
    ) -> None:
        super().__init__(engine, name)
        self.span = span
        self.spool = SpoolDisk()
        self.refused: list[tuple[str, str]] = []
        self.accounts: dict[SessionId, Account] = {}
        self.slow = 1
        self.draining = False
        self.spill = MemorySpill()
        self.compute: FakeStage
        self.core: Stage
        self.worker: _Worker
        self.settler: SpooledSettler
        self._wires, self._network = wires, network
        self._neighbours, self._addresses = neighbours, addresses
        self._told: Offer | None = None
        self._paper = replace(
            paper_offer(name, span),
            model_digest=SHAPE.digest,
            public_address=f"{name.replace(' ', '-')}.example:4700",
            decode_us=DECODE_US,
            prefill_us_per_token=PREFILL_US_PER_TOKEN,
        )

    def on_start(self) -> None:
        """Join, offer, serve; nothing is left of an earlier life but the spooled vouchers."""
        self.draining = False
        self._told = None
        self.settler = SpooledSettler(self, self._wires, self.spool, self.refused)
        self.gossip = GossipPeer(
            self,
            self._wires,
            self._network,
            key_of(self.name),
            neighbours=self._neighbours,
            addresses=self._addresses,
            publishes=True,
        )
        broken, self.spill = self.spill.broken, MemorySpill()
        self.spill.broken = broken
        self.compute = FakeStage(self.span, SHAPE, kv_tokens_total=KV_TOKENS)
        retained = Retained(
            self.spill, memory_bytes_max=RETAINED_MEMORY_BYTES, spill_bytes_max=SPILL_BYTES
        )
        self.worker = _Worker(self)
        self.links = _StageLinks(self, self._wires, self._addresses)
        self.core = Stage(
            compute=self.compute,
            authorities=self._network.authorities,
            trusted=lambda: self._network.authorities,
            settlement=_Settlement(self),
            links=self.links,
            worker=self.worker,
            retained=retained,
            identify=self._identify,
            view=self.gossip.view,
            clock_ms=self.now_ms,
            monotonic_us=lambda: self.engine.now_us,
            speeds_us=lambda: (DECODE_US, PREFILL_US_PER_TOKEN),
            vocabulary=VOCABULARY_SIZE,
            limits=Limits(),
        )
        self.every(UPKEEP_US, "", self._upkeep)
        self._upkeep()

    def on_crash(self) -> None:
        """What was not settled is lost with the memory; that is nobody's fault but its own."""
        self.accounts.clear()

    def drain(self) -> None:
        """As ``plait node drain``: nothing new, and what runs is asked to move."""
        self.draining = True
        self.core.drain()
        self._upkeep()

    @property
    def idle(self) -> bool:
        """Whether nothing of any session is left."""
        return not self.leaks()

    def leaks(self) -> list[str]:
        """What is still held here, in words."""
        if not self.up:
            return []
        found = {
            "sessions": len(self.core.sessions),
            "KV tokens": self.compute.kv_tokens_total - self.compute.kv_tokens_free,
            "retained bytes": self.core.retained.memory_bytes + self.core.retained.spill_bytes,
            "spill files": len(self.spill.files),
            "queued bytes": self.core.queued_bytes,
            "queued jobs": self.worker.queued,
            "settlements": len(self.spool.files),
        }
        return [f"{count} {what}" for what, count in found.items() if count]

    def account_of(self, session: StageSession) -> Account:
        """The account of a session, made on first need."""
        resumed = max(session.entry_terms.resume_position, session.cached)
        account = self.accounts.setdefault(session.id, Account(resumed, resumed))
        account.prompt_tokens = session.terms.prompt_tokens
        account.chunk_tokens = session.terms.chunk_tokens
        account.prefill_chunk_tokens = session.terms.prefill_chunk_tokens
        return account

    def note_settlement(self, session: StageSession) -> None:
        """A session ended here: note what its best voucher promises."""
        if session.books is None or session.books.voucher is None:
            return
        account = self.account_of(session)
        if session.books.granted:
            account.promised = max(account.promised, session.books.earned)
        voucher = SessionVoucher.FromString(session.books.voucher.payload)
        account.paid_for = voucher_counts(voucher)

    # Calls ----------------------------------------------------------------------------

    def on_call(self, caller: str, method: str, request: object, reply: Reply) -> None:
        """The peer port."""
        peer = peer_of(caller)
        try:
            match request:
                case session_pb2.OpenRequest():
                    reply(self.core.open(request, peer))
                case session_pb2.ConfirmRequest():
                    self._confirm(request, peer, reply)
                case session_pb2.CloseEpochRequest():
                    reply(self.core.close_epoch(request, peer))
                case session_pb2.CloseRequest():
                    self._close(request, peer, reply)
                case _:
                    raise AssertionError(f"{self.name} answers no {method}")
        except PlaitError as error:
            reply(RemoteProtocolError(f"{error.code}: {error}", peer=self.name))

    def _confirm(self, request: session_pb2.ConfirmRequest, peer: PeerId, reply: Reply) -> None:
        checked = self.core.check_confirm(request, peer)
        if not isinstance(checked, Confirming):
            reply(checked)
        elif checked.session.is_last:
            reply(self.core.activate(checked))
        else:
            self.links.ensure(
                checked.session.downstream,
                lambda: reply(self.core.activate(checked)),
                lambda reason: reply(self.core.unlinked(checked, reason)),
            )

    def _close(self, request: session_pb2.CloseRequest, peer: PeerId, reply: Reply) -> None:
        session = self.core.close(request, peer)
        if session is not None:
            self.settle(session)
        reply(session_pb2.CloseResponse(settled=session is not None))

    def settle(self, session: StageSession) -> None:
        """Present what the session earned."""
        self.note_settlement(session)
        if session.books is not None:
            self.settler.settle(session.books, cert_of(self.name))

    # Upkeep ---------------------------------------------------------------------------

    def _identify(self) -> StageIdentity:
        return StageIdentity(
            network_id=NETWORK_ID,
            peer=peer_of(self.name),
            shape=SHAPE,
            context_length=CONTEXT_TOKENS,
            offers=self.gossip.recent_offers,
            draining=self.draining,
        )

    def _upkeep(self) -> None:
        self.core.expire()
        offer = replace(
            self._paper,
            state="draining" if self.draining else "ready",
            numeric_class=self.compute.numeric_class(),
            kv_tokens_total=self.compute.kv_tokens_total,
            kv_tokens_free=self.compute.kv_tokens_free,
            sessions_active=len(self.core.sessions),
        )
        changed = materially_different(self._told, offer)
        if changed:
            self._told = offer
        self.gossip.set_offer(offer, at_once=changed)
        self.gossip.chores()


class _Worker:
    """One device: takes a batch, computes it for a while, hands the outcomes over."""

    def __init__(self, host: StageHost) -> None:
        self._host = host
        self._scheduler: Scheduler[Job] = Scheduler(
            key=lambda job: job.key, rows=lambda job: job.rows
        )
        self._busy = False

    @property
    def queued(self) -> int:
        """Jobs that wait or run."""
        return len(self._scheduler) + self._busy

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._scheduler.add(job)
        if not self._busy:
            self._begin()

    def _begin(self) -> None:
        jobs = self._scheduler.take()
        if not jobs:
            return
        self._busy = True
        rows = sum(job.rows for job in jobs)
        chance = self._host.engine.random
        took_us = (DECODE_US + PREFILL_US_PER_TOKEN * rows) * self._host.slow
        took_us += chance.randrange(took_us // 4 + 1)
        what = f"{self._host.name}: computed {', '.join(map(_job_text, jobs))}"
        self._host.after(took_us, what, lambda: self._end(jobs))

    def _end(self, jobs: list[Job]) -> None:
        host = self._host
        outcomes: list[Done] = host.compute.step([job.work() for job in jobs])
        self._busy = False
        for job, done in zip(jobs, outcomes, strict=True):
            if done.error is None and not job.frame.replay and job.live:
                account = host.account_of(job.session)
                account.fed_end = max(account.fed_end, job.frame.first_position + job.rows)
            host.core.finish(job, done)
        if not self._busy:
            self._begin()


def _job_text(job: Job) -> str:
    frame = job.frame
    kind = "replay" if frame.replay else "frame"
    end = frame.first_position + frame.rows
    return f"{kind} e{frame.epoch} t{frame.traversal} [{frame.first_position}, {end})"


@dataclass(frozen=True, slots=True)
class _Settlement:
    """The core's way to the settler."""

    host: StageHost

    @property
    def key(self) -> SigningKey:
        """Signs receipts."""
        return key_of(f"{self.host.name} ledger")

    @property
    def cert(self) -> SignedEnvelope:
        """Delegates to the key."""
        return cert_of(self.host.name)

    def settle_later(self, session: StageSession) -> None:
        """Present what it earned."""
        self.host.settle(session)


class _StageLinks:
    """The core's ``Links``: streams that peers opened to us, and ours to the next stages."""

    def __init__(self, host: StageHost, wires: Wires, addresses: Mapping[PeerId, str]) -> None:
        self._host, self._wires, self._addresses = host, wires, addresses
        self._up: dict[PeerId, list[Connection]] = {}
        self._down: dict[PeerId, Connection] = {}

    def send_down(self, peer: PeerId, message: stage_pb2.LinkRequest) -> None:
        """To a stage that we feed."""
        if peer not in self._down:
            raise PeerUnreachable(f"no link to {self._addresses[peer]}")
        self._down[peer].send(self._host.name, message)

    def send_up(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        """To a peer that has a link to us."""
        if not self._up.get(peer):
            raise NetworkError(f"no link from {self._addresses[peer]}")
        for connection in self._up[peer]:
            connection.send(self._host.name, message)

    def has_room(self, peer: PeerId) -> bool:
        """Never congested here."""
        return True

    def ensure(self, peer: PeerId, done: Callable[[], None], failed: Callable[[str], None]) -> None:
        """Link to the next stage unless there is a link."""
        connection = self._down.get(peer)
        if connection is not None and connection.is_open(self._host.name):
            done()
            return
        if peer not in self._host.gossip.view().offers:
            failed(f"{self._addresses[peer]} has no valid offer here")
            return
        ended = False

        def end(answer: Connection | NetworkError) -> None:
            nonlocal ended
            if isinstance(answer, Connection) and ended:
                answer.close(self._host.name)
            if ended:
                return
            ended = True
            if isinstance(answer, Connection):
                answer.sides[self._host.name].end = _Downward(self, peer, answer)
                self._down[peer] = answer
                done()
            else:
                failed(str(answer))

        listener = self._wires.hosts[self._addresses[peer]]
        self._wires.connect(
            self._host, listener, "link", lambda link: accept_link(link, self._host.name), end
        )
        timeout = PeerUnreachable("no answer in time")
        self._host.after(LINK_TIMEOUT_US, "", lambda: end(timeout))

    def attach(self, caller: PeerId, connection: Connection) -> None:
        """A peer opened a link to us."""
        self._up.setdefault(caller, []).append(connection)

    def detach(self, caller: PeerId, connection: Connection) -> None:
        """It ended."""
        links = [link for link in self._up.get(caller, []) if link is not connection]
        self._up[caller] = links
        self._host.core.on_link_lost(caller, connection, bool(links))

    def lost(self, peer: PeerId, connection: Connection, reason: str) -> None:
        """Our link to a stage ended."""
        if self._down.get(peer) is connection:
            del self._down[peer]
        self._host.core.on_peer_lost(peer, reason)

    def received(self, caller: PeerId, connection: Connection, message: object) -> None:
        """Something came on a link to us."""
        assert isinstance(message, stage_pb2.LinkRequest)
        core = self._host.core
        if message.WhichOneof("kind") == "frame":
            core.on_frame(message.frame, caller, connection)
        else:
            self._note(message.fault, caller)
            core.on_upstream_fault(message.fault, caller)

    def answered(self, peer: PeerId, message: object) -> None:
        """Something came back on a link of ours."""
        assert isinstance(message, stage_pb2.LinkResponse)
        if message.WhichOneof("kind") == "fault":
            self._note(message.fault, peer)
        self._host.core.on_response(peer, message)

    def _note(self, fault: stage_pb2.SessionFault, sender: PeerId) -> None:
        names = self._addresses
        check_fault(fault, names)
        self._host.engine.note(
            f"{self._host.name}: fault e{fault.epoch} from {names[sender]}: "
            f"{names.get(PeerId(fault.peer_id), '?')}: {fault.code}: {fault.reason}"
        )


@dataclass(frozen=True, slots=True)
class _Upward:
    """Our end of a link that a peer opened."""

    links: _StageLinks
    caller: PeerId
    connection: Connection

    def on_message(self, message: object) -> None:
        """A frame or a fault."""
        self.links.received(self.caller, self.connection, message)

    def on_broken(self, reason: str) -> None:
        """The caller is gone."""
        self.links.detach(self.caller, self.connection)


@dataclass(frozen=True, slots=True)
class _Downward:
    """Our end of a link that we opened."""

    links: _StageLinks
    peer: PeerId
    connection: Connection

    def on_message(self, message: object) -> None:
        """A fault."""
        self.links.answered(self.peer, message)

    def on_broken(self, reason: str) -> None:
        """The next stage is gone."""
        self.links.lost(self.peer, self.connection, reason)


def accept_link(connection: Connection, dialler: str) -> End:
    """The stage's end of a link that is opened to it."""
    host = connection.other(dialler).host
    assert isinstance(host, StageHost)
    host.links.attach(peer_of(dialler), connection)
    return _Upward(host.links, peer_of(dialler), connection)


def check_fault(fault: stage_pb2.SessionFault, addresses: Mapping[PeerId, str]) -> None:
    """Nobody breaks the rules here, so nobody may say that somebody did."""
    if fault.code in DISHONEST:
        name = addresses.get(PeerId(fault.peer_id), "?")
        raise Violation("protocol", f"{name} says: {fault.code}: {fault.reason}")
