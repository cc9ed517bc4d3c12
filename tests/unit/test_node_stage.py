"""Stages of the fake model: what they take, refuse, compute, and what ends a session."""

import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from plait.envelope import seal
from plait.errors import (
    BadSignature,
    CapacityError,
    NetworkError,
    PeerUnreachable,
    RemoteProtocolError,
)
from plait.ledger.fork import check_fork_proof
from plait.ledger.terms import SessionTerms
from plait.node.admission import StageIdentity
from plait.node.overload import Limits
from plait.node.retained import Retained
from plait.node.stage_shell import LINKS_PER_PEER_MAX, CallerLinks, ResponseOutbox, StageShell
from plait.router.view import View
from plait.testing.accounting import NETWORK_ID, NOW_MS, key_of, paper_network
from plait.testing.compute import FAKE_SHAPE, VOCABULARY_SIZE, FakeStage
from plait.testing.offers import paper_offer
from plait.testing.stages import (
    CLIENT,
    CLIENT_LEDGER,
    FakeSettlement,
    Faulted,
    MemorySpill,
    PaperClient,
    PaperSwarm,
    Rejected,
)
from plait.types import Digest, PeerId, Prices, Qos, SessionId, Span
from plait.v1 import session_pb2, stage_pb2
from plait.v1.ledger_pb2 import SessionVoucher

SPLITS = [
    (Span(0, 4),),
    (Span(0, 1), Span(1, 4)),
    (Span(0, 2), Span(2, 3), Span(3, 4)),
    (Span(0, 1), Span(1, 2), Span(2, 3), Span(3, 4)),
]
STRANGER = key_of("stranger").peer_id


def swarm_of(
    spans: tuple[Span, ...], limits: Limits | None = None, kv_tokens: int = 4096
) -> tuple[PaperSwarm, list[PeerId]]:
    swarm = PaperSwarm(limits=limits or Limits(), kv_tokens=kv_tokens)
    return swarm, [swarm.add(f"node {i}", span) for i, span in enumerate(spans)]


def opened(
    spans: tuple[Span, ...], prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8
) -> tuple[PaperSwarm, list[PeerId], PaperClient]:
    swarm, peers = swarm_of(spans)
    client = PaperClient(swarm, prompt, max_tokens)
    client.open(*peers)
    return swarm, peers, client


def test_every_split_draws_the_same_tokens_is_paid_and_frees_everything() -> None:
    drawn = []
    for spans in SPLITS:
        swarm, _, client = opened(spans, tuple(range(1, 20)), 11)
        client.prefill()
        client.decode(10)
        client.close()
        drawn.append(client.drawn)
        assert not any(swarm.held().values())
        paid = sum(sum(node.settlement.settled) for node in swarm.nodes.values())
        assert paid == client.books.cost > 0
    assert all(tokens == drawn[0] for tokens in drawn)
    assert len(drawn[0]) == 11


def test_results_say_how_long_each_stage_took() -> None:
    swarm, peers, client = opened(SPLITS[2])
    frame = client.frame(0, (1, 2, 3), sample=True, close=True)
    client.send(frame)
    swarm.deliver_one()
    swarm.now_ms += 7
    swarm.nodes[peers[0]].compute_one()
    swarm.run()
    assert list(client.result().stage_us) == [7000, 0, 0]


def test_a_bad_hand_off_ends_the_stage_that_saw_it_and_suspends_the_others() -> None:
    swarm, peers, client = opened(SPLITS[2])
    client.prefill()

    def corrupt(frame: stage_pb2.Frame) -> stage_pb2.Frame:
        if frame.HasField("activations"):
            frame.activations.data = b"\xff" * len(frame.activations.data)
        return frame

    swarm.tamper = corrupt
    with pytest.raises(Faulted, match="not finite") as caught:
        client.decode(1)
    assert caught.value.fault.peer_id == peers[1]
    assert [len(swarm.nodes[peer].stage.sessions) for peer in peers] == [1, 0, 1]
    swarm.pass_time(30_000)
    assert not any(swarm.held().values())


def test_a_step_that_fails_ends_only_its_session() -> None:
    swarm, peers, client = opened(SPLITS[0])
    other = PaperClient(swarm, (1, 2, 3), 8, session=b"other")
    other.open(*peers)
    swarm.nodes[peers[0]].compute.fail_next(client.terms.session_id, ValueError("a bug"))
    with pytest.raises(Faulted, match="compute"):
        client.prefill()
    other.prefill()
    assert [s.id for s in swarm.nodes[peers[0]].stage.sessions] == [other.terms.session_id]


