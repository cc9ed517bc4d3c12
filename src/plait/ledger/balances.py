"""Journal entries and the balances that follow from them alone.

Every entry balances, moves credit only between the accounts its kind may touch, is caused
once, and leaves no account below its limit: zero, or as far below as the issuer's last
LIMIT says. Only ``issuer:equity`` has none. A balance is credits minus debits.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from plait.envelope import decode, encode
from plait.errors import LedgerError
from plait.ledger.sub_accounts import SubAccount, terms_from, terms_message
from plait.types import U64_MAX, AccountId
from plait.v1.ledger_pb2 import AccountLimit, JournalEntry, JournalLine

EQUITY = AccountId("issuer:equity")
"""The counterpart of all issued credit."""

HOLD = "hold:"
ESCROW = "escrow:"


class EntryKind(IntEnum):
    """Why an entry was posted; the numbers of the protocol."""

    ISSUE = 1
    RESERVE = 2
    SETTLE = 3
    VOID = 4
    LIMIT = 5
    SUB_ACCOUNT = 6
    ESCROW = 7
    MATURE = 8
    FORFEIT = 9


_KINDS: dict[int, EntryKind] = {int(kind): kind for kind in EntryKind}


class Line(NamedTuple):
    """One side of an entry: exactly one of debit and credit is above zero."""

    account: AccountId
    debit: int = 0
    credit: int = 0


@dataclass(frozen=True, slots=True)
class Limit:
    """How far below zero an account may stand, microcredits; 0 is prepaid."""

    account: AccountId
    credit_limit: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One leaf of the log; ``cause`` is empty for a void by expiry."""

    network_id: str
    index: int
    kind: EntryKind
    session_id: bytes
    cause: bytes
    lines: tuple[Line, ...]
    posted_ms: int
    limit: Limit | None = None
    """Of a LIMIT, which has no lines."""
    terms: SubAccount | None = None
    """Of a SUB_ACCOUNT, which has no lines."""
    sub_account: str = ""
    """Of a RESERVE: the name of the sub-account that it draws on."""

    @property
    def payload(self) -> bytes:
        """The bytes that the log hashes."""
        return encode(entry_message(self))


def hold_account(session_id: bytes, epoch: int) -> AccountId:
    """Name of the account that holds a session's credit for one epoch."""
    return AccountId(f"{HOLD}{session_id.hex()}:{epoch}")


def escrow_account(session_id: bytes, payee: AccountId) -> AccountId:
    """Name of the account in which a share of a payee's pay for a session stands."""
    return AccountId(f"{ESCROW}{session_id.hex()}:{payee}")


def escrow_of(account: AccountId) -> AccountId | None:
    """Whose escrow an account is; ``None`` for another kind of account."""
    return AccountId(account.rpartition(":")[2]) if account.startswith(ESCROW) else None


def entry_message(entry: Entry) -> JournalEntry:
    """The protocol's form of an entry."""
    return JournalEntry(
        network_id=entry.network_id,
        index=entry.index,
        kind=int(entry.kind),  # type: ignore[arg-type]
        session_id=entry.session_id,
        cause_digest=entry.cause,
        lines=[
            JournalLine(account=line.account, debit=line.debit, credit=line.credit)
            for line in entry.lines
        ],
        posted_ms=entry.posted_ms,
        limit=_limit_message(entry.limit),
        terms=None if entry.terms is None else terms_message(entry.terms),
        sub_account=entry.sub_account,
    )


def _limit_message(limit: Limit | None) -> AccountLimit | None:
    if limit is None:
        return None
    return AccountLimit(account=limit.account, credit_limit=limit.credit_limit)


def entry_from_payload(payload: bytes) -> Entry:
    """Decode a leaf; raises ``RemoteProtocolError`` or, for an unknown kind, ``LedgerError``."""
    message = decode(payload, JournalEntry)
    try:
        kind = _KINDS[message.kind]
        terms = terms_from(message.terms) if message.HasField("terms") else None
    except (KeyError, ValueError) as error:
        raise LedgerError(f"entry {message.index} is of no known kind: {error}") from error
    return Entry(
        network_id=message.network_id,
        index=message.index,
        kind=kind,
        session_id=message.session_id,
        cause=message.cause_digest,
        lines=tuple(
            [Line(AccountId(line.account), line.debit, line.credit) for line in message.lines]
        ),
        posted_ms=message.posted_ms,
        limit=Limit(AccountId(message.limit.account), message.limit.credit_limit)
        if message.HasField("limit")
        else None,
        terms=terms,
        sub_account=message.sub_account,
    )


_MANY_TIMES = frozenset(
    {
        EntryKind.SETTLE,
        EntryKind.VOID,
        EntryKind.ESCROW,
        EntryKind.MATURE,
        EntryKind.FORFEIT,
    }
)
"""What one cause, or none, may be followed by more than once."""


