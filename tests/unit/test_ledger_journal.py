"""The books: each rule once, then a state machine that tries everything at random."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from plait.envelope import digest, encode
from plait.errors import LedgerError
from plait.identity import SigningKey
from plait.ledger.balances import (
    EQUITY,
    Balances,
    Entry,
    EntryKind,
    Limit,
    Line,
    entry_from_payload,
    escrow_of,
    hold_account,
)
from plait.ledger.escrow import EscrowTerms
from plait.ledger.journal import (
    FRESHNESS_MS,
    GRACE_MS,
    RESERVATION_TTL_MAX_MS,
    Accepted,
    Books,
    Command,
    Decline,
    Expire,
    Forfeit,
    Fork,
    Issue,
    Outcome,
    Refusal,
    Reserve,
    SetLimit,
    Settle,
)
from plait.types import U64_MAX, AccountId, Digest, SessionId
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    LimitOrder,
    PayeeAmount,
    SessionVoucher,
    SettlementRequest,
)

NETWORK = "net-1"
NOW = 1_700_000_000_000
CLIENT, ALICE, BOB, CAROL = (
    AccountId(SigningKey.from_seed(bytes([seed]) * 32).peer_id) for seed in range(1, 5)
)
SESSION = SessionId(b"s" * 16)
CAPS = {ALICE: 60, BOB: 40}


def issue(
    amount: int = 1_000, account: str = CLIENT, order_id: bytes = b"1", issued_ms: int = NOW
) -> Issue:
    order = IssueOrder(
        network_id=NETWORK, account=account, amount=amount, order_id=order_id, issued_ms=issued_ms
    )
    return Issue(order, digest(encode(order)))


def limit(credit_limit: int, order_id: bytes = b"limit", issued_ms: int = NOW) -> SetLimit:
    order = LimitOrder(
        network_id=NETWORK,
        account=CLIENT,
        credit_limit=credit_limit,
        order_id=order_id,
        issued_ms=issued_ms,
    )
    return SetLimit(order, digest(encode(order)))


def decline(payee: str, **changes: Any) -> Decline:
    fields = {
        "network_id": NETWORK,
        "session_id": SESSION,
        "payee": payee,
        "release": True,
        "issued_ms": NOW,
    }
    request = SettlementRequest(**{**fields, **changes})
    return Decline(request, digest(encode(request)))


def reserve(
    sequence: int = 1,
    *,
    caps: dict[AccountId, int] | None = None,
    amount: int | None = None,
    account: str = CLIENT,
    session_id: bytes = SESSION,
    network_id: str = NETWORK,
    epoch: int = 0,
    lane: int = 0,
    issued_ms: int = NOW,
    ttl_ms: int = 600_000,
) -> Reserve:
    caps = CAPS if caps is None else caps
    reservation = BudgetReservation(
        network_id=network_id,
        account=account,
        lane=lane,
        sequence=sequence,
        session_id=session_id,
        epoch=epoch,
        amount=sum(caps.values()) if amount is None else amount,
        caps=[PayeeAmount(payee=payee, microcredits=cap) for payee, cap in caps.items()],
        issued_ms=issued_ms,
        expires_ms=issued_ms + ttl_ms,
    )
    return Reserve(reservation, digest(encode(reservation)))


def settle(
    amounts: dict[AccountId, int],
    payee: str = ALICE,
    *,
    release: bool = False,
    account: str = CLIENT,
    session_id: bytes = SESSION,
    network_id: str = NETWORK,
    issued_ms: int = NOW,
    epoch: int = 0,
) -> Settle:
    voucher = SessionVoucher(
        network_id=network_id,
        session_id=session_id,
        account=account,
        amounts=[PayeeAmount(payee=p, microcredits=m) for p, m in amounts.items()],
    )
    request = SettlementRequest(
        network_id=network_id,
        session_id=session_id,
        payee=payee,
        voucher_digest=digest(encode(voucher)),
        release=release,
        issued_ms=issued_ms,
        epoch=epoch,
    )
    return Settle(voucher, digest(encode(voucher)), request, digest(encode(request)))


def accepted(outcome: Outcome) -> Accepted:
    assert isinstance(outcome, Accepted), outcome
    return outcome


def refused(outcome: Outcome) -> str:
    assert isinstance(outcome, Refusal), outcome
    return outcome.code


@pytest.fixture
def books() -> Books:
    books = Books(NETWORK)
    accepted(books.apply(issue(), NOW))
    return books


@pytest.fixture
def reserved(books: Books) -> Books:
    accepted(books.apply(reserve(), NOW))
    return books


def test_one_session_from_issue_to_void(reserved: Books) -> None:
    assert (reserved.available(CLIENT), reserved.pending(CLIENT)) == (900, 100)
    first = accepted(reserved.apply(settle({ALICE: 10, BOB: 5}), NOW))
    assert first.value == 10
    assert [entry.kind for entry in first.entries] == [EntryKind.SETTLE]
    hold = hold_account(SESSION, 0)
    lines = (Line(hold, debit=15), Line(ALICE, credit=10), Line(BOB, credit=5))
    assert first.entries[0].lines == lines
    done = accepted(reserved.apply(settle({ALICE: 12, BOB: 5}, release=True), NOW))
    assert not reserved.settled(SESSION)
    assert len(done.releases) == 1
    last = accepted(reserved.apply(settle({ALICE: 12, BOB: 5}, BOB, release=True), NOW))
    assert [entry.kind for entry in last.entries] == [EntryKind.VOID]
    assert reserved.settled(SESSION)
    balances = {CLIENT: 983, ALICE: 12, BOB: 5, EQUITY: -1_000}
    assert reserved.balances.all() == balances
    assert reserved.history(SESSION.hex()) == (1, 2, 3, 4)
    assert reserved.history(CLIENT) == (0, 1, 2, 3, 4)
    assert reserved.history(BOB) == (2,)


def test_entries_survive_their_payload(reserved: Books) -> None:
    (entry,) = accepted(reserved.apply(settle({ALICE: 10, BOB: 5}), NOW)).entries
    assert entry_from_payload(entry.payload) == entry


def test_repetition_gives_the_earlier_answer(reserved: Books) -> None:
    assert accepted(reserved.apply(issue(issued_ms=NOW + 1), NOW)) == Accepted((), (), 0)
    # Even much later: the answer may have been lost on its way.
    assert accepted(reserved.apply(reserve(), NOW + 10**9)) == Accepted((), (), 1)
    voucher = settle({ALICE: 10})
    accepted(reserved.apply(voucher, NOW))
    assert accepted(reserved.apply(voucher, NOW)) == Accepted((), (), 10)
    assert accepted(reserved.apply(settle({ALICE: 7}), NOW)) == Accepted((), (), 10)


def test_a_fork_freezes_the_account_but_not_its_payees(reserved: Books) -> None:
    other = reserve(session_id=b"t" * 16)
    outcome = reserved.apply(other, NOW)
    assert outcome == Fork(CLIENT, reserve().digest, other.digest)
    assert refused(reserved.apply(reserve(2, session_id=b"t" * 16), NOW)) == "frozen"
    assert accepted(reserved.apply(settle({ALICE: 10}), NOW)).value == 10


def test_lanes_are_numbered_apart(reserved: Books) -> None:
    accepted(reserved.apply(reserve(1, lane=7, session_id=b"t" * 16), NOW))
    assert (reserved.next_sequence(CLIENT, 0), reserved.next_sequence(CLIENT, 7)) == (2, 2)
    assert reserved.next_sequence(CLIENT, 8) == 1


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (reserve(network_id="other"), "network"),
        (reserve(session_id=b"short"), "malformed"),
        (reserve(account="nobody"), "malformed"),
        (reserve(account=EQUITY), "malformed"),
        (reserve(account=CLIENT + " "), "malformed"),
        (reserve(caps={}), "malformed"),
        (reserve(caps={AccountId("hold:x:0"): 1}), "malformed"),
        (reserve(caps={ALICE: 0}), "amount"),
        (reserve(amount=99), "amount"),
        (reserve(amount=1_001), "credit"),
        (reserve(caps={ALICE: U64_MAX, BOB: U64_MAX}, amount=U64_MAX), "amount"),
        (reserve(2), "sequence"),
        (reserve(0), "sequence"),
        (reserve(issued_ms=NOW - FRESHNESS_MS - 1), "stale"),
        (reserve(issued_ms=NOW + FRESHNESS_MS + 1), "stale"),
        (reserve(ttl_ms=0), "expiry"),
        (reserve(ttl_ms=RESERVATION_TTL_MAX_MS + 1), "expiry"),
        (issue(order_id=b"1", amount=5), "order-id"),
        (issue(order_id=b""), "malformed"),
        (issue(order_id=b"2", account="issuer:equity"), "malformed"),
        (issue(order_id=b"2", amount=0), "amount"),
        (issue(order_id=b"2", amount=U64_MAX), "amount"),
        (issue(order_id=b"2", issued_ms=0), "stale"),
        (settle({ALICE: 1}), "session"),
    ],
)
def test_refused_without_a_trace(
    books: Books, command: Issue | Reserve | Settle, code: str
) -> None:
    assert refused(books.apply(command, NOW)) == code
    assert books.balances.size == 1
    accepted(books.apply(reserve(), NOW))


def test_a_payee_named_twice_is_refused(books: Books) -> None:
    command = reserve()
    command.reservation.caps.add(payee=ALICE, microcredits=0)
    assert refused(books.apply(command, NOW)) == "malformed"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (settle({ALICE: 1}, network_id="other"), "network"),
        (settle({ALICE: 1}, session_id=b"t" * 16), "session"),
        (settle({ALICE: 1}, account=ALICE), "session"),
        (settle({CAROL: 1}, CAROL), "payee"),
    ],
)
def test_settlements_that_are_refused(reserved: Books, command: Settle, code: str) -> None:
    assert refused(reserved.apply(command, NOW)) == code


def test_a_voucher_or_session_swapped_under_a_request_is_refused(reserved: Books) -> None:
    asked, other = settle({ALICE: 1}), settle({ALICE: 60})
    swapped = Settle(other.voucher, other.voucher_digest, asked.request, asked.request_digest)
    assert refused(reserved.apply(swapped, NOW)) == "malformed"
    asked.voucher.amounts.add(payee=ALICE, microcredits=60)
    assert refused(reserved.apply(asked, NOW)) == "malformed"


def test_nobody_is_paid_beyond_the_cap_and_overbidding_one_does_not_hurt_the_others(
    reserved: Books,
) -> None:
    outcome = accepted(reserved.apply(settle({ALICE: U64_MAX, BOB: 5, CAROL: 9}, BOB), NOW))
    assert outcome.value == 5
    assert reserved.paid(SESSION, ALICE) == 60
    assert reserved.paid(SESSION, CAROL) == 0
    assert refused(reserved.apply(settle({ALICE: U64_MAX}), NOW)) == "cap"


def test_a_session_belongs_to_who_reserved_it_first(reserved: Books) -> None:
    accepted(reserved.apply(issue(100, CAROL, b"2"), NOW))
    assert refused(reserved.apply(reserve(account=CAROL, epoch=1), NOW)) == "session"
    assert refused(reserved.apply(reserve(2), NOW)) == "session"


def test_amounts_run_on_across_epochs(reserved: Books) -> None:
    """A reroute adds a hold; survivors draw on the old one, the replacement on the new one."""
    accepted(reserved.apply(reserve(2, epoch=1, caps={ALICE: 10, CAROL: 30}), NOW))
    paid = accepted(reserved.apply(settle({ALICE: 65, BOB: 1, CAROL: 20}), NOW))
    assert paid.value == 65
    old, new = hold_account(SESSION, 0), hold_account(SESSION, 1)
    assert paid.entries[0].lines == (
        Line(old, debit=61),
        Line(ALICE, credit=60),
        Line(BOB, credit=1),
        Line(new, debit=25),
        Line(ALICE, credit=5),
        Line(CAROL, credit=20),
    )
    for payee in (ALICE, BOB):
        accepted(reserved.apply(settle({ALICE: 65}, payee, release=True), NOW))
    assert reserved.balances.of(old) == 0
    assert not reserved.settled(SESSION)
    accepted(reserved.apply(settle({ALICE: 65}, CAROL, release=True), NOW))
    assert reserved.settled(SESSION)


def test_an_old_release_does_not_close_a_newer_hold(reserved: Books) -> None:
    released = settle({ALICE: 60}, release=True)
    accepted(reserved.apply(released, NOW))
    later = NOW + 2 * FRESHNESS_MS
    accepted(reserved.apply(reserve(2, epoch=1, caps={ALICE: 5}, issued_ms=later), later))
    accepted(reserved.apply(released, later))
    assert reserved.balances.of(hold_account(SESSION, 1)) == 5
    assert accepted(reserved.apply(settle({ALICE: 65}, issued_ms=NOW), later)).value == 65


def test_the_release_of_a_first_stint_leaves_the_second_its_hold(books: Books) -> None:
    """A stage that was lost and enters again may settle its first stint late."""
    for epoch in (1, 3):
        accepted(books.apply(reserve((epoch + 1) // 2, epoch=epoch, caps={ALICE: 50}), NOW))
    late = accepted(books.apply(settle({ALICE: 20}, release=True, epoch=2), NOW))
    assert [release.epoch for release in late.releases] == [1]
    assert books.balances.of(hold_account(SESSION, 3)) == 50
    last = accepted(books.apply(settle({ALICE: 60}, release=True, epoch=3), NOW))
    assert (last.value, books.settled(SESSION)) == (60, True)


def test_expiry_leaves_the_grace_time(reserved: Books) -> None:
    end = NOW + 600_000 + GRACE_MS
    assert accepted(reserved.apply(Expire(), end - 1)).entries == ()
    assert accepted(reserved.apply(settle({ALICE: 10}), end - 1)).value == 10
    (void,) = accepted(reserved.apply(Expire(), end)).entries
    assert (void.kind, void.cause) == (EntryKind.VOID, b"")
    assert reserved.available(CLIENT) == 990
    assert accepted(reserved.apply(Expire(), end)).entries == ()
    assert refused(reserved.apply(settle({ALICE: 20}), end)) == "cap"
    assert accepted(reserved.apply(settle({ALICE: 10}), end)).value == 10


def test_mutual_credit_goes_down_to_the_limit_and_no_further(books: Books) -> None:
    assert refused(books.apply(reserve(amount=1_050), NOW)) == "credit"
    assert accepted(books.apply(limit(100), NOW)).value == 1
    assert books.available(CLIENT) == 1_100
    accepted(books.apply(reserve(amount=1_050), NOW))
    assert books.balances.of(CLIENT) == -50
    assert refused(books.apply(limit(49, b"lower"), NOW)) == "amount"
    accepted(books.apply(limit(50, b"exact"), NOW))
    assert books.available(CLIENT) == 0
    more = reserve(2, caps={ALICE: 1}, session_id=b"t" * 16)
    assert refused(books.apply(more, NOW)) == "credit"
    assert accepted(books.apply(limit(100), NOW)) == Accepted((), (), 1), (
        "an old order is no new one"
    )
    assert books.available(CLIENT) == 0
    assert sum(books.balances.all().values()) == 0


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (limit(U64_MAX), "amount"),  # with what is issued, more than can exist
        (limit(5, b"1"), "order-id"),
        (limit(5, b""), "malformed"),
        (limit(5, issued_ms=NOW - FRESHNESS_MS - 1), "stale"),
        (issue(5, order_id=b"known limit"), "order-id"),
    ],
)
def test_limits_that_are_refused(books: Books, command: Issue | SetLimit, code: str) -> None:
    accepted(books.apply(limit(7, b"known limit"), NOW))
    assert refused(books.apply(command, NOW)) == code
    assert refused(books.apply(issue(U64_MAX - 1_006, order_id=b"big"), NOW)) == "amount"
    accepted(books.apply(issue(U64_MAX - 1_007, ALICE, order_id=b"all"), NOW))


def test_all_payees_may_decline_without_a_voucher(reserved: Books) -> None:
    first = accepted(reserved.apply(decline(ALICE), NOW))
    assert (first.entries, first.value) == ((), 0)
    assert not reserved.settled(SESSION)
    last = accepted(reserved.apply(decline(BOB), NOW))
    assert [entry.kind for entry in last.entries] == [EntryKind.VOID]
    assert (reserved.settled(SESSION), reserved.available(CLIENT)) == (True, 1_000)
    assert accepted(reserved.apply(decline(BOB), NOW)) == Accepted((), (), 0)


def test_declining_keeps_what_was_paid_and_what_others_earn(reserved: Books) -> None:
    accepted(reserved.apply(settle({ALICE: 10, BOB: 5}), NOW))
    assert accepted(reserved.apply(decline(ALICE), NOW)).value == 10
    assert accepted(reserved.apply(settle({ALICE: 10, BOB: 40}, BOB), NOW)).value == 40
    accepted(reserved.apply(decline(BOB), NOW))
    assert reserved.balances.all() == {CLIENT: 950, ALICE: 10, BOB: 40, EQUITY: -1_000}


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (decline(CAROL), "payee"),
        (decline(CLIENT), "payee"),
        (decline(ALICE, session_id=b"t" * 16), "session"),
        (decline(ALICE, network_id="other"), "network"),
        (decline(ALICE, release=False), "malformed"),
        (decline(ALICE, voucher_digest=bytes(32)), "malformed"),
    ],
)
def test_declining_that_is_refused(reserved: Books, command: Decline, code: str) -> None:
    assert refused(reserved.apply(command, NOW)) == code


def test_an_old_decline_does_not_close_a_newer_hold(reserved: Books) -> None:
    late = NOW + 2 * FRESHNESS_MS
    later = reserve(2, epoch=1, caps={ALICE: 5}, issued_ms=late)
    accepted(reserved.apply(later, late))
    accepted(reserved.apply(decline(ALICE), late))
    assert reserved.balances.of(hold_account(SESSION, 1)) == 5


def entry(kind: EntryKind, *lines: Line, index: int = 1, cause: bytes = b"c" * 32) -> Entry:
    return Entry(NETWORK, index, kind, SESSION, cause, lines, NOW)


@pytest.mark.parametrize(
    "bad",
    [
        entry(EntryKind.ISSUE, Line(EQUITY, 1), Line(CLIENT, 0, 1), index=2),
        entry(EntryKind.ISSUE, Line(EQUITY, 1), Line(CLIENT, 0, 2)),
        entry(EntryKind.ISSUE, Line(EQUITY, 1, 1), Line(CLIENT, 0, 0)),
        entry(EntryKind.ISSUE, Line(CLIENT, 1), Line(ALICE, 0, 1)),
        entry(EntryKind.ISSUE, Line(EQUITY, 1), Line(CLIENT, 0, 1), cause=b""),
        entry(EntryKind.ISSUE, Line(EQUITY, 1), Line(CLIENT, 0, 1), cause=issue().digest),
        entry(EntryKind.ISSUE, Line(EQUITY, U64_MAX), Line(CLIENT, 0, U64_MAX)),
        entry(EntryKind.RESERVE, Line(ALICE, 1), Line(hold_account(SESSION, 0), 0, 1)),
        entry(EntryKind.RESERVE, Line(CLIENT, 1), Line(hold_account(b"t" * 16, 0), 0, 1)),
        entry(EntryKind.SETTLE, Line(hold_account(SESSION, 0), 1), Line(ALICE, 0, 1)),
        entry(EntryKind.SETTLE, Line(CLIENT, 1), Line(ALICE, 0, 1)),
        entry(EntryKind.VOID, Line(CLIENT, 1), Line(hold_account(SESSION, 0), 0, 1)),
        entry(EntryKind.SETTLE),
        entry(EntryKind.LIMIT),
        replace(
            entry(EntryKind.LIMIT, Line(EQUITY, 1), Line(CLIENT, 0, 1)), limit=Limit(CLIENT, 5)
        ),
        replace(entry(EntryKind.LIMIT), limit=Limit(EQUITY, 5)),
        replace(entry(EntryKind.LIMIT), limit=Limit(CLIENT, U64_MAX)),
        replace(
            entry(EntryKind.RESERVE, Line(CLIENT, 1), Line(hold_account(SESSION, 0), 0, 1)),
            limit=Limit(CLIENT, 5),
        ),
    ],
)
def test_an_auditor_sees_every_false_entry(bad: Entry) -> None:
    balances = Balances(NETWORK)
    balances.post(accepted(Books(NETWORK).apply(issue(), NOW)).entries[0])
    assert balances.violation(bad) is not None
    with pytest.raises(LedgerError):
        balances.post(bad)


def test_a_stored_entry_needs_its_cause(books: Books) -> None:
    (stored,) = accepted(books.apply(reserve(), NOW)).entries
    fresh = Books(NETWORK)
    fresh.post(accepted(Books(NETWORK).apply(issue(), NOW)).entries[0], issue().order)
    with pytest.raises(LedgerError):
        fresh.post(stored, None)


PAYEES = [ALICE, BOB, CAROL]
ESCROW_TERMS = EscrowTerms(percent=25, window_ms=600_000)
amounts = st.dictionaries(st.sampled_from(PAYEES), st.integers(0, 120), max_size=3)


class BooksMachine(RuleBasedStateMachine):
    """Random commands with repetitions, forks and jumps in time, against a few plain sums."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(NETWORK, ESCROW_TERMS)
        self.forfeited: dict[bytes, int] = {}
        self.now_ms = NOW
        self.entries: list[Entry] = []
        self.causes: dict[bytes, Issue | SetLimit | Reserve] = {}
        self.outcomes: list[tuple[Issue | SetLimit | Reserve, Accepted]] = []
        self.promised: dict[tuple[bytes, str], int] = {}
        self.issued = 0

    @initialize()
    def credit(self) -> None:
        self.run(issue(300))

    def limits(self) -> dict[str, int]:
        """From the entries alone."""
        return {item.limit.account: item.limit.credit_limit for item in self.entries if item.limit}

    def run(self, command: Command) -> Outcome:
        outcome = self.books.apply(command, self.now_ms)
        if isinstance(outcome, Accepted):
            self.entries += outcome.entries
            if isinstance(command, Issue | SetLimit | Reserve) and outcome.entries:
                self.causes[command.digest] = command
                self.outcomes.append((command, outcome))
        return outcome

    @rule(order=st.integers(0, 3), amount=st.integers(1, 100))
    def issue_more(self, order: int, amount: int) -> None:
        self.run(issue(amount, order_id=b"%d" % order, issued_ms=self.now_ms))

    @rule(order=st.integers(0, 3), amount=st.integers(0, 80))
    def set_limit(self, order: int, amount: int) -> None:
        self.run(limit(amount, order_id=b"limit %d" % order, issued_ms=self.now_ms))

    @rule(payee=st.sampled_from(PAYEES), session=st.integers(0, 3))
    def decline_one(self, payee: AccountId, session: int) -> None:
        session_id = SessionId(bytes([session]) * 16)
        before = self.books.paid(session_id, payee)
        self.run(decline(payee, session_id=session_id, issued_ms=self.now_ms))
        assert self.books.paid(session_id, payee) == before

    @rule(
        caps=st.dictionaries(st.sampled_from(PAYEES), st.integers(0, 60), min_size=1, max_size=3),
        extra=st.integers(0, 20),
        session=st.integers(0, 3),
        epoch=st.integers(0, 2),
        skew=st.sampled_from([0, 0, 0, 0, 1]),
    )
    def reserve_more(
        self, caps: dict[AccountId, int], extra: int, session: int, epoch: int, skew: int
    ) -> None:
        command = reserve(
            self.books.next_sequence(CLIENT, 0) + skew,
            caps=caps,
            amount=sum(caps.values()) + extra,
            session_id=bytes([session]) * 16,
            epoch=epoch,
            issued_ms=self.now_ms,
        )
        before = self.books.available(CLIENT)
        outcome = self.run(command)
        if isinstance(outcome, Accepted):
            assert skew == 0
            assert before >= command.reservation.amount

    @rule(
        paid=amounts,
        payee=st.sampled_from(PAYEES),
        session=st.integers(0, 3),
        release=st.booleans(),
    )
    def settle_more(
        self, paid: dict[AccountId, int], payee: AccountId, session: int, release: bool
    ) -> None:
        session_id = SessionId(bytes([session]) * 16)
        command = settle(paid, payee, release=release, session_id=session_id, issued_ms=self.now_ms)
        outcome = self.run(command)
        if isinstance(outcome, Accepted):
            for name, amount in paid.items():
                key = (session_id, name)
                self.promised[key] = max(amount, self.promised.get(key, 0))
            assert outcome.value == self.books.paid(session_id, payee)
            again = self.run(command)
            assert again == Accepted((), (), outcome.value) or refused(again) == "cap"

    @rule(payee=st.sampled_from(PAYEES), session=st.integers(0, 3), number=st.integers(0, 3))
    def forfeit(self, payee: AccountId, session: int, number: int) -> None:
        session_id = SessionId(bytes([session]) * 16)
        standing = self.books.escrows.standing(session_id, payee)
        judged = self.books.escrows.forfeited(session_id, payee) is not None
        before = self.books.balances.of(CLIENT)
        command = Forfeit(session_id, payee, Digest(bytes([number]) * 32))
        outcome = self.run(command)
        if judged or not standing:
            assert not isinstance(outcome, Accepted) or not outcome.entries
        else:
            assert self.books.balances.of(CLIENT) == before + standing
            assert self.books.escrows.standing(session_id, payee) == 0
            assert self.run(command) == Accepted((), (), 0)

    @rule(step_ms=st.sampled_from([1, 60_000, 500_000]))
    def wait(self, step_ms: int) -> None:
        self.now_ms += step_ms
        self.run(Expire())

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        command, earlier = data.draw(st.sampled_from(self.outcomes))
        assert self.run(command) == Accepted((), (), earlier.value)

    @invariant()
    def debits_equal_credits(self) -> None:
        assert sum(self.books.balances.all().values()) == 0

    @invariant()
    def nobody_is_below_its_limit(self) -> None:
        limits = self.limits()
        for name, balance in self.books.balances.all().items():
            assert name == EQUITY or balance >= -limits.get(name, 0)
        assert self.books.available(CLIENT) >= 0

    @invariant()
    def nobody_is_paid_beyond_voucher_or_cap(self) -> None:
        for session in range(4):
            session_id = SessionId(bytes([session]) * 16)
            for payee in PAYEES:
                paid = self.books.paid(session_id, payee)
                caps = [h.caps.get(payee, 0) for h in self.books.holds(session_id).values()]
                assert paid <= self.promised.get((session_id, payee), 0)
                assert paid <= sum(caps)

    @invariant()
    def what_was_paid_is_with_the_payee_in_escrow_or_forfeited(self) -> None:
        moved: Counter[tuple[bytes, AccountId]] = Counter()
        for item in self.entries:
            for line in item.lines:
                payee = escrow_of(line.account)
                if payee is not None and item.kind is EntryKind.ESCROW:
                    moved[item.session_id, payee] += line.credit
        for session in range(4):
            session_id = SessionId(bytes([session]) * 16)
            for payee in PAYEES:
                share = -(-self.books.paid(session_id, payee) * ESCROW_TERMS.percent // 100)
                assert moved[session_id, payee] == share
                assert self.books.escrows.standing(session_id, payee) <= share
        for payee in PAYEES:
            accounts = [
                balance
                for name, balance in self.books.balances.all().items()
                if escrow_of(name) == payee
            ]
            assert self.books.escrows.of(payee) == sum(accounts)

    @invariant()
    def balances_follow_from_the_entries(self) -> None:
        auditor = Balances(NETWORK)
        for item in self.entries:
            auditor.post(entry_from_payload(item.payload))
        assert auditor.all() == self.books.balances.all()

    def teardown(self) -> None:
        replayed = Books(NETWORK, ESCROW_TERMS)
        for item in self.entries:
            command = self.causes.get(item.cause)
            match command:
                case Issue() | SetLimit():
                    replayed.post(item, command.order)
                case Reserve():
                    replayed.post(item, command.reservation)
                case None:
                    replayed.post(item, None)
        for session in range(4):
            session_id = SessionId(bytes([session]) * 16)
            assert replayed.settled(session_id) == self.books.settled(session_id)
            for payee in PAYEES:
                assert replayed.paid(session_id, payee) == self.books.paid(session_id, payee)
        assert replayed.balances.all() == self.books.balances.all()
        assert replayed.next_sequence(CLIENT, 0) == self.books.next_sequence(CLIENT, 0)
        assert replayed.history(CLIENT) == self.books.history(CLIENT)
        later_ms = self.now_ms + ESCROW_TERMS.window_ms
        assert replayed.apply(Expire(), later_ms) == self.books.apply(Expire(), later_ms)
        assert all(self.books.escrows.of(payee) == 0 for payee in PAYEES)


BooksMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_books_machine = pytest.mark.slow(BooksMachine.TestCase)
