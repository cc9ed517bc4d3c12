"""Attacks 1 to 14, on the money, at random among honest work, from one seed.

``play(world, operations)`` plays in a world: a failure is repeated by its seed. After every
operation the books must balance, nobody may be below the limit, and nobody may be paid
beyond what was promised and reserved. The numbers are those of the table in docs/ledger.md.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from plait.envelope import digest, encode
from plait.errors import LedgerError
from plait.ledger.balances import EQUITY, Balances, Entry, entry_from_payload
from plait.ledger.journal import (
    FRESHNESS_MS,
    GRACE_MS,
    Accepted,
    Books,
    Command,
    Decline,
    Expire,
    Fork,
    Issue,
    Outcome,
    Refusal,
    Reserve,
    SetLimit,
    SetSubAccount,
    Settle,
)
from plait.ledger.sub_accounts import BudgetPeriod, SubAccount, terms_message
from plait.testing.accounting import key_of
from plait.types import U64_MAX, AccountId, Prices, SessionId, TokenCounts
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    LimitOrder,
    PayeeAmount,
    SessionVoucher,
    SettlementRequest,
    SubAccountOrder,
)

NETWORK = "attacked"
START_MS = 1_700_000_000_000
CLIENTS = [AccountId(key_of(f"client {number}").peer_id) for number in range(3)]
PAYEES = [AccountId(key_of(f"payee {number}").peer_id) for number in range(3)]
SHARES = ["one", "two"]
TTL_MS = 600_000
ENDS_MS = TTL_MS + GRACE_MS

Amounts = dict[AccountId, int]


def refuses(error: type[Exception], call: Callable[[], object]) -> None:
    """Assert that a call raises."""
    try:
        call()
    except error:
        return
    raise AssertionError(f"no {error.__name__} was raised")


class Session:
    """What the attackers know of a session: its reservation, and what was promised."""

    def __init__(self, client: AccountId, reserve: Reserve, caps: Amounts) -> None:
        self.client = client
        self.id = SessionId(reserve.reservation.session_id)
        self.reserve = reserve
        self.caps = caps
        self.promised: Amounts = dict.fromkeys(caps, 0)


class World:
    """One ledger under attack."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.books = self.new_books()
        self.now_ms = START_MS
        self.entries: list[Entry] = []
        self.causes: dict[bytes, Any] = {}
        self.sessions: list[Session] = []
        self.numbers = 0
        self.played: Counter[str] = Counter()
        self.released: list[tuple[SessionId, Any]] = []
        for client in CLIENTS:
            self.issue(client, 10**6)

    def new_books(self) -> Books:
        """Books in which nothing is booked."""
        return Books(NETWORK)

    # Honest work.

    def number(self) -> bytes:
        """A number that was never used."""
        self.numbers += 1
        return self.numbers.to_bytes(16, "big")

    def run(self, command: Command) -> Outcome:
        """Carry out a command, and note what it did."""
        outcome = self.books.apply(command, self.now_ms)
        if isinstance(outcome, Accepted):
            self.entries += outcome.entries
            if isinstance(command, Issue | SetLimit | SetSubAccount) and outcome.entries:
                self.causes[command.digest] = command.order
            if isinstance(command, Reserve) and outcome.entries:
                self.causes[command.digest] = command.reservation
            self.released += [(release.session_id, release) for release in outcome.releases]
        return outcome

    def issue(self, account: str, amount: int) -> Outcome:
        """Give an account credit."""
        order = IssueOrder(
            network_id=NETWORK,
            account=account,
            amount=amount,
            order_id=self.number(),
            issued_ms=self.now_ms,
        )
        return self.run(Issue(order, digest(encode(order))))

    def reservation(self, client: AccountId, caps: Amounts, **changes: Any) -> Reserve:
        """A reservation, or one with some fields changed."""
        fields: dict[str, Any] = {
            "network_id": NETWORK,
            "account": client,
            "sequence": self.books.next_sequence(client, 0),
            "session_id": self.number(),
            "amount": sum(caps.values()),
            "caps": [PayeeAmount(payee=p, microcredits=m) for p, m in caps.items()],
            "issued_ms": self.now_ms,
            "expires_ms": self.now_ms + TTL_MS,
        }
        message = BudgetReservation(**{**fields, **changes})
        return Reserve(message, digest(encode(message)))

    def open(self, client: AccountId | None = None) -> Session | None:
        """Reserve for a new session."""
        client = client or self.rng.choice(CLIENTS)
        if self.books.available(client) < 1_000:
            self.issue(client, 10_000)
        caps = {payee: self.rng.randint(1, 300) for payee in PAYEES}
        command = self.reservation(client, caps)
        outcome = self.run(command)
        assert isinstance(outcome, Accepted), outcome
        session = Session(client, command, caps)
        self.sessions = [*self.sessions[-19:], session]
        return session

    def settlement(
        self, session: Session, amounts: Amounts, payee: AccountId, **changes: Any
    ) -> Settle:
        """A settlement, or one with some fields of the request changed."""
        voucher = SessionVoucher(
            network_id=changes.pop("network_id", NETWORK),
            session_id=session.id,
            account=session.client,
            sequence=self.rng.randint(1, 9),
            amounts=[PayeeAmount(payee=p, microcredits=m) for p, m in amounts.items()],
            issued_ms=self.rng.randint(1, 10**6),
        )
        fields: dict[str, Any] = {
            "network_id": NETWORK,
            "session_id": session.id,
            "payee": payee,
            "voucher_digest": digest(encode(voucher)),
            "issued_ms": self.now_ms,
        }
        request = SettlementRequest(**{**fields, **changes})
        return Settle(voucher, digest(encode(voucher)), request, digest(encode(request)))

    def settle(self, session: Session, amounts: Amounts, payee: AccountId, **more: Any) -> Outcome:
        """Settle, and note what was promised."""
        outcome = self.run(self.settlement(session, amounts, payee, **more))
        if isinstance(outcome, Accepted):
            for name, amount in amounts.items():
                session.promised[name] = max(session.promised.get(name, 0), amount)
        return outcome

    def some(self) -> Session:
        """One of the newest sessions."""
        session = self.rng.choice(self.sessions) if self.sessions else self.open()
        assert session is not None
        return session

    def paid(self, session: Session) -> Amounts:
        """What each payee was paid."""
        return {payee: self.books.paid(session.id, payee) for payee in PAYEES}

    def part(self, caps: Amounts) -> Amounts:
        """Some of each cap."""
        return {payee: self.rng.randint(0, cap) for payee, cap in caps.items()}

    def limit(self, account: AccountId, credit_limit: int, order_id: bytes = b"") -> Outcome:
        """Set a credit limit."""
        order = LimitOrder(
            network_id=NETWORK,
            account=account,
            credit_limit=credit_limit,
            order_id=order_id or self.number(),
            issued_ms=self.now_ms,
        )
        return self.run(SetLimit(order, digest(encode(order))))

    def decline(self, session: Session, payee: AccountId, **changes: Any) -> Outcome:
        """Release without a voucher."""
        fields: dict[str, Any] = {
            "network_id": NETWORK,
            "session_id": session.id,
            "payee": payee,
            "release": True,
            "issued_ms": self.now_ms,
        }
        request = SettlementRequest(**{**fields, **changes})
        return self.run(Decline(request, digest(encode(request))))

    def share(self, account: AccountId, name: str, **terms: Any) -> Outcome:
        """Order the terms of a sub-account."""
        known = self.books.sub_accounts.of(account).get(name)
        ordered = SubAccount(account, name, known.sequence + 1 if known else 1, **terms)
        order = SubAccountOrder(
            network_id=NETWORK, terms=terms_message(ordered), issued_ms=self.now_ms
        )
        return self.run(SetSubAccount(order, digest(encode(order))))

    def honest_share(self) -> None:
        """Share."""
        client, name = self.rng.choice(CLIENTS), self.rng.choice(SHARES)
        self.share(client, name, limit=self.rng.choice([0, 400, 5_000]))
        if self.rng.random() < 0.2:
            self.share(client, name, closed=True)
        caps = {payee: self.rng.randint(1, 50) for payee in PAYEES}
        command = self.reservation(client, caps, sub_account=name)
        if isinstance(self.run(command), Accepted):
            self.sessions = [*self.sessions[-19:], Session(client, command, caps)]

    def honest_limit(self) -> None:
        """Limit."""
        self.limit(self.rng.choice(CLIENTS), self.rng.choice([0, 500, 5_000]))

    def honest_decline(self) -> None:
        """Decline."""
        session = self.some()
        before = self.paid(session)
        self.decline(session, self.rng.choice(PAYEES))
        assert self.paid(session) == before

    def honest_open(self) -> None:
        """Open."""
        self.open()

    def honest_payment(self) -> None:
        """Payment."""
        session = self.some()
        self.settle(session, self.part(session.caps), self.rng.choice(PAYEES))

    def honest_release(self) -> None:
        """Release."""
        session = self.some()
        self.settle(session, session.promised, self.rng.choice(PAYEES), release=True)

    def honest_wait(self) -> None:
        """Wait."""
        self.now_ms += self.rng.choice([1, 1_000, GRACE_MS])
        self.run(Expire())

    # The attacks, numbered as in the design notes' list.

    def attack_01_two_reservations_under_one_number(self) -> None:
        """Two reservations under one number."""
        client = AccountId(key_of(f"forker {self.numbers}").peer_id)
        self.issue(client, 10_000)
        session = self.open(client)
        assert session is not None
        before = self.books.available(client)
        other = self.reservation(client, session.caps, sequence=1)
        assert self.run(other) == Fork(client, session.reserve.digest, other.digest)
        assert self.books.available(client) == before
        refusal = self.run(self.reservation(client, session.caps))
        assert isinstance(refusal, Refusal) and refusal.code == "frozen"

    def attack_02_one_voucher_settled_by_all_at_once(self) -> None:
        """One voucher settled by all at once."""
        session = self.some()
        amounts = self.part(session.caps)
        for payee in self.rng.sample(PAYEES * 2, 6):
            self.settle(session, amounts, payee)
        most = {p: max(amounts[p], session.promised[p]) for p in PAYEES}
        assert all(paid <= most[p] for p, paid in self.paid(session).items())

    def attack_03_an_older_voucher_after_a_newer(self) -> None:
        """An older voucher after a newer."""
        session = self.some()
        self.settle(session, session.caps, PAYEES[0])
        before = self.paid(session)
        outcome = self.settle(session, self.part(session.caps), PAYEES[1])
        assert self.paid(session) == before
        assert not isinstance(outcome, Accepted) or outcome.entries == ()

    def attack_04_one_number_with_different_splits(self) -> None:
        """One number with different splits."""
        session = self.some()
        others = {c: self.books.available(c) for c in CLIENTS if c != session.client}
        for payee in PAYEES:
            self.settle(session, self.part(session.caps), payee)
        assert all(self.paid(session)[p] <= session.caps[p] for p in PAYEES)
        assert all(self.books.available(c) == credit for c, credit in others.items())

    def attack_05_a_voucher_of_another_session_or_network(self) -> None:
        """A voucher of another session or network."""
        session, other = self.some(), self.open()
        assert other is not None
        before = self.paid(other)
        stolen = self.settlement(session, session.caps, PAYEES[0], session_id=other.id)
        foreign = self.settlement(other, other.caps, PAYEES[0], network_id="another")
        assert all(isinstance(self.run(command), Refusal) for command in (stolen, foreign))
        assert self.paid(other) == before

    def attack_06_the_same_content_signed_anew(self) -> None:
        """The same content signed anew."""
        session = self.some()
        self.settle(session, session.caps, PAYEES[0])
        before, size = self.paid(session), self.books.balances.size
        for _ in range(3):  # another date, so another payload and digest
            self.settle(session, session.caps, PAYEES[0])
        again = self.run(session.reserve)
        assert isinstance(again, Accepted) and again.entries == ()
        assert (self.paid(session), self.books.balances.size) == (before, size)

    def attack_07_zero_and_maximal_amounts(self) -> None:
        """Zero and maximal amounts."""
        client, session = self.rng.choice(CLIENTS), self.some()
        for caps in ({PAYEES[0]: 0}, {PAYEES[0]: U64_MAX}, dict.fromkeys(PAYEES, U64_MAX)):
            amount = min(sum(caps.values()), U64_MAX)
            outcome = self.run(self.reservation(client, caps, amount=amount))
            assert isinstance(outcome, Refusal), outcome
        assert isinstance(self.issue(client, U64_MAX), Refusal)
        assert isinstance(self.limit(client, U64_MAX), Refusal)
        self.settle(session, dict.fromkeys(PAYEES, U64_MAX), PAYEES[0])
        self.settle(session, dict.fromkeys(PAYEES, 0), PAYEES[0])

    def attack_08_rounding_farmed_by_tiny_chunks(self) -> None:
        """Rounding farmed by tiny chunks."""
        prices = Prices(prompt=self.rng.randint(0, 10**6), output=self.rng.randint(0, 10**6))
        prompt, output = self.rng.randint(1, 50), self.rng.randint(1, 50)
        layers = self.rng.randint(1, 9)
        steps = [prices.amount(TokenCounts(prompt, k), layers) for k in range(1, output + 1)]
        assert steps == sorted(steps)
        exact = layers * (prices.prompt * prompt + prices.output * output)
        assert 0 <= steps[-1] * 10**6 - exact < 10**6  # less than one microcredit over all chunks

    def attack_09_a_payee_beyond_its_cap(self) -> None:
        """A payee beyond its cap."""
        session = self.open()
        assert session is not None
        greedy, other = PAYEES[0], PAYEES[1]
        self.settle(session, {greedy: U64_MAX, other: 1}, other)
        assert self.paid(session)[greedy] == session.caps[greedy]
        assert self.paid(session)[other] == 1

    def attack_10_settled_after_the_void_and_posted_twice(self) -> None:
        """Settled after the void and posted twice."""
        session = self.open()
        assert session is not None
        for payee in PAYEES:
            self.settle(session, {PAYEES[0]: 1}, payee, release=True)
        assert self.books.settled(session.id)
        before = self.paid(session)
        self.settle(session, session.caps, PAYEES[0])
        assert self.paid(session) == before
        refuses(LedgerError, lambda: self.books.post(self.entries[-1], None))

    def attack_11_at_the_boundary_of_expiry_with_skewed_clocks(self) -> None:
        """At the boundary of expiry with skewed clocks."""
        session, client = self.open(), self.rng.choice(CLIENTS)
        assert session is not None
        for issued_ms in (self.now_ms - FRESHNESS_MS - 1, self.now_ms + FRESHNESS_MS + 1):
            late = self.run(self.reservation(client, {PAYEES[0]: 1}, issued_ms=issued_ms))
            assert isinstance(late, Refusal)
        self.now_ms += ENDS_MS - 1
        self.run(Expire())
        self.settle(session, session.caps, PAYEES[0])
        assert self.paid(session) == session.caps
        other = self.open(session.client)
        assert other is not None
        self.now_ms += ENDS_MS
        self.run(Expire())
        assert self.books.settled(other.id)
        self.settle(other, other.caps, PAYEES[0])
        assert sum(self.paid(other).values()) == 0

    def attack_12_a_crash_between_any_two_commands(self) -> None:
        """What is on disk is whole commands: the books rebuilt from it are the same."""
        if len(self.entries) > 200 and self.rng.random() < 0.95:
            return
        rebuilt = self.new_books()
        for entry in self.entries:
            rebuilt.post(entry_from_payload(entry.payload), self.causes.get(entry.cause))
        for _, release in self.released:
            rebuilt.mark_released(release)
        for account in self.books.frozen:
            rebuilt.freeze(account)
        assert rebuilt.balances.all() == self.books.balances.all()
        for client in CLIENTS:
            for name in self.books.sub_accounts.of(client):
                key = (client, name, self.now_ms)
                assert rebuilt.sub_accounts.used(*key) == self.books.sub_accounts.used(*key)
        for session in self.sessions:
            assert rebuilt.holds(session.id) == self.books.holds(session.id)
        self.books = rebuilt

    def attack_13_the_client_vanishes_on_the_last_chunk(self) -> None:
        """The client vanishes on the last chunk."""
        session = self.open()
        assert session is not None
        earned = self.part(session.caps)
        self.settle(session, earned, PAYEES[0])  # any one stage's settlement pays them all
        self.now_ms += ENDS_MS
        self.run(Expire())
        assert self.paid(session) == earned

    def attack_14_reserved_and_never_used(self) -> None:
        """Reserved and never used."""
        client = self.rng.choice(CLIENTS)
        others = {c: self.books.available(c) for c in CLIENTS if c != client}
        session = self.open(client)
        assert session is not None
        assert {c: self.books.available(c) for c in others} == others
        before = self.books.available(client)
        self.now_ms += ENDS_MS
        self.run(Expire())
        assert self.books.available(client) >= before + sum(session.caps.values())

    def attack_14_declined_by_who_may_not(self) -> None:
        """Declined by who may not."""
        session = self.open()
        assert session is not None
        held = self.books.pending(session.client)
        for stranger in (session.client, AccountId(key_of("stranger").peer_id)):
            assert isinstance(self.decline(session, stranger), Refusal)
        for payee in PAYEES[1:]:
            self.decline(session, payee)
        assert self.books.pending(session.client) == held  # one still may be paid
        self.settle(session, session.caps, PAYEES[0])
        assert self.paid(session) == session.caps

    def attack_09_an_account_beyond_its_limit(self) -> None:
        """An account beyond its limit."""
        client = AccountId(key_of(f"debtor {self.numbers}").peer_id)
        self.limit(client, 100, order_id := self.number())
        assert isinstance(self.run(self.reservation(client, {PAYEES[0]: 101})), Refusal)
        assert isinstance(self.run(self.reservation(client, {PAYEES[0]: 100})), Accepted)
        assert isinstance(self.limit(client, 99), Refusal)
        raised = self.limit(client, 10**6, order_id)  # the issuer signed another amount
        assert isinstance(raised, Refusal) and raised.code == "order-id"
        assert isinstance(self.run(self.reservation(client, {PAYEES[0]: 1})), Refusal)

    def attack_09_a_share_beyond_its_limits(self) -> None:
        """A share beyond its limits."""
        client, name = self.rng.choice(CLIENTS), f"share {self.numbers}".replace(" ", "-")
        if self.books.available(client) < 1_000:
            self.issue(client, 10_000)
        self.share(client, name, limit=150, period=BudgetPeriod.DAY, period_limit=100)
        # All at once, each within the limit: together they are not.
        outcomes = [
            self.run(self.reservation(client, {PAYEES[0]: 40}, sub_account=name)) for _ in range(5)
        ]
        assert [isinstance(one, Accepted) for one in outcomes] == [True, True] + [False] * 3
        nameless = self.reservation(client, {PAYEES[0]: 1}, sub_account="nobody's")
        assert isinstance(self.run(nameless), Refusal)
        self.share(client, name, closed=True)
        closed = self.run(self.reservation(client, {PAYEES[0]: 1}, sub_account=name))
        assert isinstance(closed, Refusal) and closed.code == "budget"

    # What must hold after each.

    def check(self) -> None:
        """What must hold after every operation."""
        balances = self.books.balances.all()
        assert sum(balances.values()) == 0
        limits = {e.limit.account: e.limit.credit_limit for e in self.entries if e.limit}
        for name, balance in balances.items():
            assert name == EQUITY or balance >= -limits.get(name, 0)
        for client in CLIENTS:
            for share in self.books.sub_accounts.of(client):
                use = self.books.sub_accounts.used(client, share, self.now_ms)
                assert use.used >= self.books.pending(client, share) >= 0
        for session in self.sessions:
            for payee, paid in self.paid(session).items():
                assert paid <= min(session.caps[payee], session.promised[payee])

    def audit(self) -> None:
        """The entries alone give the same balances."""
        auditor = Balances(NETWORK)
        for entry in self.entries:
            auditor.post(entry_from_payload(entry.payload))
        assert auditor.all() == self.books.balances.all()


def play(world: World, operations: int) -> World:
    """So many operations in a world; every attack has the same chance."""
    names = sorted(name for name in dir(world) if name.startswith(("attack_", "honest_")))
    for _ in range(operations):
        name = world.rng.choice(names)
        getattr(world, name)()
        world.played[name] += 1
        world.check()
    world.audit()
    return world
