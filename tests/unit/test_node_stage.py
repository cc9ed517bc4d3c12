"""A pipeline of real stages, wired in memory: fake compute, real books, real envelopes."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from plait.client.driver import Accounting, Driver, Finish, SendFrame
from plait.envelope import digest, seal
from plait.errors import BadSignature, PeerUnreachable, RemoteProtocolError
from plait.ledger.certs import check_key_cert, make_key_cert
from plait.ledger.client_books import ClientBooks
from plait.ledger.opening import opening_to_message, route_digest
from plait.ledger.reserve import make_reservation
from plait.ledger.terms import SessionTerms, StageTerms
from plait.node.admission import StageIdentity
from plait.node.sessions import StageSession
from plait.node.stage import ResponseOutbox, Stage
from plait.router.view import View
from plait.testing.accounting import HOUR_MS, NETWORK_ID, NOW_MS, grant_of, key_of, paper_network
from plait.testing.compute import FAKE_SHAPE, VOCABULARY_SIZE, FakeStage
from plait.testing.offers import paper_offer
from plait.types import Digest, PeerId, Prices, Sampling, SessionId, Span
from plait.v1 import session_pb2, stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SessionVoucher

CLIENT = key_of("client").peer_id
CLIENT_LEDGER = key_of("client ledger")
CLIENT_CERT = make_key_cert(key_of("client"), CLIENT_LEDGER.public, NETWORK_ID, NOW_MS, HOUR_MS, 1)


@dataclass
class FakeSettler:
    """Remembers what would be presented."""

    name: str
    settled: list[int] = field(default_factory=list)

    @property
    def key(self) -> Any:
        return key_of(f"{self.name} ledger")

    @property
    def cert(self) -> SignedEnvelope:
        return make_key_cert(key_of(self.name), self.key.public, NETWORK_ID, NOW_MS, HOUR_MS, 1)

    async def settle(self, session: StageSession) -> bool:
        self.settle_later(session)
        return True

    def settle_later(self, session: StageSession) -> None:
        if session.books is not None:
            self.settled.append(session.books.earned)


class WiredNeighbours:
    """Hands messages straight to the next stage of the same test."""

    def __init__(self, swarm: "Swarm", peer: PeerId) -> None:
        self.on_response: Callable[[PeerId, stage_pb2.LinkResponse], None]
        self.on_broken: Callable[[PeerId, str], None]
        self._swarm, self._peer = swarm, peer
        self._links: dict[PeerId, ResponseOutbox] = {}

    async def ensure(self, peer: PeerId) -> None:
        if peer in self._swarm.unreachable:
            raise PeerUnreachable("cut")
        self._links.setdefault(peer, self._swarm.stages[peer].attach(self._peer))

    def send(self, peer: PeerId, message: stage_pb2.LinkRequest) -> None:
        if peer in self._swarm.unreachable:
            raise PeerUnreachable("cut")
        stage, link = self._swarm.stages[peer], self._links[peer]
        if message.WhichOneof("kind") == "frame":
            stage.on_frame(self._swarm.tamper(message.frame), self._peer, link)
        else:
            stage.on_upstream_fault(message.fault, self._peer)
        for answer in drained(link):
            self.on_response(peer, answer)


def drained(outbox: ResponseOutbox) -> Iterator[stage_pb2.LinkResponse]:
    queue = outbox._queue
    while not queue.empty():
        message = queue.get_nowait()
        if message is not None:
            yield message


class Swarm:
    """Stages by peer, and a client that drives one session by hand."""

    def __init__(self, *spans: Span) -> None:
        self.tamper: Callable[[stage_pb2.Frame], stage_pb2.Frame] = lambda frame: frame
        self.unreachable: set[PeerId] = set()
        self.now_ms = NOW_MS
        self.offers = [paper_offer(f"node {i}", span) for i, span in enumerate(spans)]
        self.peers = [offer.peer for offer in self.offers]
        view = View(offers={offer.peer: offer for offer in self.offers}, rtt_us={})
        self.stages: dict[PeerId, Stage] = {}
        self.computes: dict[PeerId, FakeStage] = {}
        self.settlers: dict[PeerId, FakeSettler] = {}
        for index, offer in enumerate(self.offers):
            self.computes[offer.peer] = FakeStage(offer.span)
            self.settlers[offer.peer] = FakeSettler(f"node {index}")
            self.stages[offer.peer] = Stage(
                compute=self.computes[offer.peer],
                network=paper_network(),
                settler=self.settlers[offer.peer],  # type: ignore[arg-type]
                neighbours=WiredNeighbours(self, offer.peer),  # type: ignore[arg-type]
                identify=lambda offer=offer: StageIdentity(  # type: ignore[misc]
                    NETWORK_ID, offer.peer, FAKE_SHAPE, 2048, {offer.digest: offer}, False
                ),
                view=lambda: view,
                clock_ms=lambda: self.now_ms,
                vocabulary=VOCABULARY_SIZE,
                sessions_max=4,
            )

    def terms(self, prompt: int, max_tokens: int, name: bytes = b"session") -> SessionTerms:
        stages = tuple(
            StageTerms(
                peer=offer.peer,
                ledger_key=self.settlers[offer.peer].key.public,
                span=offer.span,
                priced_layers=FAKE_SHAPE.priced_layers(offer.span),
                prices=offer.prices,
                numeric_class=offer.numeric_class,
                offer_digest=offer.digest,
            )
            for offer in self.offers
        )
        return SessionTerms(
            network_id=NETWORK_ID,
            session_id=SessionId(digest(name)[:16]),
            epoch=1,
            client=CLIENT,
            client_ledger_key=CLIENT_LEDGER.public,
            model_digest=FAKE_SHAPE.digest,
            stages=stages,
            prompt_tokens=prompt,
            max_tokens=max_tokens,
            chunk_tokens=4,
            prefill_chunk_tokens=8,
            handoff_salt=bytes(32),
        )

    def opening(self, terms: SessionTerms, index: int = 0) -> session_pb2.OpenRequest:
        message = opening_to_message(terms, Sampling(end_ids=(0,)), NOW_MS, NOW_MS + HOUR_MS)
        return session_pb2.OpenRequest(
            session_open=seal(CLIENT_LEDGER, message), client_cert=CLIENT_CERT, stage_index=index
        )

    def confirmation(self, terms: SessionTerms) -> session_pb2.ConfirmRequest:
        reservation = make_reservation(
            CLIENT_LEDGER, terms, 0, 1, NOW_MS, HOUR_MS, route_digest(terms)
        )
        return session_pb2.ConfirmRequest(
            session_id=terms.session_id,
            epoch=1,
            reservation=reservation,
            grant=grant_of(reservation),
        )

    async def open(self, terms: SessionTerms) -> None:
        for index, peer in enumerate(self.peers):
            response = self.stages[peer].open(self.opening(terms, index), CLIENT)
            assert not response.HasField("refusal"), response.refusal
            check_key_cert(response.stage_cert, NETWORK_ID, NOW_MS, peer=peer)
        for peer in reversed(self.peers):
            confirmed = await self.stages[peer].confirm(self.confirmation(terms), CLIENT)
            assert not confirmed.HasField("refusal"), confirmed.refusal

    def held(self) -> int:
        """KV tokens in use anywhere."""
        return sum(c.kv_tokens_total - c.kv_tokens_free for c in self.computes.values())


def frame_message(
    terms: SessionTerms, frame: SendFrame, voucher: SignedEnvelope | None
) -> stage_pb2.Frame:
    message = stage_pb2.Frame(
        session_id=terms.session_id,
        epoch=1,
        traversal=frame.traversal,
        first_position=frame.first_position,
        sample=frame.sample,
        close_chunk=frame.close_chunk,
        voucher=voucher,
    )
    if frame.ids:
        message.token_ids.ids.extend(frame.ids)
    return message


async def next_answer(*links: ResponseOutbox) -> stage_pb2.LinkResponse:
    """What comes first on any of the client's links."""
    async with asyncio.timeout(5):
        while True:
            for link in links:
                for answer in drained(link):
                    return answer
            await asyncio.sleep(0)