def test_holds_and_idle_sessions_expire() -> None:
    swarm, peers = swarm_of(SPLITS[1])
    client = PaperClient(swarm, (1, 2, 3), 8)
    client.hold(client.first_terms(*peers))
    assert swarm.held()["kv_tokens"] > 0
    swarm.pass_time(2_001)
    assert not any(swarm.held().values())
    client.open(*peers)
    swarm.pass_time(59_999)
    assert swarm.held()["sessions"] == 2
    swarm.pass_time(2)
    assert not any(swarm.held().values())


def test_a_session_that_went_while_it_was_confirmed_is_refused() -> None:
    swarm, peers = swarm_of(SPLITS[0])
    client = PaperClient(swarm, (1, 2, 3), 8)
    client.terms = client.first_terms(*peers)
    client.hold(client.terms)
    stage = swarm.nodes[peers[0]].stage
    checked = stage.check_confirm(client.confirmation(client.terms), CLIENT)
    swarm.pass_time(2_001)
    assert not isinstance(checked, session_pb2.ConfirmResponse)
    assert stage.activate(checked).refusal.code == "capacity"


def test_an_unreachable_next_stage_is_a_refusal_that_names_it() -> None:
    swarm, peers = swarm_of(SPLITS[1])
    client = PaperClient(swarm, (1, 2, 3), 8)
    client.terms = client.first_terms(*peers)
    client.hold(client.terms)
    stage = swarm.nodes[peers[0]].stage
    checked = stage.check_confirm(client.confirmation(client.terms), CLIENT)
    assert not isinstance(checked, session_pb2.ConfirmResponse)
    assert stage.unlinked(checked, "cut").refusal.code == "neighbour"
    assert len(stage.sessions) == 0


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
    unknown = dataclasses.replace(terms.stages[1], peer=STRANGER)
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
    swarm, peers = swarm_of(SPLITS[1])
    client = PaperClient(swarm, (1, 2, 3), 8)
    request = client.opening(change(client.first_terms(*peers)), 0)
    assert swarm.nodes[peers[0]].stage.open(request, CLIENT).refusal.code == code
    assert not any(swarm.held().values())


@pytest.mark.parametrize(
    ("qos", "prompt", "limits", "reason"),
    [
        ("batch", 50, Limits(), "above class batch"),
        ("interactive", 50, Limits(), ""),
        ("interactive", 90, Limits(), "KV tokens were asked for"),
        ("interactive", 1, Limits(sessions_max=1), "all 1 sessions"),
        ("interactive", 1, Limits(sessions_per_client_max=1), "one client"),
    ],
)
def test_too_much_is_refused_early_with_a_time_to_come_back(
    qos: Qos, prompt: int, limits: Limits, reason: str
) -> None:
    swarm, peers = swarm_of(SPLITS[0], limits, kv_tokens=100)
    PaperClient(swarm, range(1, 20), 1, session=b"first").open(*peers)
    client = PaperClient(swarm, range(1, prompt + 1), 8)
    terms = dataclasses.replace(client.first_terms(*peers), qos=qos)
    answer = swarm.nodes[peers[0]].stage.open(client.opening(terms, 0), CLIENT)
    assert answer.HasField("refusal") == bool(reason)
    if reason:
        assert answer.refusal.code == "capacity"
        assert reason in answer.refusal.reason
        assert answer.refusal.retry_after_ms >= 250


def test_another_caller_and_a_second_opening_are_protocol_errors() -> None:
    swarm, peers = swarm_of(SPLITS[0])
    client = PaperClient(swarm, (1, 2, 3), 8)
    stage = swarm.nodes[peers[0]].stage
    request = client.opening(client.first_terms(*peers), 0)
    with pytest.raises(Exception, match="is of"):
        stage.open(request, STRANGER)
    stage.open(request, CLIENT)
    with pytest.raises(RemoteProtocolError, match="open already"):
        stage.open(request, CLIENT)


def test_a_forged_grant_is_refused_and_frees_the_hold() -> None:
    swarm, peers = swarm_of(SPLITS[0])
    client = PaperClient(swarm, (1, 2, 3), 8)
    client.terms = client.first_terms(*peers)
    client.hold(client.terms)
    request = client.confirmation(client.terms)
    request.grant.signer = key_of("stranger").public
    with pytest.raises(Rejected, match="credit"):
        client.confirm(peers[0], request)
    assert not any(swarm.held().values())


