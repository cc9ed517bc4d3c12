from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.envelope import open_envelope, seal
from plait.errors import (
    BadProof,
    BadSignature,
    LocalProtocolError,
    Overspend,
    RemoteProtocolError,
    VerificationError,
)
from plait.ledger.client_books import ClientBooks
from plait.ledger.progress import FrameCounts
from plait.ledger.stage_books import StageBooks
from plait.testing.accounting import NOW_MS, PaperSession, Plot, key_of
from plait.types import U64_MAX, Microcredits, Prices, Span, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SessionVoucher, SettlementRequest, StageReceipt

CLIENT = key_of("client ledger")


@st.composite
def plots(draw: st.DrawFn) -> Plot:
    ends = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=5)))
    spans = tuple(Span(a, b) for a, b in zip([0, *ends], ends, strict=False))
    prompt = tuple(range(3, 3 + draw(st.integers(1, 20))))
    drawn = tuple(range(40, 40 + draw(st.integers(1, 20))))
    return Plot(
        spans=spans,
        prompt_ids=prompt,
        drawn_ids=drawn,
        max_tokens=len(drawn) + draw(st.integers(0, 3)),
        chunk_tokens=draw(st.integers(1, 6)),
        prefill_chunk_tokens=draw(st.integers(1, 8)),
        prices=Prices(prompt=draw(st.integers(0, 10**6)), output=draw(st.integers(0, 10**7))),
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(plots())
def test_an_honest_session_is_paid_to_the_microcredit(plot: Plot) -> None:
    session = PaperSession(plot).play()
    counts = TokenCounts(prompt=len(plot.prompt_ids), output=len(plot.drawn_ids))
    for index, books in enumerate(session.stages):
        assert books.earned == session.terms.price(index, counts)
        assert books.voucher == session.client.voucher
    assert session.client.cost == sum(books.earned for books in session.stages)
    chunks = sum(frame[5] for frame in session.frames)
    assert session.client.receipts_verified == chunks * len(plot.spans)


def test_receipts_are_chained_and_name_their_place() -> None:
    session = PaperSession(Plot()).play()
    receipts = [open_envelope(e, StageReceipt) for e in session.client.receipts]
    assert [(r.chunk, r.stage_index) for r in receipts] == [
        (chunk, stage) for chunk in range(4) for stage in range(3)
    ]
    assert receipts[0].previous_digest == b""
    assert len({r.previous_digest for r in receipts}) == 1 + 9


# What a stage accepts from a client.


def at(prompt: int = 0, output: int = 0) -> FrameCounts:
    """A frame after which the session counts so much."""
    counts = TokenCounts(prompt=prompt, output=output)
    return FrameCounts(counts, counts)


def opened(paid_frames: int = 2) -> PaperSession:
    """A session whose prompt (two chunks) is computed, and paid as far as asked."""
    session = PaperSession(Plot())
    for number, frame in enumerate(session.frames[:2]):
        receipts = session.traverse(frame)
        if number < paid_frames:
            session.pay(receipts, frame[0])
    return session


def voucher_with(
    session: PaperSession, change: Callable[[SessionVoucher], object], key: str = "client ledger"
) -> SignedEnvelope:
    message = SessionVoucher.FromString(session.vouchers[-1].payload)
    change(message)
    return seal(key_of(key), message)


def unpaid() -> tuple[StageBooks, PaperSession]:
    """Stage 0 with two chunks receipted and one paid, and the session with both vouchers."""
    paid, owed = opened(), opened(paid_frames=1)
    return owed.stages[0], paid


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: setattr(m, "network_id", "other"), RemoteProtocolError),
        (lambda m: setattr(m, "session_id", bytes(16)), RemoteProtocolError),
        (lambda m: setattr(m, "epoch", 2), RemoteProtocolError),
        (lambda m: setattr(m, "account", key_of("stranger").peer_id), RemoteProtocolError),
        (lambda m: setattr(m, "sequence", 3), RemoteProtocolError),
        (lambda m: setattr(m, "sequence", 2**64 - 1), RemoteProtocolError),
        (lambda m: setattr(m, "prompt_tokens", 4), RemoteProtocolError),
        (lambda m: setattr(m, "prompt_tokens", 6), RemoteProtocolError),
        (lambda m: setattr(m, "output_tokens", 0), RemoteProtocolError),
        (lambda m: setattr(m.amounts[0], "microcredits", 13), RemoteProtocolError),
        (lambda m: setattr(m.amounts[0], "microcredits", 15), RemoteProtocolError),
        (lambda m: setattr(m.amounts[0], "microcredits", 2**64 - 1), Overspend),
        (lambda m: m.amounts.pop(0), RemoteProtocolError),
        (lambda m: m.amounts.append(m.amounts[0]), RemoteProtocolError),
        (lambda m: m.ClearField("amounts"), RemoteProtocolError),
    ],
)
def test_a_false_voucher_is_refused(
    change: Callable[[SessionVoucher], object], error: type[Exception]
) -> None:
    books, session = unpaid()
    before = books.voucher
    with pytest.raises(error):
        books.accept_voucher(voucher_with(session, change))
    assert books.voucher is before
    books.accept_voucher(session.vouchers[-1])
    assert books.earned == 14