async def generate(swarm: Swarm, terms: SessionTerms, prompt: tuple[int, ...]) -> list[int]:
    """Drive a session to its end; raises AssertionError with the fault if one comes."""
    first, last = swarm.stages[swarm.peers[0]], swarm.stages[swarm.peers[-1]]
    link = first.attach(CLIENT)
    answers = link if first is last else last.attach(CLIENT)
    driver = Driver(
        prompt,
        terms.max_tokens,
        frozenset({0}),
        Accounting(terms.chunk_tokens, terms.prefill_chunk_tokens),
        VOCABULARY_SIZE,
    )
    books, voucher = ClientBooks(terms, CLIENT_LEDGER), None
    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(stage.compute_forever()) for stage in swarm.stages.values()]
        try:
            actions = driver.start()
            while not any(isinstance(action, Finish) for action in actions):
                sent = next(action for action in actions if isinstance(action, SendFrame))
                books.sent(sent.traversal, sent.first_position, sent.ids)
                first.on_frame(frame_message(terms, sent, voucher), CLIENT, link)
                voucher = None
                answer = await next_answer(link, answers)
                assert answer.WhichOneof("kind") == "result", answer.fault.reason
                result = answer.result
                actions = driver.on_result(
                    result.traversal, list(result.ids), list(result.logprobs)
                )
                books.drawn(sent.traversal, sent.first_position, tuple(result.ids))
                if sent.close_chunk:
                    voucher = books.accept_receipts(tuple(result.receipts), sent.traversal, NOW_MS)
            request = session_pb2.CloseRequest(
                session_id=terms.session_id, epoch=1, voucher=books.voucher, reason="stop"
            )
            for stage in swarm.stages.values():
                assert (await stage.close(request, CLIENT)).settled
        finally:
            for worker in workers:
                worker.cancel()
            first.detach(CLIENT, link)
            last.detach(CLIENT, answers)
    assert sum(sum(s.settled) for s in swarm.settlers.values()) == books.cost
    return driver.drawn