class Balances:
    """Balances derived from entries alone: what an auditor recomputes from an export."""

    def __init__(self, network_id: str) -> None:
        self.network_id = network_id
        self.size = 0
        self._balances: dict[AccountId, int] = {}
        self._limits: dict[AccountId, int] = {}
        self._limits_total = 0
        self._booked: set[tuple[EntryKind, bytes]] = set()

    def of(self, account: AccountId) -> int:
        """Credits minus debits, microcredits."""
        return self._balances.get(account, 0)

    def limit(self, account: AccountId) -> int:
        """How far below zero the account may stand, microcredits."""
        return U64_MAX if account == EQUITY else self._limits.get(account, 0)

    def all(self) -> dict[AccountId, int]:
        """Every account that is not at zero."""
        return {account: balance for account, balance in self._balances.items() if balance}

    def violation(self, entry: Entry) -> str | None:
        """Which rule of the books the next entry would break, if any."""
        return self._violation(entry, self._after(entry))

    def _violation(self, entry: Entry, after: dict[AccountId, int]) -> str | None:
        if entry.network_id != self.network_id or entry.index != self.size:
            return "it is not the next entry of this network"
        debits = credits = 0
        for _, debit, credit in entry.lines:
            if (debit == 0) == (credit == 0):
                return "a line is not exactly one of debit and credit"
            debits += debit
            credits += credit
        if debits != credits:
            return "debits and credits differ"
        if not _has_shape(entry):
            return f"its accounts do not fit the kind {entry.kind.name}"
        once = entry.kind not in _MANY_TIMES
        if once and (len(entry.cause) != 32 or (entry.kind, entry.cause) in self._booked):
            return "its cause is missing or booked twice"
        if entry.limit and self.of(entry.limit.account) < -entry.limit.credit_limit:
            return f"{entry.limit.account} stands below its new limit already"
        if self._credit_after(entry) > U64_MAX:
            return "it would make more credit than can exist"
        for account, balance in after.items():
            if not -self.limit(account) <= balance <= U64_MAX:
                return f"{account} would stand at {balance}"
        return None

    def post(self, entry: Entry) -> None:
        """Add an entry; raises ``LedgerError`` if it breaks a rule."""
        after = self._after(entry)
        reason = self._violation(entry, after)
        if reason is not None:
            raise LedgerError(f"entry {entry.index} is not valid: {reason}")
        for account, balance in after.items():
            if balance or not account.startswith((HOLD, ESCROW)):
                self._balances[account] = balance
            else:  # it is of one session, and seldom moves again
                self._balances.pop(account, None)
        if entry.limit is not None:
            self._limits_total += entry.limit.credit_limit - self.limit(entry.limit.account)
            self._limits[entry.limit.account] = entry.limit.credit_limit
        self._booked.add((entry.kind, entry.cause))
        self.size += 1

    def _credit_after(self, entry: Entry) -> int:
        """All credit there may be after an entry: no balance can ever be above it."""
        limits, issued = self._limits_total, 0
        if entry.limit is not None:
            limits += entry.limit.credit_limit - self.limit(entry.limit.account)
        for account, debit, _ in entry.lines:
            if account == EQUITY:
                issued += debit
        return issued - self.of(EQUITY) + limits

    def _after(self, entry: Entry) -> dict[AccountId, int]:
        changed: dict[AccountId, int] = {}
        for account, debit, credit in entry.lines:
            before = changed.get(account, self.of(account))
            changed[account] = before + credit - debit
        return changed


def _has_shape(entry: Entry) -> bool:
    """Whether the accounts of an entry's debits and credits are those its kind moves between."""
    kind = entry.kind
    if (entry.limit is not None) != (kind is EntryKind.LIMIT):
        return False
    if (entry.terms is not None) != (kind is EntryKind.SUB_ACCOUNT):
        return False
    if entry.sub_account and kind is not EntryKind.RESERVE:
        return False
    hold = f"{HOLD}{entry.session_id.hex()}:"
    debits = [account for account, debit, _ in entry.lines if debit]
    credits = [account for account, _, credit in entry.lines if credit]
    match kind:
        case EntryKind.SETTLE:  # first, since most are
            paid = all(account.startswith(hold) for account in debits)
            return paid and bool(credits) and ":" not in "".join(credits)
        case EntryKind.SUB_ACCOUNT:
            return entry.terms is not None and ":" not in entry.terms.account and not entry.lines
        case EntryKind.LIMIT:
            return entry.limit is not None and ":" not in entry.limit.account and not entry.lines
        case EntryKind.ISSUE:
            return debits == [EQUITY] and len(credits) == 1 and ":" not in credits[0]
        case EntryKind.RESERVE:
            one_each = len(debits) == len(credits) == 1
            return one_each and ":" not in debits[0] and credits[0].startswith(hold)
        case EntryKind.VOID:
            one_each = len(debits) == len(credits) == 1
            return one_each and debits[0].startswith(hold) and ":" not in credits[0]
        case EntryKind.ESCROW:
            return _in_pairs(entry, [line for line in entry.lines if line.debit])
        case EntryKind.MATURE:
            return not entry.cause and _in_pairs(
                entry, [line for line in entry.lines if line.credit]
            )
        case EntryKind.FORFEIT:
            escrow = f"{ESCROW}{entry.session_id.hex()}:"
            one_each = len(debits) == len(credits) == 1 and len(entry.cause) == 32
            return one_each and debits[0].startswith(escrow) and ":" not in credits[0]


def _in_pairs(entry: Entry, payees: list[Line]) -> bool:
    """Whether each payee's line is matched by one of its escrow of the session."""
    others = {line.account: line for line in entry.lines if line not in payees}
    matched = [others.get(escrow_account(entry.session_id, line.account)) for line in payees]
    return (
        len(payees) == len(others) == len(entry.lines) - len(payees) > 0
        and not any(":" in line.account for line in payees)
        and all(
            other is not None and (other.debit, other.credit) == (line.credit, line.debit)
            for line, other in zip(payees, matched, strict=True)
        )
    )