def test_a_voucher_of_another_signer_or_type_is_refused() -> None:
    books, session = unpaid()
    with pytest.raises(BadSignature):
        books.accept_voucher(voucher_with(session, lambda m: None, key="client"))
    with pytest.raises(BadSignature):
        books.accept_voucher(session.client.receipts[0])
    flipped = SignedEnvelope.FromString(session.vouchers[-1].SerializeToString())
    flipped.signature = flipped.signature[:-1] + bytes([flipped.signature[-1] ^ 1])
    with pytest.raises(BadSignature):
        books.accept_voucher(flipped)


def test_an_older_or_equal_voucher_changes_nothing() -> None:
    session = opened()
    books = session.stages[0]
    for voucher in (*session.vouchers, *session.vouchers):
        books.accept_voucher(voucher)
    assert books.voucher == session.vouchers[-1]
    assert books.conflict is None


def test_two_vouchers_of_one_number_are_kept_as_evidence() -> None:
    session = opened()
    books = session.stages[0]
    other = voucher_with(session, lambda m: setattr(m.amounts[1], "microcredits", 0))
    with pytest.raises(RemoteProtocolError, match="two vouchers"):
        books.accept_voucher(other)
    assert books.conflict == (session.vouchers[-1], other)
    assert books.voucher == session.vouchers[-1]


def test_a_voucher_for_an_unreceipted_chunk_is_refused() -> None:
    session, fresh = opened(), PaperSession(Plot())
    with pytest.raises(RemoteProtocolError, match="0 are receipted"):
        fresh.stages[0].accept_voucher(session.vouchers[0])


# The credit window.


@pytest.mark.parametrize(
    ("prompt", "output", "admitted"),
    [(5, 5, True), (5, 6, False), (5, 1, True), (4, 1, True)],
)
def test_one_decode_chunk_may_be_unpaid(prompt: int, output: int, admitted: bool) -> None:
    books = opened().stages[1]
    if admitted:
        books.admit(at(prompt, output))
    else:
        with pytest.raises(Overspend, match="unpaid"):
            books.admit(at(prompt, output))


@pytest.mark.parametrize(
    ("prompt", "output", "admitted"),
    [(3, 0, True), (3, 1, True), (4, 0, False), (3, 2, False), (5, 1, False)],
)
def test_one_prefill_chunk_may_be_unpaid(prompt: int, output: int, admitted: bool) -> None:
    books = PaperSession(Plot()).stages[0]
    if admitted:
        books.admit(at(prompt, output))
    else:
        with pytest.raises(Overspend, match="unpaid"):
            books.admit(at(prompt, output))


def test_work_beyond_terms_or_cap_is_refused() -> None:
    session = PaperSession(Plot(prompt_ids=(5, 6), drawn_ids=(7, 8), max_tokens=2))
    with pytest.raises(Overspend, match="terms"):
        session.stages[0].admit(at(prompt=3))
    poor = StageBooks(session.terms, 0, key_of("stage 0 ledger"), Microcredits(5))
    poor.admit(at(prompt=2))
    with pytest.raises(Overspend, match="cap"):
        poor.admit(at(prompt=2, output=1))


def test_a_vanishing_client_costs_at_most_one_chunk() -> None:
    session = PaperSession(Plot(drawn_ids=tuple(range(40, 59))))
    frames = iter(session.frames)
    for frame in frames:
        receipts = session.traverse(frame)
        if frame[5]:
            session.pay(receipts, frame[0])
        if len(session.vouchers) == 3:
            break
    with pytest.raises(Overspend):
        for frame in frames:
            session.traverse(frame)
    lost = 2_000_000 * session.plot.chunk_tokens * session.terms.stages[0].priced_layers
    receipted = session.stages[0].receipts_signed
    assert receipted == 4
    assert session.stages[0].earned >= 32 - lost // 1_000_000