SPLITS = [
    (Span(0, 4),),
    (Span(0, 1), Span(1, 4)),
    (Span(0, 2), Span(2, 3), Span(3, 4)),
    (Span(0, 1), Span(1, 2), Span(2, 3), Span(3, 4)),
]


async def test_every_split_draws_the_same_tokens_and_frees_everything() -> None:
    prompt = tuple(range(1, 20))
    drawn = []
    for spans in SPLITS:
        swarm = Swarm(*spans)
        terms = swarm.terms(len(prompt), 11)
        await swarm.open(terms)
        drawn.append(await generate(swarm, terms, prompt))
        assert swarm.held() == 0
        assert all(len(stage.sessions) == 0 for stage in swarm.stages.values())
    assert all(tokens == drawn[0] for tokens in drawn)
    assert len(drawn[0]) == 11


async def test_a_bad_hand_off_ends_the_session_everywhere_and_is_still_paid_fairly() -> None:
    swarm = Swarm(*SPLITS[2])
    terms = swarm.terms(3, 8)
    await swarm.open(terms)

    def corrupt(frame: stage_pb2.Frame) -> stage_pb2.Frame:
        if frame.traversal == 2:
            frame.activations.data = b"\xff" * len(frame.activations.data)
        return frame

    swarm.tamper = corrupt
    with pytest.RaisesGroup(pytest.RaisesExc(AssertionError, match="NaN"), flatten_subgroups=True):
        await generate(swarm, terms, (1, 2, 3))
    assert swarm.held() == 0


