"""Sessions that lose stages on their way: what is paid, what is proven, and every lie."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.envelope import open_envelope
from plait.errors import Overspend, RemoteProtocolError
from plait.ledger.bundle import BundleParts, build_bundle
from plait.ledger.progress import FrameCounts
from plait.ledger.report import Report
from plait.ledger.stage_books import StageBooks
from plait.ledger.verify import verify_bundle
from plait.testing.accounting import END_ID, Plot, key_of, paper_network
from plait.testing.course import Cut, PaperCourse, PaperEpoch
from plait.types import Microcredits, PeerId, Prices, Span, TokenCounts
from plait.v1.ledger_pb2 import JournalEntry, SessionVoucher

NETWORK = paper_network()
CLIENT = key_of("client")


@dataclass(frozen=True)
class Schedule:
    """A plot and what goes wrong in it."""

    plot: Plot
    cuts: tuple[Cut, ...]
    wrong_every: int
    cached: int

    def play(self, **options: Any) -> PaperCourse:
        course = PaperCourse(self.plot, self.cuts, self.wrong_every, cached=self.cached, **options)
        return course.play()


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    ends = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=4)))
    drawn = tuple(range(40, 40 + draw(st.integers(1, 24))))
    ended = draw(st.booleans())
    plot = Plot(
        spans=tuple(Span(a, b) for a, b in zip([0, *ends], ends, strict=False)),
        prompt_ids=tuple(range(3, 3 + draw(st.integers(1, 12)))),
        drawn_ids=(*drawn[:-1], END_ID) if ended else drawn,
        max_tokens=len(drawn) + (draw(st.integers(0, 3)) if ended else 0),
        chunk_tokens=draw(st.integers(1, 8)),
        prefill_chunk_tokens=draw(st.integers(1, 5)),
        prices=Prices(
            prompt=draw(st.integers(1, 10**6)),
            output=draw(st.integers(1, 10**7)),
            cached_prompt=draw(st.integers(0, 10**5)),
            replayed=draw(st.sampled_from([0, 300_000])),
        ),
    )
    stages = st.frozensets(st.integers(0, len(ends) - 1))
    cuts = st.builds(
        Cut,
        after=st.sampled_from([0, 0, 1, 2, 3, 5, 8]),
        lost=stages,
        beyond=st.booleans(),
        forgot=st.frozensets(st.integers(0, len(ends) - 1), max_size=1),
        back=st.booleans(),
        skipped=st.sampled_from([0, 0, 1]),
    )
    chosen = tuple(draw(st.lists(cuts, min_size=1, max_size=4)))
    answered_before = chosen[0].after > 0
    cached = draw(st.integers(0, len(plot.prompt_ids) - 1)) if answered_before else 0
    return Schedule(plot, chosen, draw(st.sampled_from([0, 0, 2, 3, 5])), cached)


def check(parts: BundleParts) -> Report:
    """Verify parts that the client itself sealed: the seal is no help against its lies."""
    return verify_bundle(build_bundle(parts, CLIENT), NETWORK)


def missing(report: Report) -> dict[str, str]:
    return {claim.name: claim.detail for claim in report.claims if claim.ok is None}


def failures(report: Report) -> dict[str, str]:
    return {claim.name: claim.detail for claim in report.claims if claim.ok is False}


# What holds for any schedule of cuts.


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(schedules())
def test_the_bundle_of_any_schedule_is_verified(schedule: Schedule) -> None:
    course = schedule.play()
    assert tuple(course.driver.drawn) == schedule.plot.drawn_ids
    report = check(course.bundle_parts())
    if report.outcome == "verified":
        return
    # Only a last chunk that was cut, and that nobody was rebuilt after, may lack a signature.
    assert report.outcome == "incomplete", report.lines()
    assert course.epoch.client.evidence().cut is not None
    names = {name.rpartition(": ")[2] for name in missing(report)}
    assert names <= {"coverage", "draws of the cut"}, report.lines()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(schedules())
def test_a_lost_stage_that_asks_for_nothing_leaves_the_journal_open(schedule: Schedule) -> None:
    course = schedule.play()
    stayed = {id(books) for books in course.epoch.books}
    owed = [
        stint
        for stint in course.stints
        if id(stint.books) not in stayed and stint.books.voucher is not None
    ]
    course.stints = [stint for stint in course.stints if id(stint.books) in stayed]
    if any(stint.books.voucher is None for stint in course.stints):
        return
    report = check(course.bundle_parts())
    assert not failures(report), report.lines()
    paid_by_others = course.epoch.client.evidence().voucher is None
    if owed and paid_by_others:
        assert report.outcome in ("verified", "incomplete")


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(schedules())
def test_everybody_is_promised_its_work_and_nobody_more(schedule: Schedule) -> None:
    course = schedule.play()
    total = course.epoch.client
    assert total.cost == sum(total.promised(peer) for peer in payees(course))
    counts = total.counts
    for stint in course.stints:
        terms, index = place_of(course, stint.books)
        stage = terms.stages[index]
        if stint.books in course.epoch.books:
            due = terms.price(index, counts)
            cut = total.evidence().cut
            lost = cut is not None and cut.receipts[index] is None
            assert stint.books.earned <= total.promised(stage.peer) <= due
            assert lost or total.promised(stage.peer) == due
            continue
        # A stage that is gone: less than what it computed by at most one chunk.
        last = last_epoch_of(course, stint.books)
        done = last.client.counts
        assert terms.price(index, stage.base) <= max(stint.books.earned, stage.carried) or (
            stint.books.voucher is None
        )
        assert stint.books.earned <= terms.price(index, done)
        paid = paid_counts(stint.books, stage.base)
        if done.prompt > paid.prompt:
            assert done.prompt - paid.prompt <= terms.prefill_chunk_tokens
        else:
            assert done.output - paid.output <= terms.chunk_tokens


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(schedules())
def test_a_stage_that_stays_earns_as_if_nothing_had_happened(schedule: Schedule) -> None:
    plain = replace(
        schedule,
        wrong_every=0,
        cuts=tuple(replace(cut, lost=cut.lost - {0}) for cut in schedule.cuts),
    )
    undisturbed = replace(plain, cuts=()).play()
    disturbed = plain.play()
    stayer = disturbed.epoch.terms.stages[0].peer
    assert disturbed.epoch.terms.stages[0].entered_epoch == 1
    assert disturbed.epoch.client.promised(stayer) == undisturbed.epoch.client.promised(stayer)
    assert disturbed.epoch.books[0].earned == undisturbed.epoch.books[0].earned


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(schedules())
def test_money_is_conserved(schedule: Schedule) -> None:
    course = schedule.play()
    parts = course.bundle_parts()
    moved: dict[str, int] = {}
    for payload in parts.entries:
        for line in JournalEntry.FromString(payload).lines:
            moved[line.account] = moved.get(line.account, 0) + line.credit - line.debit
    assert sum(moved.values()) == 0
    for peer in payees(course):
        assert moved.get(peer, 0) <= course.epoch.client.promised(peer)
    held = sum(amount for account, amount in moved.items() if account.startswith("hold:"))
    paid = sum(moved.get(peer, 0) for peer in payees(course))
    assert -moved[course.epoch.terms.client] == held + paid


def payees(course: PaperCourse) -> set[PeerId]:
    return {stage.peer for epoch in course.epochs for stage in epoch.terms.stages}


def last_epoch_of(course: PaperCourse, books: StageBooks) -> PaperEpoch:
    return next(epoch for epoch in reversed(course.epochs) if books in epoch.books)


def place_of(course: PaperCourse, books: StageBooks) -> Any:
    epoch = last_epoch_of(course, books)
    return epoch.terms, epoch.books.index(books)


def paid_counts(books: StageBooks, base: TokenCounts) -> TokenCounts:
    if books.voucher is None:
        return base
    voucher = open_envelope(books.voucher, SessionVoucher)
    counts = TokenCounts(voucher.prompt_tokens, voucher.output_tokens)
    return counts if counts.prompt >= base.prompt and counts.output >= base.output else base


# Credit windows.


def entering(cap: int | None) -> StageBooks:
    """The last stage after a reroute in the middle of the answer, nothing fed yet."""
    course = PaperCourse(Plot(), [Cut(5, frozenset({2}))], ungranted=cap is None)
    course.play()
    terms = course.epochs[1].terms
    return StageBooks(
        terms, 2, key_of("stage 2 of epoch 2 ledger"), None if cap is None else Microcredits(cap)
    )


def draws(books_start: TokenCounts, more: int) -> FrameCounts:
    counts = replace(books_start, output=books_start.output + more)
    return FrameCounts(counts, counts)


def test_without_a_grant_a_stage_works_one_chunk_beyond_its_base() -> None:
    books, start = entering(None), COURSE_START
    assert not books.granted
    books.admit(draws(start, 4))
    with pytest.raises(Overspend, match="unpaid"):
        books.admit(draws(start, 5))
    books.grant(Microcredits(10**6))
    assert books.granted
    with pytest.raises(Overspend, match="unpaid"):
        books.admit(draws(start, 5))


def test_a_paid_chunk_does_not_widen_the_window_without_a_grant() -> None:
    plot = Plot(drawn_ids=tuple(range(40, 60)))
    course = PaperCourse(plot, [Cut(5, frozenset({2}))], ungranted=True)
    with pytest.raises(Overspend, match="without a grant"):
        course.play()
    paid = course.epoch.books[2]
    assert paid.earned > 0, "its first chunk was paid"


def test_a_cap_bounds_the_stint_not_the_session() -> None:
    start = COURSE_START
    price = (
        PaperCourse(Plot(), [Cut(5, frozenset({2}))])
        .play()
        .epochs[1]
        .terms.price(2, draws(start, 2).counts)
    )
    entering(price).admit(draws(start, 2))
    with pytest.raises(Overspend, match="the cap is"):
        entering(price - 1).admit(draws(start, 2))


COURSE_START = PaperCourse(Plot(), [Cut(5, frozenset({2}))]).play().epochs[1].terms.start


def test_a_stage_signs_nothing_before_it_was_replayed_to() -> None:
    books = entering(10**6)
    position = books._terms.resume_position
    with pytest.raises(RemoteProtocolError, match="0 positions were replayed"):
        books.received(position, position, 1, b"x")
    books.received(0, 0, position - 1, b"x")
    with pytest.raises(RemoteProtocolError, match=f"{position - 1} positions were replayed"):
        books.received(position, position, 1, b"x")