# What a stage does itself.


def test_a_receipt_needs_both_ends() -> None:
    books = PaperSession(Plot()).stages[0]
    books.received(0, 0, 3, b"ids")
    with pytest.raises(RemoteProtocolError, match="traversal"):
        books.received(0, 0, 3, b"ids")
    with pytest.raises(LocalProtocolError, match="has not passed"):
        books.close_chunk(0, TokenCounts(prompt=3), NOW_MS)
    books.sent(0, 0, 3, b"activations")
    books.close_chunk(0, TokenCounts(prompt=3), NOW_MS)
    books.received(1, 3, 1, b"")
    books.sent(1, 3, 1, b"")
    with pytest.raises(LocalProtocolError, match="fall"):
        books.close_chunk(1, TokenCounts(prompt=2), NOW_MS)


def test_a_last_stage_commits_to_what_it_draws_from() -> None:
    session = PaperSession(Plot())
    first, last = session.stages[0], session.stages[-1]
    last.received(0, 0, 3, b"activations")
    last.sent(0, 0, 0, b"")
    with pytest.raises(LocalProtocolError, match="draws from"):
        last.close_chunk(0, TokenCounts(prompt=3), NOW_MS)
    last.drew_from(0, 0, 0, b"hidden states")
    last.close_chunk(0, TokenCounts(prompt=3), NOW_MS)
    with pytest.raises(LocalProtocolError, match="only a last stage"):
        first.drew_from(0, 0, 0, b"hidden states")


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("caught_up", [True, False])
def test_what_is_noted_later_is_signed_alike(stage: int, caught_up: bool) -> None:
    def noted(later: bool) -> tuple[StageBooks, list[SignedEnvelope]]:
        books, statements = PaperSession(Plot()).stages[stage], list[SignedEnvelope]()
        for traversal in range(4):
            books.received(traversal, traversal, 1, b"in")
            (books.sent_later if later else books.sent)(traversal, traversal, 1, b"out")
            if stage == 2:
                statements.append(books.draw_statement(traversal))
                draw = books.drew_from_later if later else books.drew_from
                draw(traversal, traversal, 1, b"state %d" % traversal)
            if caught_up:
                books.catch_up()
        return books, statements

    (now, statements), (later, same) = noted(False), noted(True)
    assert statements == same
    assert now.close_chunk(2, TokenCounts(prompt=3), NOW_MS) == later.close_chunk(
        2, TokenCounts(prompt=3), NOW_MS
    )
    (now, _), (later, _) = noted(False), noted(True)
    assert now.close_epoch(3, 4, NOW_MS) == later.close_epoch(3, 4, NOW_MS) is not None


@given(
    cap=st.integers(0, 40),
    prices=st.builds(Prices, output=st.integers(0, 10**6), rejected_draft=st.integers(0, 10**6)),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=4, max_size=12),
    granted_at=st.integers(0, 6),
)
def test_a_stage_works_exactly_up_to_its_cap(
    cap: int, prices: Prices, steps: list[tuple[int, int]], granted_at: int
) -> None:
    terms = PaperSession(Plot(prices=prices, max_tokens=40, chunk_tokens=32)).terms
    books = StageBooks(terms, 0, key_of("stage 0 ledger"), None)
    counts = TokenCounts()
    for number, (drawn, rejected) in enumerate(steps):
        if number == granted_at:
            books.grant(Microcredits(cap))
        limit = cap if number >= granted_at else terms.price_max(0)
        counts = replace(
            counts,
            output=counts.output + drawn,
            rejected_draft=counts.rejected_draft + rejected,
        )
        if terms.price(0, counts) > limit:
            with pytest.raises(Overspend, match=f"the cap is {limit}"):
                books.admit(FrameCounts(counts, counts))
        else:
            books.admit(FrameCounts(counts, counts))