async def test_a_broken_link_frees_the_whole_pipeline() -> None:
    swarm = Swarm(*SPLITS[1])
    terms = swarm.terms(3, 8)
    await swarm.open(terms)
    first, last = (swarm.stages[peer] for peer in swarm.peers)
    last.on_peer_lost(swarm.peers[0], "test")
    assert len(last.sessions) == 0
    first.on_peer_lost(swarm.peers[1], "test")
    assert swarm.held() == 0


async def test_a_vanished_client_frees_the_whole_pipeline() -> None:
    swarm = Swarm(*SPLITS[1])
    terms = swarm.terms(3, 8)
    await swarm.open(terms)
    first = swarm.stages[swarm.peers[0]]
    link = first.attach(CLIENT)
    first.detach(CLIENT, link)
    assert swarm.held() == 0


async def test_holds_and_idle_sessions_expire() -> None:
    swarm = Swarm(*SPLITS[1])
    first = swarm.stages[swarm.peers[0]]
    first.open(swarm.opening(swarm.terms(3, 8)), CLIENT)
    assert swarm.held() > 0
    swarm.now_ms += 2_001
    first.expire()
    assert swarm.held() == 0
    swarm.now_ms = NOW_MS
    await swarm.open(swarm.terms(3, 8))
    swarm.now_ms += 60_001
    for stage in swarm.stages.values():
        stage.expire()
    assert swarm.held() == 0


async def test_an_unreachable_next_stage_is_a_refusal_that_names_it() -> None:
    swarm = Swarm(*SPLITS[1])
    terms = swarm.terms(3, 8)
    for index, peer in enumerate(swarm.peers):
        swarm.stages[peer].open(swarm.opening(terms, index), CLIENT)
    swarm.unreachable.add(swarm.peers[1])
    response = await swarm.stages[swarm.peers[0]].confirm(swarm.confirmation(terms), CLIENT)
    assert response.refusal.code == "neighbour"


def _other_price(terms: SessionTerms) -> SessionTerms:
    cheap = dataclasses.replace(terms.stages[0], prices=Prices(prompt=1, output=1))
    return dataclasses.replace(terms, stages=(cheap, *terms.stages[1:]))


def _other_span(terms: SessionTerms) -> SessionTerms:
    wide = dataclasses.replace(terms.stages[0], span=Span(0, 2))
    rest = dataclasses.replace(terms.stages[1], span=Span(2, 4))
    return dataclasses.replace(terms, stages=(wide, rest))


def _stale_offer(terms: SessionTerms) -> SessionTerms:
    stale = dataclasses.replace(terms.stages[0], offer_digest=Digest(bytes(32)))
    return dataclasses.replace(terms, stages=(stale, *terms.stages[1:]))


def _long(terms: SessionTerms) -> SessionTerms:
    return dataclasses.replace(terms, max_tokens=4096)


def _stranger(terms: SessionTerms) -> SessionTerms:
    unknown = dataclasses.replace(terms.stages[1], peer=key_of("stranger").peer_id)
    return dataclasses.replace(terms, stages=(terms.stages[0], unknown))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_other_price, "price"),
        (_other_span, "span"),
        (_stale_offer, "price"),
        (_long, "terms"),
        (_stranger, "neighbour"),
    ],
)
def test_terms_that_are_not_offered_are_refused_with_a_word(
    change: Callable[[SessionTerms], SessionTerms], code: str
) -> None:
    swarm = Swarm(Span(0, 1), Span(1, 4))
    terms = change(swarm.terms(3, 8))
    response = swarm.stages[swarm.peers[0]].open(swarm.opening(terms), CLIENT)
    assert response.refusal.code == code
    assert swarm.held() == 0


