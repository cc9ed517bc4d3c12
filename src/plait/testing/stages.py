"""Stages of the fake model in memory: real decisions, real books, real envelopes, no network.

Messages wait in one queue and jobs in another until a test runs them, so that every order
can be tried. ``PaperClient`` drives one session through them, by hand and synchronously.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from plait.envelope import digest, seal
from plait.errors import CapacityError, DeadlineExceeded, PeerUnreachable, PlaitError
from plait.identity import SigningKey
from plait.ledger.certs import make_key_cert
from plait.ledger.client_books import ClientBooks
from plait.ledger.fork import VoucherFork
from plait.ledger.lottery import nonce_commitment
from plait.ledger.opening import opening_to_message, route_digest
from plait.ledger.reserve import make_reservation
from plait.ledger.terms import SessionTerms, StageTerms
from plait.node.admission import StageIdentity
from plait.node.overload import Limits
from plait.node.ports import Job
from plait.node.retained import Key, Retained
from plait.node.sessions import StageSession
from plait.node.stage import Confirming, Stage
from plait.node.tape import Tape
from plait.router.view import Offer, View
from plait.testing.accounting import HOUR_MS, NETWORK_ID, NOW_MS, grant_of, key_of, paper_network
from plait.testing.compute import FAKE_SHAPE, VOCABULARY_SIZE, FakeStage
from plait.testing.offers import paper_offer
from plait.types import PeerId, Sampling, SessionId, Span, WireDtype
from plait.v1 import session_pb2, stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope

AUDIT_WINDOW_MS = 60_000
CLIENT = key_of("client").peer_id
CLIENT_LEDGER = key_of("client ledger")
CLIENT_CERT = make_key_cert(key_of("client"), CLIENT_LEDGER.public, NETWORK_ID, NOW_MS, HOUR_MS, 1)


@dataclass
class FakeSettlement:
    """Remembers what would be presented to the ledger."""

    name: str
    settled: list[int] = field(default_factory=list)

    @property
    def key(self) -> SigningKey:
        """The stage's ledger key."""
        return key_of(f"{self.name} ledger")

    @property
    def cert(self) -> SignedEnvelope:
        """Its certificate."""
        return make_key_cert(key_of(self.name), self.key.public, NETWORK_ID, NOW_MS, HOUR_MS, 1)

    def settle_later(self, session: StageSession) -> None:
        """Note what the best voucher promises."""
        if session.books is not None:
            self.settled.append(session.books.earned)


class MemorySpill:
    """Spill files in memory; ``broken`` makes every write fail."""

    def __init__(self) -> None:
        self.files: dict[Key, bytearray] = {}
        self.broken = False

    def append(self, key: Key, data: bytes) -> None:
        """Write at the end."""
        if self.broken:
            raise OSError("the disk is full")
        self.files.setdefault(key, bytearray()).extend(data)

    def read(self, key: Key, offset: int, size: int) -> bytes:
        """Read a part."""
        return bytes(self.files[key][offset : offset + size])

    def truncate(self, key: Key, size: int) -> None:
        """Forget the end."""
        del self.files.get(key, bytearray())[size:]

    def drop(self, key: Key) -> None:
        """Forget the file."""
        self.files.pop(key, None)


@dataclass
class FakeWorker:
    """Keeps jobs until the test computes them."""

    jobs: deque[Job] = field(default_factory=deque)
    jobs_max: int = 1024

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return len(self.jobs)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        if len(self.jobs) >= self.jobs_max:
            raise CapacityError("the stage has too many frames queued")
        self.jobs.append(job)


@contextmanager
def _no_error() -> Iterator[None]:
    """What comes from outside must never raise in a stage."""
    try:
        yield
    except PlaitError as error:
        raise AssertionError("a stage let an error out") from error