def test_a_settlement_asks_for_the_best_voucher() -> None:
    session = PaperSession(Plot())
    assert session.stages[1].settlement(NOW_MS, False) is None
    nothing = session.stages[1].settlement(NOW_MS, True)
    assert nothing is not None
    declined = SettlementRequest.FromString(nothing.payload)
    assert (declined.voucher_digest, declined.release) == (b"", True)
    session.play()
    envelope = session.stages[1].settlement(NOW_MS, False)
    assert envelope is not None
    key = session.terms.stages[1].ledger_key
    request = open_envelope(envelope, SettlementRequest, signer=key)
    assert request.payee == session.terms.stages[1].peer
    assert not request.release


def releases(books: StageBooks) -> bool:
    envelope = books.settlement(NOW_MS, True)
    assert envelope is not None
    request = SettlementRequest.FromString(envelope.payload)
    assert request.epoch == 1
    return request.release


def test_a_stage_that_is_owed_for_a_receipt_keeps_its_hold() -> None:
    session, _, _ = receipts_of_third_chunk()
    assert not any(releases(books) for books in session.stages)
    finished = PaperSession(Plot())
    finished.play()
    assert all(releases(books) for books in finished.stages)


def test_a_stage_lets_go_of_what_its_client_has_closed_without_it() -> None:
    """A client that leaves in its prompt: the next chunk is receipted, its result never came."""
    session, _, closing = receipts_of_third_chunk()
    paid = max(frame[0] for frame in session.frames if frame[5] and frame[0] < closing)
    position = next(frame[1] + frame[2] for frame in session.frames if frame[0] == paid)
    for books in session.stages:
        assert books.close_epoch(paid, position, NOW_MS) is None
    assert all(releases(books) for books in session.stages)


def test_a_stage_whose_client_left_in_the_first_chunk_lets_go_too() -> None:
    session = PaperSession(Plot())
    first = session.frames[0]
    assert session.traverse(first)
    assert not any(books.settlement(NOW_MS, True) for books in session.stages)
    for books in session.stages:
        assert books.close_epoch(None, 0, NOW_MS) is None
    assert all(releases(books) for books in session.stages)


def test_a_stage_still_waits_for_the_voucher_of_what_its_client_accepted() -> None:
    session, receipts, closing = receipts_of_third_chunk()
    position = next(frame[1] + frame[2] for frame in session.frames if frame[0] == closing)
    for books, receipt in zip(session.stages, receipts, strict=True):
        assert books.close_epoch(closing, position, NOW_MS) == receipt
    assert not any(releases(books) for books in session.stages)


# What a client accepts from stages.


def receipts_of_third_chunk() -> tuple[PaperSession, list[SignedEnvelope], int]:
    session = opened()
    for frame in session.frames[2:]:
        receipts = session.traverse(frame)
        if frame[5]:
            return session, receipts, frame[0]
    raise AssertionError("no chunk was closed")


def resigned(
    envelope: SignedEnvelope, change: Callable[[StageReceipt], object], key: str
) -> SignedEnvelope:
    message = StageReceipt.FromString(envelope.payload)
    change(message)
    return seal(key_of(key), message)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "network_id", "other"),
        lambda m: setattr(m, "session_id", bytes(16)),
        lambda m: setattr(m, "epoch", 2),
        lambda m: setattr(m, "stage_index", 2),
        lambda m: setattr(m, "chunk", 1),
        lambda m: setattr(m, "start_layer", 2),
        lambda m: setattr(m, "end_layer", 8),
        lambda m: setattr(m, "model_digest", bytes(32)),
        lambda m: setattr(m, "numeric_class", "int4"),
        lambda m: setattr(m, "traversal", 1),
        lambda m: setattr(m, "prompt_tokens", 6),
        lambda m: setattr(m, "output_tokens", 6),
        lambda m: setattr(m, "output_tokens", 4),
        lambda m: setattr(m, "input_commit", bytes(32)),
        lambda m: setattr(m, "input_commit", b""),
        lambda m: setattr(m, "output_commit", bytes(32)),
        lambda m: setattr(m, "previous_digest", b""),
    ],
)
def test_every_lie_in_a_receipt_names_its_stage(change: Callable[[StageReceipt], object]) -> None:
    session, receipts, traversal = receipts_of_third_chunk()
    lying = [receipts[0], resigned(receipts[1], change, "stage 1 ledger"), receipts[2]]
    with pytest.raises(BadProof, match="stage 1"):
        session.client.accept_receipts(lying, traversal, NOW_MS)
    assert session.client.voucher == session.vouchers[-1]
    assert session.pay(receipts, traversal) == session.client.voucher


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda r: r[:2], BadProof),
        (lambda r: [], BadProof),
        (lambda r: [*r, r[2]], BadProof),
        (lambda r: [r[1], r[0], r[2]], BadSignature),
        (lambda r: [r[0], r[0], r[2]], BadSignature),
        (lambda r: [r[0], resigned(r[1], lambda m: None, "stage 1"), r[2]], BadSignature),
        (lambda r: [r[0], SignedEnvelope(), r[2]], BadSignature),
    ],
)
def test_missing_and_foreign_receipts_are_refused(
    spoil: Callable[[list[SignedEnvelope]], list[SignedEnvelope]], error: type[VerificationError]
) -> None:
    session, receipts, traversal = receipts_of_third_chunk()
    with pytest.raises(error, match="stage"):
        session.client.accept_receipts(spoil(receipts), traversal, NOW_MS)


