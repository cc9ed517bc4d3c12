"""The books: double entry as a pure state machine.

``Books.apply(command, now_ms)`` answers a command with the entries it posts or with a
refusal; the same command again gives the earlier answer. A balance is credits minus
debits; only ``issuer:equity``, the counterpart of all issued credit, and accounts to which
the issuer has given a credit limit may be below zero.
What a session sets aside stands in one hold account per epoch, is paid out to the
cumulative amounts of the client's vouchers, each payee up to its cap, and the remainder
goes back once every payee has released it or its expiry and the grace time have passed.
A share of each payment may stand in escrow for a while (``escrow``).
``post``, ``mark_released`` and ``freeze`` rebuild the same state from what was stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from plait.errors import LedgerError
from plait.ledger.balances import (
    EQUITY,
    HOLD,
    Balances,
    Entry,
    EntryKind,
    Limit,
    Line,
    hold_account,
)
from plait.ledger.escrow import NO_ESCROW, Escrows, EscrowTerms
from plait.ledger.journal_commands import (
    Accepted,
    Cause,
    Command,
    Decline,
    Expire,
    Forfeit,
    Fork,
    Issue,
    Outcome,
    Refusal,
    Release,
    Reserve,
    SetLimit,
    SetSubAccount,
    Settle,
)
from plait.ledger.journal_history import History
from plait.ledger.journal_holds import (
    FRESHNESS_MS,
    GRACE_MS,
    Hold,
    has_expired,
    may_release,
    paid_to,
)
from plait.ledger.journal_rules import (
    PAYEES_MAX,
    RESERVATION_TTL_MAX_MS,
    Standing,
    decline_refused,
    is_peer,
    order_key,
    payment_lines,
    reservation_malformed,
    reservation_refused,
    settlement_malformed,
    settlement_refused,
    stale,
)
from plait.ledger.sub_accounts import SubAccounts, terms_from
from plait.types import AccountId, Digest, SessionId
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    LimitOrder,
    SessionVoucher,
    SettlementRequest,
    SubAccountOrder,
)

__all__ = [
    "FRESHNESS_MS",
    "GRACE_MS",
    "PAYEES_MAX",
    "RESERVATION_TTL_MAX_MS",
    "Accepted",
    "Books",
    "Cause",
    "Command",
    "Decline",
    "Expire",
    "Forfeit",
    "Fork",
    "Hold",
    "Issue",
    "Outcome",
    "Refusal",
    "Release",
    "Reserve",
    "SetLimit",
    "SetSubAccount",
    "Settle",
]

FIRST_SEQUENCE = 1


class Books:
    """Balances, holds, reservation numbers and frozen accounts of one network."""

    def __init__(self, network_id: str, escrow: EscrowTerms = NO_ESCROW) -> None:
        self.network_id = network_id
        self.escrows = Escrows(escrow)
        self.balances = Balances(network_id)
        self.sub_accounts = SubAccounts()
        self.frozen: set[AccountId] = set()
        self._sessions: dict[SessionId, dict[int, Hold]] = {}
        self._open: dict[tuple[SessionId, int], Hold] = {}
        self._named: dict[AccountId, Hold] = {}
        self._orders: dict[bytes, tuple[EntryKind, str, int, int]] = {}
        self._reservations: dict[Digest, int] = {}
        self._sub_account_orders: dict[Digest, int] = {}
        self._lanes: dict[tuple[str, int], list[Digest]] = {}
        self._history = History()

    # What may be asked.

    def available(self, account: AccountId) -> int:
        """Credit that a reservation may take, microcredits: balance and credit limit."""
        return self.balances.of(account) + self.balances.limit(account)

    def pending(self, account: AccountId, sub_account: str = "") -> int:
        """Credit of the account, or of one sub-account, that stands in holds, microcredits."""
        return sum(
            self.balances.of(hold.name)
            for hold in self._open.values()
            if hold.account == account and sub_account in ("", hold.sub_account)
        )

    def next_sequence(self, account: AccountId, lane: int) -> int:
        """The number the next reservation of this lane must carry."""
        return FIRST_SEQUENCE + len(self._lanes.get((account, lane), ()))

    def granted(self, account: AccountId, lane: int, sequence: int) -> Digest | None:
        """The reservation that was granted under a number."""
        position = sequence - FIRST_SEQUENCE
        numbers = self._lanes.get((account, lane), [])
        return numbers[position] if 0 <= position < len(numbers) else None

    def paid(self, session_id: SessionId, payee: AccountId) -> int:
        """What the payee has been paid in a session, all epochs together."""
        return paid_to(payee, self._holds(session_id))

    def holds(self, session_id: SessionId) -> Mapping[int, Hold]:
        """A session's holds by epoch; empty for an unknown session."""
        return self._holds(session_id)

    def settled(self, session_id: SessionId) -> bool:
        """Whether the session is known and every hold of it is closed."""
        holds = self._holds(session_id)
        return bool(holds) and not any((session_id, epoch) in self._open for epoch in holds)

    def history(self, account: str) -> tuple[int, ...]:
        """Indexes of the entries that touch an account, its holds, or a session (in hex).

        For a sub-account, ``account/name``.
        """
        return self._history.of(account)

    # What changes the books.

    def apply(self, command: Command, now_ms: int) -> Outcome:
        """Carry out a command or refuse it. Entries are numbered on from ``balances.size``."""
        match command:
            case Issue():
                return self._issue(command, now_ms)
            case SetLimit():
                return self._set_limit(command, now_ms)
            case SetSubAccount():
                return self._set_sub_account(command, now_ms)
            case Decline():
                return self._decline(command, now_ms)
            case Reserve():
                return self._reserve(command, now_ms)
            case Settle():
                return self._settle(command, now_ms)
            case Expire():
                return self._expire(now_ms)
            case Forfeit():
                return self._forfeit(command, now_ms)

    def post(self, entry: Entry, cause: Cause) -> None:
        """Add a stored entry with the order or reservation that caused it.

        Raises ``LedgerError`` if the entry is not valid or the cause is another's.
        """
        self.balances.post(entry)
        match entry.kind, cause:
            case EntryKind.SETTLE, None:
                self._pay(entry)
            case EntryKind.ISSUE, IssueOrder():
                self._orders[cause.order_id] = (*order_key(cause), entry.index)
            case EntryKind.LIMIT, LimitOrder():
                self._orders[cause.order_id] = (*order_key(cause), entry.index)
            case EntryKind.SUB_ACCOUNT, SubAccountOrder():
                if entry.terms is not None:
                    self.sub_accounts.set(entry.terms)
                self._sub_account_orders[Digest(entry.cause)] = entry.index
            case EntryKind.RESERVE, BudgetReservation():
                self._open_hold(entry, cause)
            case EntryKind.VOID, None:
                self._give_back(entry.lines[0])
            case ((EntryKind.ESCROW | EntryKind.MATURE | EntryKind.FORFEIT), None):
                self.escrows.note(entry)
            case _:
                raise LedgerError(f"entry {entry.index} lacks the object that caused it")
        self._history.add(entry, self._named)
        self._close_holds(entry)

    def mark_released(self, release: Release) -> None:
        """Note that a payee wants nothing more from a hold."""
        self._sessions[release.session_id][release.epoch].released.add(release.payee)

    def freeze(self, account: AccountId) -> None:
        """Refuse all further reservations of an account."""
        self.frozen.add(account)

    # Decisions.

    def _issue(self, command: Issue, now_ms: int) -> Accepted | Refusal:
        order = command.order
        answer = self._order_answered(order, now_ms)
        if answer is not None:
            return answer
        if order.amount == 0:
            return Refusal("amount", "the amount is zero")
        lines = Line(EQUITY, debit=order.amount), Line(AccountId(order.account), 0, order.amount)
        entry = self._entry(EntryKind.ISSUE, b"", command.digest, lines, now_ms)
        return self._ordered(entry, order)

    def _set_limit(self, command: SetLimit, now_ms: int) -> Accepted | Refusal:
        order = command.order
        answer = self._order_answered(order, now_ms)
        if answer is not None:
            return answer
        account = AccountId(order.account)
        owed = -self.balances.of(account)
        if order.credit_limit < owed:
            return Refusal("amount", f"the account owes {owed} already")
        entry = self._entry(EntryKind.LIMIT, b"", command.digest, (), now_ms)
        return self._ordered(replace(entry, limit=Limit(account, order.credit_limit)), order)

    def _set_sub_account(self, command: SetSubAccount, now_ms: int) -> Accepted | Refusal:
        order, digest = command.order, command.digest
        if digest in self._sub_account_orders:
            return Accepted((), (), self._sub_account_orders[digest])
        if order.network_id != self.network_id:
            return Refusal("network", "the order is for another network")
        try:
            terms = terms_from(order.terms)
        except ValueError as error:
            return Refusal("malformed", f"the period is none: {error}")
        if terms.account not in self._history or not is_peer(terms.account):
            return Refusal("account", "nothing was ever booked for this account")
        reason = self.sub_accounts.order_refused(terms)
        if reason is not None:
            return Refusal("sub-account", reason)
        entry = replace(self._entry(EntryKind.SUB_ACCOUNT, b"", digest, (), now_ms), terms=terms)
        self.post(entry, order)
        return Accepted((entry,), (), entry.index)

    def _ordered(self, entry: Entry, order: IssueOrder | LimitOrder) -> Accepted | Refusal:
        reason = self.balances.violation(entry)
        if reason is not None:
            return Refusal("amount", reason)
        self.post(entry, order)
        return Accepted((entry,), (), entry.index)

    def _order_answered(
        self, order: IssueOrder | LimitOrder, now_ms: int
    ) -> Accepted | Refusal | None:
        """The answer to an order that is booked already or that no account can have."""
        earlier = self._orders.get(order.order_id)
        if earlier is not None:
            if earlier[:3] == order_key(order):
                return Accepted((), (), earlier[3])
            return Refusal("order-id", "the order id is booked with another account or amount")
        if order.network_id != self.network_id:
            return Refusal("network", "the order is for another network")
        if not is_peer(order.account) or not 1 <= len(order.order_id) <= 64:
            return Refusal("malformed", "the account is no peer id or the order id is no id")
        if abs(order.issued_ms - now_ms) > FRESHNESS_MS:
            return stale("order")
        return None

    def _reserve(self, command: Reserve, now_ms: int) -> Outcome:
        reservation, digest = command.reservation, command.digest
        if digest in self._reservations:
            return Accepted((), (), self._reservations[digest])
        refusal = reservation_malformed(reservation, self.network_id)
        if refusal is not None:
            return refusal
        account = AccountId(reservation.account)
        granted = self._lanes.get((account, reservation.lane), [])
        position = reservation.sequence - FIRST_SEQUENCE
        if 0 <= position < len(granted):
            self.freeze(account)
            if not command.certified:
                return Fork(account, granted[position], digest)
        refusal = self._reservation_refused(command, account, now_ms)
        if refusal is not None:
            return refusal
        hold = hold_account(reservation.session_id, reservation.epoch)
        lines = Line(account, debit=reservation.amount), Line(hold, credit=reservation.amount)
        entry = replace(
            self._entry(EntryKind.RESERVE, reservation.session_id, digest, lines, now_ms),
            sub_account=reservation.sub_account,
        )
        self.post(entry, reservation)
        return Accepted((entry,), (), entry.index)

    def _reservation_refused(
        self, command: Reserve, account: AccountId, now_ms: int
    ) -> Refusal | None:
        reservation = command.reservation
        standing = Standing(
            frozen=account in self.frozen,
            next_sequence=self.next_sequence(account, reservation.lane),
            holds=self._holds(SessionId(reservation.session_id)),
            available=self.available(account),
        )
        refusal = reservation_refused(command, standing, now_ms)
        # What a quorum has granted is within the account's credit, and booked whatever is
        # known here of the share: its limits are its owner's affair.
        if refusal is not None or not reservation.sub_account or command.certified:
            return refusal
        reason = self.sub_accounts.refusal(
            account, reservation.sub_account, reservation.amount, now_ms
        )
        return None if reason is None else Refusal("budget", reason)

    def _settle(self, command: Settle, now_ms: int) -> Accepted | Refusal:
        voucher, request = command.voucher, command.request
        session_id, payee = SessionId(voucher.session_id), AccountId(request.payee)
        refusal = settlement_malformed(command, self.network_id) or settlement_refused(
            command, self._holds(session_id).values()
        )
        if refusal is not None:
            return refusal
        payment = self.payment(voucher, command.voucher_digest, now_ms)
        payments: tuple[Entry, ...] = ()
        if payment is not None:
            self.post(payment, None)
            aside = self.set_aside(payment)
            payments = (payment,) if aside is None else (payment, aside)
            if aside is not None:
                self.post(aside, None)
        releases, voids = (), ()  # type: tuple[Release, ...], tuple[Entry, ...]
        if request.release:
            releases, voids = self._released(request, command.request_digest, now_ms)
        entries = (*payments, *voids)
        paid = self.paid(session_id, payee)
        promised = max((a.microcredits for a in voucher.amounts if a.payee == payee), default=0)
        if promised > paid and not entries and not releases:
            return Refusal("cap", f"{paid} paid, and nothing more is reserved for this payee")
        return Accepted(entries, releases, paid)

    def _decline(self, command: Decline, now_ms: int) -> Accepted | Refusal:
        request = command.request
        refusal = decline_refused(request, self.network_id)
        if refusal is not None:
            return refusal
        session_id, payee = SessionId(request.session_id), AccountId(request.payee)
        if not self._holds(session_id):
            return Refusal("session", "no reservation is known for this session")
        if not any(payee in hold.caps for hold in self._holds(session_id).values()):
            return Refusal("payee", "nothing is reserved for this payee")
        releases, voids = self._released(request, command.digest, now_ms)
        return Accepted(voids, releases, self.paid(session_id, payee))

    def payment(self, voucher: SessionVoucher, voucher_digest: Digest, now_ms: int) -> Entry | None:
        """The entry, not posted, that pays everybody up to a voucher; ``None`` if all are."""
        session_id = SessionId(voucher.session_id)
        holds = self._holds(session_id)
        open_holds = [holds[epoch] for epoch in sorted(holds) if (session_id, epoch) in self._open]
        lines = payment_lines(voucher, open_holds, lambda payee: paid_to(payee, holds))
        return (
            self._entry(EntryKind.SETTLE, session_id, voucher_digest, lines, now_ms)
            if lines
            else None
        )

    def set_aside(self, payment: Entry) -> Entry | None:
        """The entry, not posted, that puts the share of a payment just posted in escrow."""
        if not self.escrows.terms.percent:
            return None
        session_id = SessionId(payment.session_id)
        paid = {
            line.account: self.paid(session_id, line.account)
            for line in payment.lines
            if line.credit
        }
        lines = self.escrows.set_aside(payment, paid)
        if not lines:
            return None
        cause, posted_ms = payment.cause, payment.posted_ms
        return self._entry(EntryKind.ESCROW, session_id, cause, lines, posted_ms)

    def returns(self, session_id: SessionId, now_ms: int) -> list[Entry]:
        """The entries, not posted, that end a session's escrow: to the payees, or to who paid."""
        blank = self._entry(EntryKind.MATURE, session_id, b"", (), now_ms)
        return self.escrows.returns(session_id, self._payer(session_id), blank)

    def forfeit(self, command: Forfeit, now_ms: int) -> Entry | None:
        """The entry, not posted, that a judgement leads to; ``None`` if nothing stands."""
        session_id, payee = command.session_id, command.payee
        if not self.escrows.standing(session_id, payee):
            return None
        blank = self._entry(EntryKind.FORFEIT, session_id, command.digest, (), now_ms)
        payer = self._payer(session_id)
        return self.escrows.forfeit(session_id, payee, payer, blank, command.digest)

    def void(self, session_id: SessionId, epoch: int, cause: bytes, now_ms: int) -> Entry | None:
        """The entry, not posted, that gives a hold's remainder back; ``None`` if none is left."""
        hold = self._sessions[session_id][epoch]
        remainder = self.balances.of(hold.name)
        if remainder == 0:
            return None
        lines = Line(hold.name, debit=remainder), Line(hold.account, credit=remainder)
        return self._entry(EntryKind.VOID, session_id, cause, lines, now_ms)

    def _released(
        self, request: SettlementRequest, cause: Digest, now_ms: int
    ) -> tuple[tuple[Release, ...], tuple[Entry, ...]]:
        """Note a payee's release of all its open holds; void those that all have released."""
        session_id, payee = SessionId(request.session_id), AccountId(request.payee)
        releases = tuple(
            Release(session_id, epoch, payee)
            for epoch, hold in sorted(self._holds(session_id).items())
            if (session_id, epoch) in self._open
            and payee not in hold.released
            and may_release(hold, request)
        )
        voids: list[Entry] = []
        for release in releases:
            self.mark_released(release)
            hold = self._sessions[session_id][release.epoch]
            if hold.released >= hold.caps.keys():
                voids += self._void(session_id, release.epoch, cause, now_ms)
        return releases, tuple(voids)

    def _forfeit(self, command: Forfeit, now_ms: int) -> Accepted | Refusal:
        known = self.escrows.forfeited(command.session_id, command.payee)
        if known is not None:
            # Whoever signed it, it is the same exposure: it counts once.
            return Accepted((), (), 0)
        entry = self.forfeit(command, now_ms)
        if entry is None:
            return Refusal("escrow", "nothing of this payee stands in escrow for this session")
        self.post(entry, None)
        return Accepted((entry,), (), entry.lines[0].debit)

    def _expire(self, now_ms: int) -> Accepted:
        due = [key for key, hold in self._open.items() if has_expired(hold, now_ms)]
        entries = [entry for key in due for entry in self._void(*key, b"", now_ms)]
        for session_id in self.escrows.due(now_ms):
            ended = self.returns(session_id, now_ms)
            for entry in ended:
                self.post(entry, None)
            entries += ended
        return Accepted(tuple(entries), (), len(entries))

    def _void(self, session_id: SessionId, epoch: int, cause: bytes, now_ms: int) -> list[Entry]:
        entry = self.void(session_id, epoch, cause, now_ms)
        if entry is None:
            return []
        self.post(entry, None)
        return [entry]

    # State.

    def _payer(self, session_id: SessionId) -> AccountId:
        return next(iter(self._sessions[session_id].values())).account

    def _holds(self, session_id: SessionId) -> dict[int, Hold]:
        return self._sessions.get(session_id, {})

    def _entry(
        self, kind: EntryKind, session_id: bytes, cause: bytes, lines: Iterable[Line], now_ms: int
    ) -> Entry:
        return Entry(
            self.network_id, self.balances.size, kind, session_id, cause, tuple(lines), now_ms
        )

    def _open_hold(self, entry: Entry, reservation: BudgetReservation) -> None:
        session_id = SessionId(reservation.session_id)
        hold = Hold(
            name=hold_account(session_id, reservation.epoch),
            account=AccountId(reservation.account),
            epoch=reservation.epoch,
            reservation=Digest(entry.cause),
            granted_ms=entry.posted_ms,
            expires_ms=max(reservation.expires_ms, entry.posted_ms),
            caps={AccountId(cap.payee): cap.microcredits for cap in reservation.caps},
            sub_account=reservation.sub_account,
        )
        if hold.sub_account:
            self.sub_accounts.use(
                hold.account, hold.sub_account, reservation.amount, hold.granted_ms
            )
        self._sessions.setdefault(session_id, {})[reservation.epoch] = hold
        self._open[session_id, reservation.epoch] = hold
        self._named[hold.name] = hold
        self._reservations[hold.reservation] = entry.index
        self._lanes.setdefault((hold.account, reservation.lane), []).append(hold.reservation)

    def _pay(self, entry: Entry) -> None:
        hold = None
        for line in entry.lines:
            if line.debit:
                hold = self._named[line.account]
            elif hold is not None:
                hold.paid[line.account] = hold.paid.get(line.account, 0) + line.credit

    def _give_back(self, line: Line) -> None:
        hold = self._named[line.account]
        if hold.sub_account:
            self.sub_accounts.use(hold.account, hold.sub_account, -line.debit, hold.granted_ms)

    def _close_holds(self, entry: Entry) -> None:
        """Forget as open what an entry has left nothing in."""
        for line in entry.lines:
            if line.account.startswith(HOLD) and self.balances.of(line.account) == 0:
                epoch = self._named[line.account].epoch
                self._open.pop((SessionId(entry.session_id), epoch), None)