def test_frames_out_of_place_end_only_their_session() -> None:
    swarm, peers, good = opened(SPLITS[0])
    bad = PaperClient(swarm, (1, 2, 3), 8, session=b"other")
    bad.open(*peers)
    frame = bad.frame(0, (1, 2, 3), sample=True, close=True)
    frame.traversal = 5
    bad.send(frame)
    swarm.run()
    with pytest.raises(Faulted, match="traversal 5"):
        bad.result()
    stage = swarm.nodes[peers[0]].stage
    assert [session.id for session in stage.sessions] == [good.terms.session_id]
    stage.on_frame(good.frame(0, (1, 2, 3), sample=True, close=True), STRANGER, STRANGER)
    swarm.run()
    assert (swarm.inbox, len(stage.sessions)) == ([], 1)


def test_empty_chunks_end_their_session() -> None:
    swarm, _, client = opened(SPLITS[0])
    client.send(client.frame(2, (), sample=False, close=True))
    swarm.run()
    with pytest.raises(Faulted, match="protocol-remote"):
        client.result()
    assert not any(swarm.held().values())


def test_floods_of_frames_and_of_bytes_end_their_session() -> None:
    for limits, word in (
        (Limits(frames_queued_max=1), "too many frames"),
        (Limits(peer_queued_bytes_max=63), "too many bytes"),
    ):
        swarm, peers = swarm_of(SPLITS[0], limits)
        client = PaperClient(swarm, range(1, 17), 8, prefill_chunk_tokens=16)
        client.open(*peers)
        ids = tuple(range(1, 9))
        for start in (0, 8):
            frame = client.frame(start, ids, sample=start == 8, close=True)
            frame.traversal = start // 8
            client.send(frame)
            swarm.deliver_one()
        swarm.run()
        with pytest.raises(Faulted, match=word):
            client.result()
        assert not any(swarm.held().values())


def test_a_late_frame_is_not_computed() -> None:
    swarm, _, client = opened(SPLITS[0])
    message = client.frame(0, (1, 2, 3), sample=True, close=True)
    message.deadline_ms = NOW_MS - 1
    client.send(message)
    swarm.run()
    with pytest.raises(Faulted, match="deadline"):
        client.result()
    assert not any(swarm.held().values())


def test_a_forged_last_voucher_is_refused_and_the_session_still_ends() -> None:
    swarm, peers, client = opened(SPLITS[0])
    forged = seal(key_of("stranger"), SessionVoucher(session_id=client.terms.session_id, epoch=1))
    request = session_pb2.CloseRequest(session_id=client.terms.session_id, epoch=1, voucher=forged)
    with pytest.raises(BadSignature):
        swarm.nodes[peers[0]].stage.close(request, CLIENT)
    assert not any(swarm.held().values())


def test_two_vouchers_of_one_number_are_a_portable_proof() -> None:
    swarm, peers, client = opened(SPLITS[1], max_tokens=40)
    client.prefill()
    client.decode(1)  # carries the voucher for the prompt
    node = swarm.nodes[peers[0]]
    paid = next(iter(node.stage.sessions)).require_books().voucher
    assert paid is not None and not node.caught
    other = SessionVoucher.FromString(paid.payload)
    other.issued_ms += 1
    client.voucher = seal(CLIENT_LEDGER, other)
    with pytest.raises(Faulted, match="two vouchers"):
        client.decode(1)
    (proof,) = node.caught
    assert check_fork_proof(proof, paper_network()).culprit == CLIENT


def test_drafts_are_drawn_or_rejected_and_never_change_the_answer() -> None:
    _, _, plain = opened(SPLITS[2], max_tokens=9)
    plain.prefill()
    plain.decode(8)
    swarm, peers = swarm_of(SPLITS[2])
    client = PaperClient(swarm, (1, 2, 3), 9, chunk_tokens=32)
    client.open(*peers)
    client.prefill()
    right, wrong = plain.drawn[1:3], [(plain.drawn[4] + 1) % VOCABULARY_SIZE]
    client.draft(right)
    assert client.drawn == plain.drawn[:4]
    client.draft(wrong)
    assert client.drawn == plain.drawn[:5]
    client.decode(4)
    assert client.drawn == plain.drawn
    client.close()
    assert not any(swarm.held().values())