def test_receipts_of_an_earlier_chunk_or_session_are_no_good() -> None:
    session, _, traversal = receipts_of_third_chunk()
    earlier = session.client.receipts[3:6]
    with pytest.raises(BadProof, match="chunk, 1 instead of 2"):
        session.client.accept_receipts(earlier, traversal, NOW_MS)
    other = PaperSession(Plot(session="another")).play().client.receipts[6:9]
    with pytest.raises(BadProof, match="session_id"):
        session.client.accept_receipts(other, traversal, NOW_MS)


@pytest.mark.parametrize(
    ("boundary", "blamed"),
    [(0, "stage 0 chunk"), (1, "from stage 0 to stage 1"), (2, "from stage 1 to stage 2")],
)
def test_data_altered_on_a_hop_names_the_hop(boundary: int, blamed: str) -> None:
    def wire(at: int, traversal: int, payload: bytes) -> bytes:
        return payload[:-1] + b"?" if at == boundary and traversal == 1 else payload

    with pytest.raises(BadProof, match=blamed):
        PaperSession(Plot(), wire).play()


def test_a_last_stage_that_reports_other_ids_is_caught() -> None:
    session = PaperSession(Plot(prompt_ids=(5, 6)))
    receipts = session.traverse(session.frames[0])
    client = ClientBooks(session.terms, CLIENT)
    client.sent(0, 0, (5, 6))
    client.drawn(0, 0, (99,))
    with pytest.raises(BadProof, match="stage 2 chunk 0: it is for other ids than were drawn"):
        client.accept_receipts(receipts, 0, NOW_MS)


def test_the_same_receipts_again_give_the_same_voucher() -> None:
    session, receipts, traversal = receipts_of_third_chunk()
    voucher = session.pay(receipts, traversal)
    assert session.client.accept_receipts(receipts, traversal, NOW_MS + 99) == voucher
    assert len(session.client.receipts) == 9


def test_the_driver_must_keep_its_own_order() -> None:
    session = PaperSession(Plot())
    client, last = session.client, session.terms.stages[-1].peer
    client.sent(0, 0, (5, 6, 7))
    with pytest.raises(LocalProtocolError, match="position"):
        client.sent(1, 4, (5,))
    with pytest.raises(RemoteProtocolError, match=last):
        client.drawn(1, 0, ())
    with pytest.raises(LocalProtocolError, match="no result"):
        client.accept_receipts([], 0, NOW_MS)


@pytest.mark.parametrize(("frames", "ids"), [(1, (40,)), (2, ()), (2, (40, 41))])
def test_the_number_of_draws_must_be_the_one_asked_for(frames: int, ids: tuple[int, ...]) -> None:
    session = PaperSession(Plot())
    client = session.client
    client.sent(0, 0, (5, 6, 7))
    if frames == 2:
        client.drawn(0, 0, ())
        client.sent(1, 3, (8, 9))
    with pytest.raises(RemoteProtocolError, match="drawn"):
        client.drawn(frames - 1, 3 * (frames - 1), ids)


def test_a_client_must_know_the_keys() -> None:
    terms = PaperSession(Plot()).terms
    blind = replace(terms, stages=(replace(terms.stages[0], ledger_key=b""), *terms.stages[1:]))
    with pytest.raises(LocalProtocolError):
        ClientBooks(blind, CLIENT)
    with pytest.raises(LocalProtocolError):
        ClientBooks(terms, key_of("client"))


def test_a_price_beyond_64_bits_is_never_signed() -> None:
    plot = Plot(prices=Prices(output=U64_MAX), max_tokens=2_000_000)
    with pytest.raises(Overspend):
        PaperSession(plot)
