"""Statement and invoice of an account for a period, from the log's entries alone.

The same entries, account and period give the same bytes, whoever asks and whenever. A document
names the part of the log that it was made from (``Coverage``), so that anybody can make it again
from a later, larger one. Amounts are decimal strings of microcredits, and a period holds the
entries with ``from_ms <= posted_ms < until_ms``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plait.ledger.balances import HOLD, Entry, EntryKind
from plait.ledger.canonical import JsonValue, encode_canonical
from plait.ledger.journal_holds import FRESHNESS_MS
from plait.types import AccountId, Digest


@dataclass(frozen=True, slots=True)
class Period:
    """Half-open, in milliseconds since 1970."""

    from_ms: int
    until_ms: int

    def holds(self, entry: Entry) -> bool:
        """Whether an entry belongs to it."""
        return self.from_ms <= entry.posted_ms < self.until_ms


@dataclass(frozen=True, slots=True)
class Coverage:
    """The first entries of a log that a document was made from, and how far they reach.

    What was posted before ``complete_until_ms`` is among them: the dates of a log may fall by
    ``FRESHNESS_MS``, or its audit fails. 0 without entries.
    """

    origin: str
    tree_size: int
    root: Digest
    complete_until_ms: int

    @classmethod
    def of(cls, entries: Sequence[Entry], origin: str, root: Digest) -> "Coverage":
        """Of all of some first entries, whose root is known already."""
        latest_ms = max((entry.posted_ms for entry in entries), default=0)
        return cls(origin, len(entries), root, max(0, latest_ms - FRESHNESS_MS))

    def covers(self, period: Period) -> bool:
        """Whether all of a period is there."""
        return period.until_ms <= self.complete_until_ms


@dataclass(frozen=True, slots=True)
class Movement:
    """What one entry did to the account's balance, microcredits."""

    index: int
    posted_ms: int
    kind: EntryKind
    session_id: bytes
    change: int
    balance: int


@dataclass(frozen=True, slots=True)
class Statement:
    """Balances and movements of an account. What stands in holds is not in the balance."""

    account: AccountId
    period: Period
    opening: int
    closing: int
    movements: tuple[Movement, ...]
    sub_account: str = ""
    """Of this share of the account alone: then a balance is what it has used, below zero."""

    def encoded(self, coverage: Coverage) -> bytes:
        """The document: canonical JSON. It was made from the entries of ``coverage``."""
        return _document(
            "plait.statement.v2",
            self.account,
            self.period,
            coverage,
            opening_balance=str(self.opening),
            closing_balance=str(self.closing),
            **_named(self.sub_account),
            movements=[
                {
                    "index": movement.index,
                    "posted_ms": movement.posted_ms,
                    "kind": movement.kind.name.lower(),
                    "session_id": movement.session_id.hex(),
                    "change": str(movement.change),
                    "balance": str(movement.balance),
                }
                for movement in self.movements
            ],
        )


@dataclass(frozen=True, slots=True)
class Charge:
    """What a payee was paid for a session in the period, microcredits."""

    session_id: bytes
    payee: AccountId
    first_index: int
    last_index: int
    amount: int


@dataclass(frozen=True, slots=True)
class Invoice:
    """What was charged to an account: each session and payee, in the order of the log."""

    account: AccountId
    period: Period
    charges: tuple[Charge, ...]
    sub_account: str = ""
    """Of this share of the account alone."""

    @property
    def total(self) -> int:
        """All charges together, microcredits."""
        return sum(charge.amount for charge in self.charges)

    def encoded(self, coverage: Coverage) -> bytes:
        """The document: canonical JSON. It was made from the entries of ``coverage``."""
        return _document(
            "plait.invoice.v2",
            self.account,
            self.period,
            coverage,
            **_named(self.sub_account),
            total=str(self.total),
            charges=[
                {
                    "session_id": charge.session_id.hex(),
                    "payee": charge.payee,
                    "first_index": charge.first_index,
                    "last_index": charge.last_index,
                    "amount": str(charge.amount),
                }
                for charge in self.charges
            ],
        )


def make_statement(
    entries: Iterable[Entry], account: AccountId, period: Period, sub_account: str = ""
) -> Statement:
    """From all entries of the log, from the first on."""
    opening = 0
    held: set[AccountId] = set()
    movements: list[Movement] = []
    for entry in entries:
        if sub_account and not _draws_on(entry, sub_account, held):
            continue
        change = sum(line.credit - line.debit for line in entry.lines if line.account == account)
        if entry.posted_ms < period.from_ms:
            opening += change
        elif change and period.holds(entry):
            running = (movements[-1].balance if movements else opening) + change
            movements.append(
                Movement(
                    entry.index, entry.posted_ms, entry.kind, entry.session_id, change, running
                )
            )
    closing = movements[-1].balance if movements else opening
    return Statement(account, period, opening, closing, tuple(movements), sub_account)


def _draws_on(entry: Entry, sub_account: str, held: set[AccountId]) -> bool:
    """Whether an entry fills a hold for a share of an account, or gives back from one.

    ``held`` gathers those holds. They may be of other accounts' shares of this name, whose
    entries do not change the account.
    """
    if entry.kind is EntryKind.RESERVE and entry.sub_account == sub_account:
        held.add(entry.lines[1].account)
        return True
    return entry.kind is EntryKind.VOID and entry.lines[0].account in held


def make_invoice(
    entries: Iterable[Entry], account: AccountId, period: Period, sub_account: str = ""
) -> Invoice:
    """From all entries of the log, from the first on."""
    held: set[AccountId] = set()
    charges: dict[tuple[bytes, AccountId], Charge] = {}
    for entry in entries:
        own = not sub_account or entry.sub_account == sub_account
        if entry.kind is EntryKind.RESERVE and entry.lines[0].account == account and own:
            held.add(entry.lines[1].account)
        if entry.kind is EntryKind.SETTLE and period.holds(entry):
            own = False
            for line in entry.lines:
                if line.account.startswith(HOLD):
                    own = line.account in held
                elif own:
                    key = (entry.session_id, line.account)
                    charges[key] = _charged(charges.get(key), entry, line.account, line.credit)
    return Invoice(account, period, tuple(charges.values()), sub_account)


def _charged(before: Charge | None, entry: Entry, payee: AccountId, amount: int) -> Charge:
    first = before.first_index if before else entry.index
    return Charge(
        entry.session_id, payee, first, entry.index, amount + (before.amount if before else 0)
    )


def _named(sub_account: str) -> dict[str, JsonValue]:
    return {"sub_account": sub_account} if sub_account else {}


def _document(
    name: str, account: str, period: Period, coverage: Coverage, **members: JsonValue
) -> bytes:
    return encode_canonical(
        {
            "format": name,
            "account": account,
            "from_ms": period.from_ms,
            "until_ms": period.until_ms,
            "log": {
                "origin": coverage.origin,
                "tree_size": coverage.tree_size,
                "root_hash": coverage.root.hex(),
            },
            "complete": coverage.covers(period),
            "complete_until_ms": coverage.complete_until_ms,
            **members,
        }
    )