class NoNeighbours:
    """A single stage has none."""

    on_response = on_broken = on_room = None

    def __len__(self) -> int:
        return 0

    async def ensure(self, peer: PeerId) -> None:
        raise PeerUnreachable("cut")

    def send(self, peer: PeerId, message: stage_pb2.LinkRequest) -> None:
        raise PeerUnreachable("cut")

    def has_room(self, peer: PeerId) -> bool:
        return True


class Settling(FakeSettlement):
    """A settlement that can be waited for."""

    async def settle(self, session: object) -> bool:
        self.settle_later(session)  # type: ignore[arg-type]
        return True


async def next_answer(link: ResponseOutbox) -> stage_pb2.LinkResponse:
    async with asyncio.timeout(5):
        async for message in link.drain():
            return message
    raise AssertionError("the link ended")


async def test_the_shell_computes_on_its_thread_answers_and_frees() -> None:
    offer = paper_offer("node", Span(0, 4))
    swarm = PaperSwarm()
    swarm.add("node", Span(0, 4))
    compute = FakeStage(Span(0, 4))
    settling = Settling("node")
    shell = StageShell(
        compute=compute,
        network=paper_network(),
        settler=settling,  # type: ignore[arg-type]
        neighbours=NoNeighbours(),  # type: ignore[arg-type]
        retained=Retained(MemorySpill(), memory_bytes_max=0, spill_bytes_max=0),
        identify=lambda: StageIdentity(
            NETWORK_ID, offer.peer, FAKE_SHAPE, 2048, {offer.digest: offer}, False
        ),
        view=lambda: View(offers={offer.peer: offer}, rtt_us={}),
        clock_ms=lambda: NOW_MS,
        speeds_us=lambda: (1, 1),
        vocabulary=VOCABULARY_SIZE,
        limits=Limits(),
    )
    client = PaperClient(swarm, (1, 2, 3), 8)
    client.terms = client.first_terms(offer.peer)
    shell.core.open(client.opening(client.terms, 0), CLIENT)
    confirmed = await shell.confirm(client.confirmation(client.terms), CLIENT)
    assert not confirmed.HasField("refusal")
    link = shell.attach(CLIENT)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(shell.compute_forever())
        shell.core.on_frame(client.frame(0, (1, 2, 3), sample=True, close=True), CLIENT, link)
        assert len((await next_answer(link)).result.ids) == 1
        running.cancel()
    request = session_pb2.CloseRequest(session_id=client.terms.session_id, epoch=1)
    assert (await shell.close(request, CLIENT)).settled
    shell.detach(CLIENT, link)
    assert compute.kv_tokens_free == compute.kv_tokens_total
    assert shell.links == 0


def test_a_peer_has_a_bounded_number_of_links() -> None:
    callers = CallerLinks()
    links = [callers.attach(CLIENT) for _ in range(LINKS_PER_PEER_MAX)]
    with pytest.raises(CapacityError):
        callers.attach(CLIENT)
    assert callers.detach(CLIENT, links[0]) == (True, None)
    callers.attach(CLIENT)
    assert len(callers) == LINKS_PER_PEER_MAX
    assert CLIENT_LEDGER.peer_id != CLIENT


def test_a_link_for_one_session_carries_and_ends_that_session_alone() -> None:
    callers, one, other = CallerLinks(), SessionId(b"1" * 16), SessionId(b"2" * 16)
    link, others_link = callers.attach(CLIENT, one), callers.attach(CLIENT, other)
    result = stage_pb2.LinkResponse(result=stage_pb2.TokenResult(session_id=one))
    callers.send(CLIENT, result)
    assert link.queued_bytes and not others_link.queued_bytes
    fault = stage_pb2.LinkResponse(fault=stage_pb2.SessionFault(session_id=other))
    callers.send(CLIENT, fault)
    assert others_link.queued_bytes
    assert callers.detach(CLIENT, link) == (False, one)
    with pytest.raises(NetworkError):
        callers.send(CLIENT, result)
    callers.attach(CLIENT)
    callers.send(CLIENT, result)
    assert callers.detach(CLIENT, others_link) == (True, other)


def test_the_end_of_a_session_s_link_is_no_news_of_the_client_s_others() -> None:
    swarm, peers, _ = opened(SPLITS[1])
    stage = swarm.nodes[peers[0]].stage
    (session,) = stage.sessions
    stage.on_link_lost(CLIENT, object(), others_left=False, only=SessionId(b"2" * 16))
    assert session.phase == "live"
    stage.on_link_lost(CLIENT, object(), others_left=False, only=session.id)
    assert [one.phase for one in stage.sessions] == ["suspended"]
    assert session.orphaned