def test_another_caller_and_a_second_opening_are_protocol_errors() -> None:
    swarm = Swarm(Span(0, 4))
    stage, request = swarm.stages[swarm.peers[0]], swarm.opening(swarm.terms(3, 8))
    with pytest.raises(Exception, match="is of"):
        stage.open(request, key_of("stranger").peer_id)
    stage.open(request, CLIENT)
    with pytest.raises(RemoteProtocolError, match="open already"):
        stage.open(request, CLIENT)


async def test_a_forged_grant_is_refused_and_frees_the_hold() -> None:
    swarm = Swarm(Span(0, 4))
    terms = swarm.terms(3, 8)
    stage = swarm.stages[swarm.peers[0]]
    stage.open(swarm.opening(terms), CLIENT)
    confirmation = swarm.confirmation(terms)
    confirmation.grant.signer = key_of("stranger").public
    response = await stage.confirm(confirmation, CLIENT)
    assert response.refusal.code == "credit"
    assert swarm.held() == 0


async def test_frames_out_of_place_end_only_their_session() -> None:
    swarm = Swarm(Span(0, 4))
    stage = swarm.stages[swarm.peers[0]]
    good, bad = swarm.terms(3, 8), swarm.terms(3, 8, b"other")
    await swarm.open(good)
    await swarm.open(bad)
    link = stage.attach(CLIENT)
    stage.on_frame(frame_message(bad, SendFrame(5, 0, (1, 2, 3), True, True), None), CLIENT, link)
    [answer] = list(drained(link))
    assert "traversal 5" in answer.fault.reason
    assert [session.id for session in stage.sessions] == [good.session_id]
    stage.on_frame(
        frame_message(good, SendFrame(0, 0, (1, 2, 3), True, True), None),
        key_of("stranger").peer_id,
        link,
    )
    assert list(drained(link)) == []
    assert len(stage.sessions) == 1


async def test_empty_chunks_and_floods_end_their_session() -> None:
    swarm = Swarm(Span(0, 4))
    terms = swarm.terms(3, 8)
    await swarm.open(terms)
    stage = swarm.stages[swarm.peers[0]]
    link = stage.attach(CLIENT)
    empty = frame_message(terms, SendFrame(0, 2, (), False, True), None)
    stage.on_frame(empty, CLIENT, link)
    [answer] = list(drained(link))
    assert answer.fault.code == "protocol-remote"
    await swarm.open(terms)
    for position in range(3):
        frame = SendFrame(position, position, (1,), position == 2, close_chunk=False)
        stage.on_frame(frame_message(terms, frame, None), CLIENT, link)
    [session] = stage.sessions
    session.frames_queued = 16
    frame = SendFrame(3, 3, (1,), True, close_chunk=False)
    stage.on_frame(frame_message(terms, frame, None), CLIENT, link)
    [answer] = list(drained(link))
    assert "queued" in answer.fault.reason
    assert swarm.held() == 0


async def test_a_late_frame_is_not_computed() -> None:
    swarm = Swarm(Span(0, 4))
    terms = swarm.terms(3, 8)
    await swarm.open(terms)
    stage = swarm.stages[swarm.peers[0]]
    link = stage.attach(CLIENT)
    message = frame_message(terms, SendFrame(0, 0, (1, 2, 3), True, True), None)
    message.deadline_ms = NOW_MS - 1
    stage.on_frame(message, CLIENT, link)
    [answer] = list(drained(link))
    assert answer.fault.code == "deadline"
    assert swarm.held() == 0


async def test_a_forged_last_voucher_is_refused_and_the_session_still_ends() -> None:
    swarm = Swarm(Span(0, 4))
    terms = swarm.terms(3, 8)
    await swarm.open(terms)
    stage = swarm.stages[swarm.peers[0]]
    forged = seal(key_of("stranger"), SessionVoucher(session_id=terms.session_id, epoch=1))
    request = session_pb2.CloseRequest(session_id=terms.session_id, epoch=1, voucher=forged)
    with pytest.raises(BadSignature):
        await stage.close(request, CLIENT)
    assert swarm.held() == 0