class PaperNode:
    """One stage with its fakes; ``name`` gives its keys and its offer."""

    def __init__(self, swarm: "PaperSwarm", name: str, span: Span, limits: Limits) -> None:
        self.offer = paper_offer(name, span)
        self.peer = self.offer.peer
        self.compute = FakeStage(span, kv_tokens_total=swarm.kv_tokens)
        self.settlement = FakeSettlement(name)
        self.spill = MemorySpill()
        tape = Tape(MemorySpill(), bytes_max=10**7, window_ms=AUDIT_WINDOW_MS)
        self.tape = tape if swarm.retain_inputs else None
        self.worker = FakeWorker()
        self.congested: set[PeerId] = set()
        self.draining = False
        self.unwitnessed = ""
        self.caught: list[VoucherFork] = []
        self._swarm = swarm
        self.stage = Stage(
            compute=self.compute,
            authorities=paper_network().authorities,
            trusted=lambda: paper_network().authorities,
            settlement=self.settlement,
            links=self,
            worker=self.worker,
            retained=Retained(self.spill, memory_bytes_max=swarm.memory, spill_bytes_max=10**6),
            identify=self._identity,
            view=swarm.view,
            clock_ms=lambda: swarm.now_ms,
            monotonic_us=lambda: swarm.now_ms * 1000,
            speeds_us=lambda: (1_000, 100),
            vocabulary=VOCABULARY_SIZE,
            limits=limits,
            tape=self.tape,
            caught=self.caught.append,
        )

    def _identity(self) -> StageIdentity:
        offers = {self.offer.digest: self.offer}
        return StageIdentity(
            NETWORK_ID,
            self.peer,
            FAKE_SHAPE,
            2048,
            offers,
            self.draining,
            unwitnessed=self.unwitnessed,
        )

    def send_down(self, peer: PeerId, message: stage_pb2.LinkRequest) -> None:
        """Queue a message for the next stage."""
        self._swarm.send(self.peer, peer, message)

    def send_up(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        """Queue a message for the stage before, or for the client."""
        self._swarm.send(self.peer, peer, message)

    def has_room(self, peer: PeerId) -> bool:
        """Whether the test lets replays go on."""
        return peer not in self.congested

    def compute_one(self) -> None:
        """Compute the job that waits longest."""
        job = self.worker.jobs.popleft()
        [done] = self.compute.step([job.work()])
        with _no_error():
            self.stage.finish(job, done)

    @property
    def held(self) -> dict[str, int]:
        """Whatever a session may hold here, by name; all zero when nothing leaks."""
        return {
            "sessions": len(self.stage.sessions),
            "kv_tokens": self.compute.kv_tokens_total - self.compute.kv_tokens_free,
            "jobs": self.worker.queued,
            "queued_bytes": self.stage.queued_bytes,
            "retained_bytes": self.stage.retained.memory_bytes,
            "spill_bytes": self.stage.retained.spill_bytes,
            "spill_files": len(self.spill.files),
        }


Message = stage_pb2.LinkRequest | stage_pb2.LinkResponse


class PaperSwarm:
    """Nodes by name and the queue between them. ``dead`` ones neither send nor answer."""

    def __init__(
        self,
        *,
        kv_tokens: int = 4096,
        memory: int = 10**6,
        retain_inputs: bool = False,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        self.now_ms = NOW_MS
        self.kv_tokens, self.memory, self.retain_inputs = kv_tokens, memory, retain_inputs
        self.nodes: dict[PeerId, PaperNode] = {}
        self.dead: set[PeerId] = set()
        self.queue: deque[tuple[PeerId, PeerId, Message]] = deque()
        self.inbox: list[tuple[PeerId, stage_pb2.LinkResponse]] = []
        """What came to the client, and from whom."""
        self.tamper: Callable[[stage_pb2.Frame], stage_pb2.Frame] = lambda frame: frame
        self._limits = limits

    def add(self, name: str, span: Span) -> PeerId:
        """Start a node."""
        node = PaperNode(self, name, span, self._limits)
        self.nodes[node.peer] = node
        return node.peer

    def node(self, peer: PeerId) -> PaperNode:
        """A node that lives; raises ``PeerUnreachable``."""
        if peer not in self.nodes:
            raise PeerUnreachable(f"no answer from {peer}")
        return self.nodes[peer]

    def view(self) -> View:
        """Everybody's offers."""
        return View(offers={node.peer: node.offer for node in self.nodes.values()}, rtt_us={})

    def send(self, sender: PeerId, peer: PeerId, message: Message) -> None:
        """Queue a message; raises ``PeerUnreachable`` if the receiver is dead."""
        if peer in self.dead:
            raise PeerUnreachable(f"no link to {peer}")
        self.queue.append((sender, peer, message))

    def kill(self, peer: PeerId) -> None:
        """Make a node or the client vanish: everybody's links to it break."""
        self.dead.add(peer)
        self.nodes.pop(peer, None)
        self.queue = deque(item for item in self.queue if peer not in item[:2])
        for node in self.nodes.values():
            node.stage.on_peer_lost(peer, "killed")
            node.stage.on_link_lost(peer, peer, others_left=False)

    def deliver_one(self) -> None:
        """Deliver the message that waits longest."""
        sender, peer, message = self.queue.popleft()
        if isinstance(message, stage_pb2.LinkResponse) and peer == CLIENT:
            self.inbox.append((sender, message))
        elif peer in self.nodes:
            with _no_error():
                self._deliver(self.nodes[peer], sender, message)

    def _deliver(self, node: PaperNode, sender: PeerId, message: Message) -> None:
        if isinstance(message, stage_pb2.LinkResponse):
            node.stage.on_response(sender, message)
        elif message.WhichOneof("kind") == "frame":
            node.stage.on_frame(self.tamper(message.frame), sender, sender)
        else:
            node.stage.on_upstream_fault(message.fault, sender)

    def run(self) -> None:
        """Deliver and compute until nothing waits."""
        while True:
            busy = [node for node in self.nodes.values() if node.worker.jobs]
            if self.queue:
                self.deliver_one()
            elif busy:
                busy[0].compute_one()
            else:
                return

    def pass_time(self, time_ms: int) -> None:
        """Let time go by, expire, and run."""
        self.now_ms += time_ms
        for node in tuple(self.nodes.values()):
            node.stage.expire()
        self.run()

    def held(self) -> dict[str, int]:
        """What all nodes together hold; all zero when nothing leaks."""
        totals: dict[str, int] = {}
        for node in self.nodes.values():
            for name, value in node.held.items():
                totals[name] = totals.get(name, 0) + value
        return totals


class Faulted(Exception):
    """A fault came where a result was due; ``fault`` says which."""

    def __init__(self, fault: stage_pb2.SessionFault) -> None:
        super().__init__(f"{fault.code}: {fault.reason}")
        self.fault = fault


class Rejected(Exception):
    """A stage refused; ``refusal`` says why."""

    def __init__(self, refusal: session_pb2.Refusal) -> None:
        super().__init__(f"{refusal.code}: {refusal.reason}")
        self.refusal = refusal


class PaperClient:
    """One session: opens, feeds, pays, reroutes. ``drawn`` are the ids so far."""

    def __init__(
        self,
        swarm: PaperSwarm,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        session: bytes = b"session",
        chunk_tokens: int = 4,
        prefill_chunk_tokens: int = 8,
        sampling: Sampling = Sampling(end_ids=(0,)),  # noqa: B008 - frozen
        wire_dtype: WireDtype = "fp32",
    ) -> None:
        self.wire_dtype: WireDtype = wire_dtype
        self.swarm, self.prompt, self.sampling = swarm, tuple(prompt), sampling
        self.drawn: list[int] = []
        self.nonce = digest(b"nonce of " + session)
        self.terms: SessionTerms
        self.books: ClientBooks
        self.voucher: SignedEnvelope | None = None
        self._sizes = (max_tokens, chunk_tokens, prefill_chunk_tokens)
        self._session_id = SessionId(digest(session)[:16])
        self._traversal = 0
        self._last_accepted: int | None = None
        self._unclosed = 0
        self._ungranted: list[tuple[PeerId, session_pb2.ConfirmRequest]] = []

    # Opening ------------------------------------------------------------------------

    def first_terms(self, *peers: PeerId) -> SessionTerms:
        """The terms of epoch 1 through these peers."""
        max_tokens, chunk_tokens, prefill_chunk_tokens = self._sizes
        return SessionTerms(
            network_id=NETWORK_ID,
            session_id=self._session_id,
            epoch=1,
            client=CLIENT,
            client_ledger_key=CLIENT_LEDGER.public,
            model_digest=FAKE_SHAPE.digest,
            stages=tuple(self._new_stage(peer) for peer in peers),
            prompt_tokens=len(self.prompt),
            max_tokens=max_tokens,
            chunk_tokens=chunk_tokens,
            prefill_chunk_tokens=prefill_chunk_tokens,
            handoff_salt=bytes(32),
            wire_dtype=self.wire_dtype,
        )

    def _new_stage(self, peer: PeerId) -> StageTerms:
        node = self.swarm.node(peer)
        return _stage_terms(node.offer, node.settlement.key.public)

    def opening(self, terms: SessionTerms, index: int) -> session_pb2.OpenRequest:
        """The request that opens one stage."""
        commit = nonce_commitment(self.nonce)
        message = opening_to_message(terms, self.sampling, NOW_MS, NOW_MS + HOUR_MS, commit)
        return session_pb2.OpenRequest(
            session_open=seal(CLIENT_LEDGER, message), client_cert=CLIENT_CERT, stage_index=index
        )

    def confirmation(
        self, terms: SessionTerms, *, credit: bool = True, granted: bool = True
    ) -> session_pb2.ConfirmRequest:
        """The request that confirms a stage, with a reservation and its grant if told."""
        request = session_pb2.ConfirmRequest(session_id=terms.session_id, epoch=terms.epoch)
        if credit:
            reservation = make_reservation(
                CLIENT_LEDGER, terms, 0, terms.epoch, NOW_MS, HOUR_MS, route_digest(terms)
            )
            request.reservation.CopyFrom(reservation)
            if granted:
                request.grant.CopyFrom(grant_of(reservation))
        return request

    def open(self, *peers: PeerId) -> None:
        """Open epoch 1 on every stage."""
        self.terms = self.first_terms(*peers)
        self.hold(self.terms)
        for peer in reversed(peers):
            self.confirm(peer, self.confirmation(self.terms))
        self.books = ClientBooks(self.terms, CLIENT_LEDGER)

    def hold(self, terms: SessionTerms) -> None:
        """Send Open to every stage; raises ``Rejected``."""
        for index, stage in enumerate(terms.stages):
            request = self.opening(terms, index)
            response = self.swarm.node(stage.peer).stage.open(request, CLIENT)
            if response.HasField("refusal"):
                raise Rejected(response.refusal)

    def confirm(self, peer: PeerId, request: session_pb2.ConfirmRequest) -> None:
        """Send Confirm to one stage; raises ``Rejected``."""
        stage = self.swarm.node(peer).stage
        checked = stage.check_confirm(request, CLIENT)
        response = stage.activate(checked) if isinstance(checked, Confirming) else checked
        if response.HasField("refusal"):
            raise Rejected(response.refusal)

    # Feeding ------------------------------------------------------------------------

    def prefill(self, cached: int = 0) -> None:
        """Feed the prompt, from behind what every stage has cached."""
        size, start = self._sizes[2], cached
        while start < len(self.prompt):
            ids = self.prompt[start : start + size]
            start += len(ids)
            self._traverse(start - len(ids), ids, sample=start == len(self.prompt), close=True)

    def decode(self, tokens: int) -> None:
        """Draw more tokens, one traversal each."""
        for _ in range(tokens):
            self._unclosed += 1
            full = self._unclosed == self._sizes[1] or len(self.drawn) + 1 == self._sizes[0]
            self._traverse(self.next_position, (self.drawn[-1],), sample=True, close=full)

    def draft(self, drafts: Sequence[int]) -> None:
        """Draw with guesses: as many tokens as are right, and one more."""
        ids = (self.drawn[-1], *drafts)
        self._traverse(self.next_position, ids, sample=True, close=False, drafts=len(drafts))

    @property
    def next_position(self) -> int:
        """The position of the id to feed next."""
        return len(self.prompt) + len(self.drawn) - 1

    def frame(
        self, first_position: int, ids: Sequence[int], *, sample: bool, close: bool
    ) -> stage_pb2.Frame:
        """The next frame."""
        message = stage_pb2.Frame(
            session_id=self.terms.session_id,
            epoch=self.terms.epoch,
            traversal=self._traversal,
            first_position=first_position,
            sample=sample,
            close_chunk=close,
            voucher=self.voucher,
        )
        if ids:
            message.token_ids.ids.extend(ids)
        return message

    def send(self, frame: stage_pb2.Frame) -> None:
        """Put a frame on the link to the first stage."""
        request = stage_pb2.LinkRequest(frame=frame)
        self.swarm.send(CLIENT, self.terms.stages[0].peer, request)

    def _traverse(
        self,
        first_position: int,
        ids: Sequence[int],
        *,
        sample: bool,
        close: bool,
        drafts: int = 0,
    ) -> None:
        frame = self.frame(first_position, ids, sample=sample, close=close)
        frame.draft_ids.extend(ids[len(ids) - drafts :])
        self.books.sent(self._traversal, first_position, tuple(ids), drafts=drafts)
        self._traversal += 1
        self.voucher = None
        self.send(frame)
        self.swarm.run()
        self.accept(frame)

    def accept(self, frame: stage_pb2.Frame) -> None:
        """Take the result of a frame; raises ``Faulted`` if a fault came instead."""
        result = self.result()
        if result.traversal != frame.traversal:
            raise DeadlineExceeded(f"traversal {result.traversal} answered late")
        self.drawn += result.ids
        self._last_accepted = result.traversal
        self.books.drawn(
            result.traversal, frame.first_position, tuple(result.ids), result.draws or None
        )
        if frame.close_chunk:
            self._unclosed = 0
            receipts = tuple(result.receipts)
            self.voucher = self.books.accept_receipts(receipts, frame.traversal, NOW_MS)

    def result(self) -> stage_pb2.TokenResult:
        """What came of this epoch; raises ``Faulted`` if a fault did."""
        answers, self.swarm.inbox = self.swarm.inbox, []
        told = [getattr(answer, answer.WhichOneof("kind") or "") for _, answer in answers]
        current = [message for message in told if message.epoch == self.terms.epoch]
        for message in current:
            if isinstance(message, stage_pb2.SessionFault):
                raise Faulted(message)
        results = [one for one in current if isinstance(one, stage_pb2.TokenResult)]
        if len(results) != 1:
            raise DeadlineExceeded(f"{len(results)} results came where one was due")
        return results[0]

    # Rerouting and closing ----------------------------------------------------------

    def close_epoch(self) -> dict[PeerId, session_pb2.CloseEpochResponse]:
        """Freeze the epoch on every stage that answers."""
        self.swarm.inbox.clear()
        request = session_pb2.CloseEpochRequest(
            session_id=self.terms.session_id,
            epoch=self.terms.epoch,
            traversal=self._last_accepted,
            position=self.resume_position,
        )
        return {
            stage.peer: self.swarm.node(stage.peer).stage.close_epoch(request, CLIENT)
            for stage in self.terms.stages
            if stage.peer in self.swarm.nodes
        }

    @property
    def resume_position(self) -> int:
        """Where the next epoch goes on, if the whole prompt was fed."""
        return self.next_position if self.drawn else 0

    def next_terms(
        self, answers: dict[PeerId, session_pb2.CloseEpochResponse], *peers: PeerId
    ) -> SessionTerms:
        """The terms of the next epoch; stages of ``answers`` stay, the others are new."""
        at, counts = self.resume_position, self.books.counts
        before = {stage.peer: stage for stage in self.terms.stages}
        stages: list[StageTerms] = []
        next_is_rebuilt = False
        for peer in reversed(peers):
            answer = answers.get(peer)
            if answer is not None and peer in before:
                short = answer.positions < at or (next_is_rebuilt and answer.retained < at)
                stage = replace(before[peer], rebuilt=short)
            else:
                stage = replace(
                    self._new_stage(peer),
                    entered_epoch=self.terms.epoch + 1,
                    base=counts,
                    replayed=at,
                    rebuilt=True,
                    carried=self.books.promised(peer),
                )
            next_is_rebuilt = stage.rebuilt
            stages.insert(0, stage)
        return replace(
            self.terms,
            epoch=self.terms.epoch + 1,
            stages=tuple(stages),
            resume_position=at,
            start=counts,
        )

    def show_grants(self) -> None:
        """Show each stage that entered the grant for the reservation it started on."""
        waiting, self._ungranted = self._ungranted, []
        for peer, request in waiting:
            request.epoch = self.terms.epoch
            self.confirm(peer, request)

    def reroute(self, *peers: PeerId, granted: bool = True) -> None:
        """Close the epoch, open the next through these peers, confirm, and replay."""
        answers = self.close_epoch()
        receipts = [
            answer.receipt if answer is not None and answer.HasField("receipt") else None
            for answer in (answers.get(stage.peer) for stage in self.terms.stages)
        ]
        closing = self.books.close_epoch(
            receipts, self._last_accepted, self.resume_position, NOW_MS
        )
        latest = closing or self.books.voucher
        terms = self.next_terms(answers, *peers)
        self.hold(terms)
        self.terms, self.voucher, self._last_accepted = terms, None, None
        self.books = self.books.next_epoch(terms)
        for index, peer in enumerate(peers):
            entered = terms.entered(index)
            request = self.confirmation(terms, credit=entered, granted=False)
            if latest is not None and not entered:
                request.voucher.CopyFrom(latest)
            self.confirm(peer, request)
        self._ungranted += [
            (peer, self.confirmation(terms)) for i, peer in enumerate(peers) if terms.entered(i)
        ]
        if granted:
            self.show_grants()
        if terms.stages[0].rebuilt:
            self._replay_ids()
        self._traversal = terms.resume_position
        self._unclosed = self._sizes[1] - 1  # the first live frame closes its chunk

    def _replay_ids(self) -> None:
        ids = [*self.prompt, *self.drawn][: self.terms.resume_position]
        for traversal, start in enumerate(range(0, len(ids), 256)):
            part = ids[start : start + 256]
            frame = stage_pb2.Frame(
                session_id=self.terms.session_id,
                epoch=self.terms.epoch,
                traversal=traversal,
                first_position=start,
                replay=True,
                token_ids=stage_pb2.TokenIds(ids=part),
            )
            self.books.sent(traversal, start, tuple(part), replay=True)
            self.send(frame)

    def close(self) -> None:
        """End the session on every stage that lives, and settle."""
        request = session_pb2.CloseRequest(
            session_id=self.terms.session_id, epoch=self.terms.epoch, voucher=self.books.voucher
        )
        for stage in self.terms.stages:
            node = self.swarm.nodes.get(stage.peer)
            ended = node.stage.close(request, CLIENT) if node else None
            if node and ended:
                node.settlement.settle_later(ended)


def _stage_terms(offer: Offer, ledger_key: bytes) -> StageTerms:
    return StageTerms(
        peer=offer.peer,
        ledger_key=ledger_key,
        span=offer.span,
        priced_layers=FAKE_SHAPE.priced_layers(offer.span),
        prices=offer.prices,
        numeric_class=offer.numeric_class,
        offer_digest=offer.digest,
    )
