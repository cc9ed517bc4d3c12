"""Sub-accounts: limits, periods, what counts against them, and that the log tells it all."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.envelope import digest, encode, open_envelope, seal
from plait.identity import SigningKey
from plait.ledger.balances import Entry, EntryKind, entry_from_payload
from plait.ledger.bundle import build_bundle
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import Checkpoint
from plait.ledger.journal import (
    GRACE_MS,
    Accepted,
    Books,
    Command,
    Decline,
    Expire,
    Issue,
    Refusal,
    Reserve,
    SetSubAccount,
    Settle,
)
from plait.ledger.journal_audit import JournalAuditor, JournalPage, audit_journal
from plait.ledger.merkle import EMPTY_ROOT, leaf_hash, root_of
from plait.ledger.statement import Coverage, Period, make_invoice, make_statement
from plait.ledger.sub_accounts import BudgetPeriod, SubAccount, period_start, terms_message
from plait.ledger.verify import verify_bundle
from plait.testing.accounting import PaperSession, Plot, key_of, paper_network
from plait.types import AccountId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    PayeeAmount,
    SessionVoucher,
    SettlementRequest,
    SubAccountOrder,
)

NETWORK = "net-1"
DAY_MS = 86_400_000
NOW = 1_700_000_000_000
OWNER, OWNER_LEDGER, PAYEE, PAYEE_LEDGER, STRANGER, ISSUER = (
    SigningKey.from_seed(bytes([seed]) * 32) for seed in range(1, 7)
)
ACCOUNT, ALICE = AccountId(OWNER.peer_id), AccountId(PAYEE.peer_id)


class Desk:
    """Books with an owner who signs, and all that was signed."""

    def __init__(self, credit: int = 1_000) -> None:
        self.books = Books(NETWORK)
        self.now_ms = NOW
        self.entries: list[Entry] = []
        self.signed: list[SignedEnvelope] = [
            make_key_cert(OWNER, OWNER_LEDGER.public, NETWORK, NOW, 10**12, 1)
        ]
        self.numbers: dict[int, int] = {}
        order = IssueOrder(
            network_id=NETWORK, account=ACCOUNT, amount=credit, order_id=b"1", issued_ms=NOW
        )
        self.run(Issue(order, self.sign(order, ISSUER)))

    def sign(self, message: Any, key: SigningKey = OWNER_LEDGER) -> Any:
        self.signed.append(seal(key, message))
        return digest(encode(message))

    def run(self, command: Command) -> Accepted | Refusal:
        outcome = self.books.apply(command, self.now_ms)
        assert isinstance(outcome, Accepted | Refusal)
        if isinstance(outcome, Accepted):
            self.entries += outcome.entries
        return outcome

    def order(self, name: str = "team", **terms: Any) -> Accepted | Refusal:
        known = self.books.sub_accounts.of(ACCOUNT).get(name)
        terms = {"sequence": known.sequence + 1 if known else 1, **terms}
        message = SubAccountOrder(
            network_id=NETWORK, terms=terms_message(SubAccount(ACCOUNT, name, **terms))
        )
        return self.run(SetSubAccount(message, self.sign(message)))

    def reserve(
        self, session: int, amount: int, name: str = "team", lane: int = 0, **more: Any
    ) -> Accepted | Refusal:
        message = BudgetReservation(
            network_id=NETWORK,
            account=ACCOUNT,
            lane=lane,
            sequence=self.books.next_sequence(ACCOUNT, lane),
            session_id=session.to_bytes(16),
            amount=amount,
            caps=[PayeeAmount(payee=ALICE, microcredits=amount)],
            issued_ms=self.now_ms,
            expires_ms=self.now_ms + 60_000,
            sub_account=name,
        )
        return self.run(Reserve(message, self.sign(message), **more))

    def settle(self, session: int, amount: int, *, release: bool = True) -> Accepted | Refusal:
        voucher = SessionVoucher(
            network_id=NETWORK,
            session_id=session.to_bytes(16),
            account=ACCOUNT,
            amounts=[PayeeAmount(payee=ALICE, microcredits=amount)],
        )
        shown = self.sign(voucher)
        request = SettlementRequest(
            network_id=NETWORK,
            session_id=session.to_bytes(16),
            payee=ALICE,
            voucher_digest=shown,
            release=release,
            issued_ms=self.now_ms,
        )
        return self.run(Settle(voucher, shown, request, self.sign(request, PAYEE_LEDGER)))

    def used(self, name: str = "team") -> tuple[int, int]:
        use = self.books.sub_accounts.used(ACCOUNT, name, self.now_ms)
        return use.used, use.period_used

    def audited(self, *, leaves: list[bytes] | None = None) -> tuple[str, ...]:
        leaves = leaves or [entry.payload for entry in self.entries]
        cert = make_key_cert(PAYEE, PAYEE_LEDGER.public, NETWORK, NOW, 10**12, 1)
        page = JournalPage(tuple(leaves), (*self.signed, cert))
        root = root_of([leaf_hash(leaf) for leaf in leaves])
        checkpoint = Checkpoint("log", len(leaves), root)
        return audit_journal(JournalAuditor(NETWORK, ISSUER.public), [page], checkpoint).violations


def code(outcome: Accepted | Refusal) -> str:
    return outcome.code if isinstance(outcome, Refusal) else "accepted"


@given(
    st.dates(date(1970, 1, 1), date(2400, 1, 1)),
    st.sampled_from(BudgetPeriod),
)
def test_periods_are_those_of_the_calendar(day: date, period: BudgetPeriod) -> None:
    epoch = date(1970, 1, 1)
    expected = {
        BudgetPeriod.DAY: day,
        BudgetPeriod.WEEK: day - timedelta(days=day.weekday()),
        BudgetPeriod.MONTH: day.replace(day=1),
    }[period]
    assert period_start(period, (day - epoch).days) == (expected - epoch).days


def test_holds_count_at_once_and_what_is_voided_counts_no_more() -> None:
    desk = Desk()
    desk.order(limit=100)
    assert code(desk.reserve(1, 70)) == "accepted"
    assert desk.used() == (70, 0)
    assert code(desk.reserve(2, 31)) == "budget"
    assert code(desk.reserve(2, 30)) == "accepted"
    assert desk.books.pending(ACCOUNT, "team") == 100
    desk.settle(1, 50)
    assert desk.used() == (80, 0)
    assert desk.books.pending(ACCOUNT, "team") == 30
    desk.now_ms += 60_000 + GRACE_MS
    desk.run(Expire())
    assert desk.used() == (50, 0)
    assert desk.books.available(ACCOUNT) == 950
    assert code(desk.reserve(3, 50)) == "accepted"
    assert desk.audited() == ()


def test_two_hundred_at_once_get_what_a_budget_for_twenty_allows() -> None:
    desk = Desk(credit=10_000)
    desk.order(period=BudgetPeriod.MONTH, period_limit=20 * 7)
    outcomes = [desk.reserve(session, 7, lane=session % 8) for session in range(200)]
    assert [code(one) for one in outcomes] == ["accepted"] * 20 + ["budget"] * 180
    # The rest of the account is not touched by it.
    assert code(desk.reserve(300, 9_000, name="")) == "accepted"


def test_a_period_begins_anew_and_an_old_hold_gives_back_to_its_own() -> None:
    desk = Desk()
    desk.now_ms = int(datetime(2026, 11, 30, 23, 59, tzinfo=UTC).timestamp() * 1000)
    desk.order(period=BudgetPeriod.MONTH, period_limit=100)
    assert code(desk.reserve(1, 100)) == "accepted"
    assert code(desk.reserve(2, 1)) == "budget"
    desk.now_ms += 60_000
    assert desk.used() == (100, 0)
    assert code(desk.reserve(2, 60)) == "accepted"
    desk.settle(1, 10)
    assert desk.used() == (70, 60)
    assert code(desk.reserve(3, 41)) == "budget"


def test_both_limits_hold() -> None:
    desk = Desk()
    desk.order(limit=50, period=BudgetPeriod.DAY, period_limit=40)
    assert code(desk.reserve(1, 41)) == "budget"
    assert code(desk.reserve(1, 40)) == "accepted"
    desk.now_ms += DAY_MS
    assert code(desk.reserve(2, 11)) == "budget"
    assert code(desk.reserve(2, 10)) == "accepted"


def test_a_sub_account_is_no_pot() -> None:
    desk = Desk(credit=100)
    desk.order("one", limit=100)
    desk.order("two", limit=100)
    assert desk.books.available(ACCOUNT) == 100
    assert code(desk.reserve(1, 60, name="one")) == "accepted"
    assert code(desk.reserve(2, 60, name="two")) == "credit"


def test_a_closed_one_takes_no_more_and_pays_what_it_holds() -> None:
    desk = Desk()
    desk.order(limit=100)
    desk.reserve(1, 40)
    assert code(desk.order(closed=True)) == "accepted"
    assert code(desk.reserve(2, 1)) == "budget"
    assert code(desk.settle(1, 25)) == "accepted"
    assert desk.books.balances.of(ALICE) == 25
    assert desk.books.available(ACCOUNT) == 975
    assert code(desk.order(limit=50)) == "accepted"
    assert code(desk.reserve(2, 25)) == "accepted"
    assert desk.audited() == ()


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"name": "Team"}, "sub-account"),
        ({"name": ""}, "sub-account"),
        ({"name": "a/b"}, "sub-account"),
        ({"name": "a" * 65}, "sub-account"),
        ({"sequence": 2}, "sub-account"),
        ({"sequence": 0}, "sub-account"),
        ({"period": BudgetPeriod.DAY}, "sub-account"),
        ({"period_limit": 1}, "sub-account"),
        ({"closed": True}, "sub-account"),
    ],
)
def test_orders_that_are_refused(terms: dict[str, Any], reason: str) -> None:
    desk = Desk()
    assert code(desk.order(**terms)) == reason
    assert not desk.books.sub_accounts.of(ACCOUNT)


def test_an_order_counts_once_and_an_old_one_never_again() -> None:
    desk = Desk()
    first = SubAccountOrder(
        network_id=NETWORK, terms=terms_message(SubAccount(ACCOUNT, "team", 1, limit=900))
    )
    command = SetSubAccount(first, desk.sign(first))
    booked = desk.run(command)
    assert desk.run(command) == Accepted((), (), 1) and isinstance(booked, Accepted)
    desk.order(limit=10)
    other = SubAccountOrder(
        network_id=NETWORK, terms=terms_message(SubAccount(ACCOUNT, "team", 2, limit=900))
    )
    assert code(desk.run(SetSubAccount(other, desk.sign(other)))) == "sub-account"
    assert desk.books.sub_accounts.of(ACCOUNT)["team"].limit == 10
    elsewhere = SubAccountOrder(network_id="net-2", terms=first.terms)
    assert code(desk.run(SetSubAccount(elsewhere, desk.sign(elsewhere)))) == "network"
    foreign = SubAccountOrder(network_id=NETWORK, terms=first.terms)
    foreign.terms.account = STRANGER.peer_id
    assert code(desk.run(SetSubAccount(foreign, desk.sign(foreign)))) == "account"
    first.terms.period = 9  # type: ignore[assignment]
    assert code(desk.run(SetSubAccount(first, desk.sign(first)))) == "malformed"


def test_what_a_quorum_granted_is_booked_and_counted_whatever_is_known_of_the_share() -> None:
    desk = Desk()
    assert code(desk.reserve(1, 10, name="late")) == "budget"
    assert code(desk.reserve(1, 10, name="late", certified=True, dated=False)) == "accepted"
    desk.order("late", limit=15)
    assert desk.used("late") == (10, 0)
    assert code(desk.reserve(2, 6, name="late")) == "budget"


def lively() -> Desk:
    desk = Desk()
    desk.order(limit=500, period=BudgetPeriod.WEEK, period_limit=200)
    desk.reserve(1, 120)
    desk.reserve(2, 80, name="")
    desk.settle(1, 45)
    desk.settle(2, 30)
    desk.order(limit=600, period=BudgetPeriod.WEEK, period_limit=200)
    desk.reserve(3, 33)
    return desk


def test_the_books_are_rebuilt_from_what_was_stored() -> None:
    desk = lively()
    fresh = Books(NETWORK)
    causes = {digest(one.payload): one for one in desk.signed}
    for entry in desk.entries:
        cause: Any = None
        match entry.kind:
            case EntryKind.ISSUE:
                cause = open_envelope(causes[entry.cause], IssueOrder)  # type: ignore[index]
            case EntryKind.SUB_ACCOUNT:
                cause = open_envelope(causes[entry.cause], SubAccountOrder)  # type: ignore[index]
            case EntryKind.RESERVE:
                cause = open_envelope(causes[entry.cause], BudgetReservation)  # type: ignore[index]
        fresh.post(entry_from_payload(entry.payload), cause)
    key = (ACCOUNT, "team", desk.now_ms)
    assert fresh.sub_accounts.used(*key) == desk.books.sub_accounts.used(*key)
    assert fresh.history(f"{ACCOUNT}/team") == desk.books.history(f"{ACCOUNT}/team")
    assert len(fresh.history(f"{ACCOUNT}/team")) == 6


def test_statement_and_invoice_of_a_share_follow_from_the_log() -> None:
    desk = lively()
    period = Period(NOW - DAY_MS, NOW + DAY_MS)
    statement = make_statement(desk.entries, ACCOUNT, period, "team")
    assert [one.change for one in statement.movements] == [-120, 75, -33]
    assert statement.closing == -desk.used()[0] == -78
    coverage = Coverage.of(desk.entries, "log.example", EMPTY_ROOT)
    assert b'"sub_account":"team"' in statement.encoded(coverage)
    invoice = make_invoice(desk.entries, ACCOUNT, period, "team")
    assert [(one.payee, one.amount) for one in invoice.charges] == [(ALICE, 45)]
    assert make_invoice(desk.entries, ACCOUNT, period).total == 75
    assert b"sub_account" not in make_statement(desk.entries, ACCOUNT, period).encoded(coverage)


def test_an_auditor_sees_a_share_overdrawn_renamed_or_opened_by_somebody_else() -> None:
    desk = lively()
    assert desk.audited() == ()
    # An authority that keeps no limits books what its owner signed, but should not have.
    loose = lively()
    loose.books.sub_accounts.refusal = lambda *ask: None  # type: ignore[method-assign]
    assert code(loose.reserve(9, 250)) == "accepted"
    assert "it is not what its cause says" in loose.audited()[0]
    renamed = [entry.payload for entry in desk.entries]
    spot = next(i for i, one in enumerate(desk.entries) if one.sub_account)
    renamed[spot] = renamed[spot].replace(b"team", b"mate")
    assert "it is not what its cause says" in desk.audited(leaves=renamed)[0]
    for number, envelope in enumerate(desk.signed):
        if envelope.payload_type.endswith("sub-account-order.v1"):
            desk.signed[number] = seal(STRANGER, open_envelope(envelope, SubAccountOrder))
    assert "no certificate says" in desk.audited()[0]


def test_a_bundle_says_which_share_paid() -> None:
    parts = PaperSession(Plot(sub_account="team")).play().bundle_parts()
    assert entry_from_payload(parts.entries[0]).sub_account == "team"
    report = verify_bundle(build_bundle(parts, key_of("client")), paper_network())
    assert report.outcome == "verified", report.lines()
    # The lies about it are among those of test_ledger_verify.


def test_declining_gives_back_too() -> None:
    desk = Desk()
    desk.order(limit=100)
    desk.reserve(1, 100)
    request = SettlementRequest(
        network_id=NETWORK,
        session_id=(1).to_bytes(16),
        payee=ALICE,
        release=True,
        issued_ms=desk.now_ms,
    )
    assert code(desk.run(Decline(request, desk.sign(request, PAYEE_LEDGER)))) == "accepted"
    assert desk.used() == (0, 0)
