"""The books: double entry as a pure state machine.

``Books.apply(command, now_ms)`` answers a command with the entries it posts or with a
refusal; the same command again gives the earlier answer. A balance is credits minus
debits; only ``issuer:equity``, the counterpart of all issued credit, and accounts to which
the issuer has given a credit limit may be below zero.
What a session sets aside stands in one hold account per epoch, is paid out to the
cumulative amounts of the client's vouchers, each payee up to its cap, and the remainder
goes back once every payee has released it or its expiry and the grace time have passed.
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
from plait.ledger.journal_commands import (
    Accepted,
    Cause,
    Command,
    Decline,
    Expire,
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
from plait.ledger.journal_holds import (
    FRESHNESS_MS,
    GRACE_MS,
    Hold,
    has_expired,
    may_release,
)
from plait.ledger.journal_rules import (
    PAYEES_MAX,
    is_peer,
    order_key,
    reservation_malformed,
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

RESERVATION_TTL_MAX_MS = 24 * 3_600_000
FIRST_SEQUENCE = 1


class Books:
    """Balances, holds, reservation numbers and frozen accounts of one network."""

    def __init__(self, network_id: str) -> None:
        self.network_id = network_id
        self.balances = Balances(network_id)
        self.sub_accounts = SubAccounts()
        self.frozen: set[AccountId] = set()
        self._sessions: dict[SessionId, dict[int, Hold]] = {}
        self._open: dict[tuple[SessionId, int], Hold] = {}
        self._orders: dict[bytes, tuple[EntryKind, str, int, int]] = {}
        self._reservations: dict[Digest, int] = {}
        self._sub_account_orders: dict[Digest, int] = {}
        self._lanes: dict[tuple[str, int], list[Digest]] = {}
        self._history: dict[str, list[int]] = {}

    # What may be asked.

    def available(self, account: AccountId) -> int:
        """Credit that a reservation may take, microcredits: balance and credit limit."""
        return self.balances.of(account) + self.balances.limit(account)

    def pending(self, account: AccountId, sub_account: str = "") -> int:
        """Credit of the account, or of one sub-account, that stands in holds, microcredits."""
        return sum(
            self.balances.of(hold_account(*key))
            for key, hold in self._open.items()
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
        return sum(hold.paid.get(payee, 0) for hold in self._holds(session_id).values())

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
        return tuple(self._history.get(account, ()))

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

    def post(self, entry: Entry, cause: Cause) -> None:
        """Add a stored entry with the order or reservation that caused it.

        Raises ``LedgerError`` if the entry is not valid or the cause is another's.
        """
        self.balances.post(entry)
        match entry.kind, cause:
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
            case EntryKind.SETTLE, None:
                self._pay(entry)
            case EntryKind.VOID, None:
                self._give_back(entry.lines[0])
            case _:
                raise LedgerError(f"entry {entry.index} lacks the object that caused it")
        self._index(entry)

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
        if account in self.frozen and not command.certified:
            return Refusal("frozen", "the account signed two reservations under one number")
        expected = self.next_sequence(account, reservation.lane)
        if reservation.sequence > expected or (
            reservation.sequence < expected and not command.certified
        ):
            return Refusal("sequence", f"the next number of this lane is {expected}")
        if command.dated and abs(reservation.issued_ms - now_ms) > FRESHNESS_MS:
            return stale("reservation")
        expired = command.dated and reservation.expires_ms <= now_ms
        if expired or reservation.expires_ms > now_ms + RESERVATION_TTL_MAX_MS:
            return Refusal("expiry", "the reservation has expired or is too long")
        holds = self._holds(SessionId(reservation.session_id))
        if reservation.epoch in holds or any(hold.account != account for hold in holds.values()):
            return Refusal("session", "the session's epoch is reserved already, or not by you")
        if self.available(account) < reservation.amount:
            return Refusal(
                "credit", f"{reservation.amount} asked, {self.available(account)} available"
            )
        # What a quorum has granted is within the account's credit, and booked whatever is
        # known here of the share: its limits are its owner's affair.
        if reservation.sub_account and not command.certified:
            reason = self.sub_accounts.refusal(
                account, reservation.sub_account, reservation.amount, now_ms
            )
            if reason is not None:
                return Refusal("budget", reason)
        return None

    def _settle(self, command: Settle, now_ms: int) -> Accepted | Refusal:
        voucher, request = command.voucher, command.request
        refusal = self._settlement_refused(command)
        if refusal is not None:
            return refusal
        session_id, payee = SessionId(voucher.session_id), AccountId(request.payee)
        payment = self.payment(voucher, command.voucher_digest, now_ms)
        if payment is not None:
            self.post(payment, None)
        releases, voids = (), ()  # type: tuple[Release, ...], tuple[Entry, ...]
        if request.release:
            releases, voids = self._released(request, command.request_digest, now_ms)
        entries = (payment, *voids) if payment is not None else voids
        paid = self.paid(session_id, payee)
        promised = max((a.microcredits for a in voucher.amounts if a.payee == payee), default=0)
        if promised > paid and not entries and not releases:
            return Refusal("cap", f"{paid} paid, and nothing more is reserved for this payee")
        return Accepted(entries, releases, paid)

    def _decline(self, command: Decline, now_ms: int) -> Accepted | Refusal:
        request = command.request
        if request.network_id != self.network_id:
            return Refusal("network", "the request is for another network")
        if request.voucher_digest or not request.release:
            return Refusal("malformed", "a request without a voucher can only release")
        session_id, payee = SessionId(request.session_id), AccountId(request.payee)
        if not self._holds(session_id):
            return Refusal("session", "no reservation is known for this session")
        if not any(payee in hold.caps for hold in self._holds(session_id).values()):
            return Refusal("payee", "nothing is reserved for this payee")
        releases, voids = self._released(request, command.digest, now_ms)
        return Accepted(voids, releases, self.paid(session_id, payee))

    def payment(self, voucher: SessionVoucher, voucher_digest: Digest, now_ms: int) -> Entry | None:
        """The entry, not posted, that pays everybody up to a voucher; ``None`` if all are."""
        lines = self._payment_lines(voucher)
        session_id = voucher.session_id
        return (
            self._entry(EntryKind.SETTLE, session_id, voucher_digest, lines, now_ms)
            if lines
            else None
        )

    def void(self, session_id: SessionId, epoch: int, cause: bytes, now_ms: int) -> Entry | None:
        """The entry, not posted, that gives a hold's remainder back; ``None`` if none is left."""
        account = hold_account(session_id, epoch)
        remainder = self.balances.of(account)
        if remainder == 0:
            return None
        owner = self._sessions[session_id][epoch].account
        lines = Line(account, debit=remainder), Line(owner, credit=remainder)
        return self._entry(EntryKind.VOID, session_id, cause, lines, now_ms)

    def _settlement_refused(self, command: Settle) -> Refusal | None:
        # An old request is as good as a new one: a stage may have waited out an outage.
        voucher, request = command.voucher, command.request
        if not voucher.network_id == request.network_id == self.network_id:
            return Refusal("network", "the settlement is for another network")
        if request.session_id != voucher.session_id or (
            request.voucher_digest != command.voucher_digest
        ):
            return Refusal("malformed", "the request names another voucher or session")
        payees = [amount.payee for amount in voucher.amounts]
        if len(payees) > PAYEES_MAX or len(set(payees)) != len(payees):
            return Refusal("malformed", "the voucher names too many payees, or one twice")
        holds = self._holds(SessionId(voucher.session_id))
        if not holds or any(hold.account != voucher.account for hold in holds.values()):
            return Refusal("session", "the voucher's account has no reservation in this session")
        if not any(request.payee in hold.caps for hold in holds.values()):
            return Refusal("payee", "nothing is reserved for this payee")
        return None

    def _payment_lines(self, voucher: SessionVoucher) -> tuple[Line, ...]:
        """Per hold one debit and its credits, oldest epoch first.

        What is promised beyond a cap is not paid, and is no reason to leave the other
        payees unpaid: a client cannot spoil their vouchers by overbidding one of them.
        """
        session_id = SessionId(voucher.session_id)
        owed = {
            AccountId(amount.payee): amount.microcredits
            - self.paid(session_id, AccountId(amount.payee))
            for amount in voucher.amounts
        }
        lines: list[Line] = []
        for epoch, hold in sorted(self._holds(session_id).items()):
            if (session_id, epoch) not in self._open:
                continue
            takes = {payee: min(sum_owed, hold.room(payee)) for payee, sum_owed in owed.items()}
            credits = [Line(payee, credit=take) for payee, take in takes.items() if take > 0]
            if credits:
                total = sum(line.credit for line in credits)
                lines += [Line(hold_account(session_id, epoch), debit=total), *credits]
            for line in credits:
                owed[line.account] -= line.credit
        return tuple(lines)

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

    def _expire(self, now_ms: int) -> Accepted:
        due = [key for key, hold in self._open.items() if has_expired(hold, now_ms)]
        entries = [entry for key in due for entry in self._void(*key, b"", now_ms)]
        return Accepted(tuple(entries), (), len(entries))

    def _void(self, session_id: SessionId, epoch: int, cause: bytes, now_ms: int) -> list[Entry]:
        entry = self.void(session_id, epoch, cause, now_ms)
        if entry is None:
            return []
        self.post(entry, None)
        return [entry]

    # State.

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
        self._reservations[hold.reservation] = entry.index
        self._lanes.setdefault((hold.account, reservation.lane), []).append(hold.reservation)

    def _pay(self, entry: Entry) -> None:
        hold = None
        for line in entry.lines:
            if line.debit:
                hold = self._hold_named(line.account)
            elif hold is not None:
                hold.paid[line.account] = hold.paid.get(line.account, 0) + line.credit

    def _give_back(self, line: Line) -> None:
        hold = self._hold_named(line.account)
        if hold.sub_account:
            self.sub_accounts.use(hold.account, hold.sub_account, -line.debit, hold.granted_ms)

    def _hold_named(self, account: AccountId) -> Hold:
        _, session_hex, epoch = account.split(":")
        return self._sessions[SessionId(bytes.fromhex(session_hex))][int(epoch)]

    def _index(self, entry: Entry) -> None:
        touched = {entry.session_id.hex()} if entry.session_id else set()
        if entry.limit is not None:
            touched.add(entry.limit.account)
        if entry.terms is not None:
            touched |= {entry.terms.account, f"{entry.terms.account}/{entry.terms.name}"}
        for line in entry.lines:
            if line.account.startswith(HOLD):
                hold = self._hold_named(line.account)
                touched.add(hold.account)
                if hold.sub_account:
                    touched.add(f"{hold.account}/{hold.sub_account}")
            else:
                touched.add(line.account)
        for account in touched:
            self._history.setdefault(account, []).append(entry.index)
        for line in entry.lines:
            if line.account.startswith(HOLD) and self.balances.of(line.account) == 0:
                _, session_hex, epoch = line.account.split(":")
                self._open.pop((SessionId(bytes.fromhex(session_hex)), int(epoch)), None)
