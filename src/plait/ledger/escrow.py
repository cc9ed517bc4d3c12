"""Escrow: a share of what a payee is paid stands aside while an audit may still expose it.

Each payment is followed by an ESCROW entry that moves the share from the payees to accounts of
their own, ``escrow:<session>:<payee>``. A window later they get it back (MATURE). Whoever a
quorum of the network file's judges finds exposed meanwhile does not: all that then stands in
escrow for it goes back to the clients who paid (FORFEIT), the harmed session's at once and the
other sessions' when they would have matured. State follows from the entries alone. Pure.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from plait.ledger.balances import Entry, EntryKind, Line, escrow_account, escrow_of
from plait.types import AccountId, Digest, SessionId

MATURED_AT_ONCE_MAX = 256
"""Sessions whose escrow goes back in one step."""


@dataclass(frozen=True, slots=True)
class EscrowTerms:
    """What a network file says: the share in percent, and how long it stands aside."""

    percent: int = 0
    window_ms: int = 0

    def share(self, paid: int) -> int:
        """What stands aside of so many microcredits: rounded up, so that every payee risks some."""
        return -(-paid * self.percent // 100)


NO_ESCROW = EscrowTerms()


@dataclass(frozen=True, slots=True)
class Exposure:
    """A judgement: until when escrow is forfeited by it, and the digest of what was signed."""

    at_ms: int
    cause: Digest


@dataclass(slots=True)
class _Standing:
    """One session's escrow: per payee, and when the last of it came."""

    last_ms: int
    amounts: dict[AccountId, int]


class Escrows:
    """What stands in escrow. ``note`` is told of each entry that moves any, in order."""

    def __init__(self, terms: EscrowTerms = NO_ESCROW) -> None:
        self.terms = terms
        self._standing: OrderedDict[SessionId, _Standing] = OrderedDict()
        self._totals: Counter[AccountId] = Counter()
        self._exposed: dict[AccountId, Exposure] = {}
        self._forfeited: dict[tuple[SessionId, AccountId], Digest] = {}

    def of(self, payee: AccountId) -> int:
        """All that stands in escrow for a payee, microcredits."""
        return self._totals[payee]

    def standing(self, session_id: SessionId, payee: AccountId) -> int:
        """The same of one session."""
        found = self._standing.get(session_id)
        return found.amounts.get(payee, 0) if found is not None else 0

    def forfeited(self, session_id: SessionId, payee: AccountId) -> Digest | None:
        """The judgement by which a payee's escrow of a session was forfeited, if it was.

        One judgement per session and payee counts, so that none is brought twice.
        """
        return self._forfeited.get((session_id, payee))

    def set_aside(self, payment: Entry, paid: Mapping[AccountId, int]) -> tuple[Line, ...]:
        """The lines that put aside the share of a payment; none if it is nothing.

        ``paid`` is what each payee has been paid in the session, this payment included: the
        share is that of the sum, so that it does not depend on how often a payee settles.
        """
        lines: list[Line] = []
        if not self.terms.percent:
            return ()
        for payee, credit in _credits(payment).items():
            share = self.terms.share(paid[payee]) - self.terms.share(paid[payee] - credit)
            if share:
                account = escrow_account(payment.session_id, payee)
                lines += [Line(payee, debit=share), Line(account, credit=share)]
        return tuple(lines)

    def due(self, now_ms: int) -> Iterator[SessionId]:
        """The sessions whose window is over, oldest first, some at a time."""
        for session_id, found in list(self._first()):
            if found.last_ms + self.terms.window_ms > now_ms:
                return
            yield session_id

    def returns(self, session_id: SessionId, payer: AccountId, blank: Entry) -> list[Entry]:
        """The entries, numbered on from ``blank``'s, that end a session's escrow."""
        found = self._standing[session_id]
        lines: list[Line] = []
        forfeits: list[Entry] = []
        for payee, amount in found.amounts.items():
            exposure = self._exposed.get(payee)
            if exposure is not None and found.last_ms <= exposure.at_ms:
                forfeits.append(self.forfeit(session_id, payee, payer, blank, exposure.cause))
            else:
                account = escrow_account(session_id, payee)
                lines += [Line(account, debit=amount), Line(payee, credit=amount)]
        entries = forfeits
        if lines:
            entries = [replace(blank, kind=EntryKind.MATURE, lines=tuple(lines)), *forfeits]
        return [replace(one, index=blank.index + n) for n, one in enumerate(entries)]

    def forfeit(
        self,
        session_id: SessionId,
        payee: AccountId,
        payer: AccountId,
        blank: Entry,
        cause: Digest,
    ) -> Entry:
        """The entry that gives a payee's escrow of a session to who paid."""
        amount = self._standing[session_id].amounts[payee]
        account = escrow_account(session_id, payee)
        lines = Line(account, debit=amount), Line(payer, credit=amount)
        return replace(blank, kind=EntryKind.FORFEIT, cause=cause, lines=lines)

    def note(self, entry: Entry) -> None:
        """Follow an ESCROW, MATURE or FORFEIT entry."""
        session_id = SessionId(entry.session_id)
        found = self._standing.setdefault(session_id, _Standing(entry.posted_ms, {}))
        for line in entry.lines:
            payee = escrow_of(line.account)
            if payee is None:
                continue
            amount = found.amounts.get(payee, 0) + line.credit - line.debit
            self._totals[payee] += line.credit - line.debit
            if amount:
                found.amounts[payee] = amount
            else:
                found.amounts.pop(payee, None)
            if not self._totals[payee]:
                del self._totals[payee]
            if entry.kind is EntryKind.FORFEIT:
                self._expose(payee, Exposure(entry.posted_ms, Digest(entry.cause)))
                self._forfeited[session_id, payee] = Digest(entry.cause)
        if entry.kind is EntryKind.ESCROW:
            found.last_ms = max(found.last_ms, entry.posted_ms)
            self._standing.move_to_end(session_id)
        if not found.amounts:
            del self._standing[session_id]

    def _expose(self, payee: AccountId, exposure: Exposure) -> None:
        """The first entry of a judgement dates it; those that follow it do not."""
        known = self._exposed.get(payee)
        if known is None or known.cause != exposure.cause:
            self._exposed[payee] = exposure

    def _first(self) -> Iterator[tuple[SessionId, _Standing]]:
        for number, item in enumerate(self._standing.items()):
            if number == MATURED_AT_ONCE_MAX:
                return
            yield item


def _credits(payment: Entry) -> dict[AccountId, int]:
    credits: dict[AccountId, int] = {}
    for line in payment.lines:
        if line.credit:
            credits[line.account] = credits.get(line.account, 0) + line.credit
    return credits
