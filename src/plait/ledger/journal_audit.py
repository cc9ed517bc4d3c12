"""An outsider's check of a whole journal: recompute everything, trust only named keys.

Each entry is decided again from the signed object that caused it, at the time it was
posted: an order by the issuer's key, a reservation and a voucher by the ledger key that the
account's certificate names, releases by the payees'. What the books then post must be the
entry, byte for byte. Whether an authority left something out cannot be seen here.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from plait.envelope import MessageT, decode, digest, open_envelope
from plait.errors import BadSignature, LedgerError, PlaitError
from plait.ledger.balances import Entry, EntryKind, entry_from_payload
from plait.ledger.certs import check_key_cert
from plait.ledger.checkpoint import Checkpoint
from plait.ledger.exposure import NO_JUDGES, Judging, check_judged
from plait.ledger.journal import Accepted, Books, Issue, Reserve, SetLimit, SetSubAccount
from plait.ledger.journal_holds import FRESHNESS_MS, Hold, has_expired, may_release
from plait.ledger.merkle import Tree, leaf_hash
from plait.types import AccountId, Digest, PeerId, SessionId
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    LimitOrder,
    SessionVoucher,
    SettlementRequest,
    SubAccountOrder,
)

_RISE_MS = 60_000


@dataclass(frozen=True, slots=True)
class JournalPage:
    """Some leaves of the log, in order, and the signed objects behind them."""

    entries: tuple[bytes, ...]
    objects: tuple[SignedEnvelope, ...] = ()
    sound: tuple[bool, ...] = ()
    """Which objects' signatures the auditor has found good already; empty: it has looked at none.
    Never from whoever sent the page."""

    def __post_init__(self) -> None:
        if self.sound and len(self.sound) != len(self.objects):
            raise ValueError("a page needs one word per object, or none, about signatures")


@dataclass(frozen=True, slots=True)
class _Objects:
    """The signed objects of a page by digest, and those whose signatures are known to be good."""

    envelopes: Mapping[Digest, SignedEnvelope]
    sound: frozenset[Digest]

    @classmethod
    def of(cls, page: JournalPage) -> "_Objects":
        digests = [digest(envelope.payload) for envelope in page.objects]
        envelopes = dict(zip(digests, page.objects, strict=True))
        flags = dict(zip(digests, page.sound, strict=False))  # the last of a digest counts
        return cls(envelopes, frozenset(one for one, good in flags.items() if good))

    def open(
        self, cause: Digest, message_class: type[MessageT], signer: bytes | None = None
    ) -> MessageT:
        """Verify and decode one of them; see ``open_envelope``."""
        envelope, verified = self.envelopes[cause], cause in self.sound
        return open_envelope(envelope, message_class, signer=signer, verified=verified)

    def of_type(self, name: str) -> Iterator[tuple[Digest, SignedEnvelope]]:
        """Those of one type, by its name in the payload type."""
        suffix = f".{name}.v1"
        return (
            (cause, one)
            for cause, one in self.envelopes.items()
            if one.payload_type.endswith(suffix)
        )


@dataclass(frozen=True, slots=True)
class JournalReport:
    """What the audit of a journal found; ``violations`` is empty when all is well.

    ``balanced``: every entry keeps the books' rules and all balances sum to zero.
    ``tree_size`` and ``root_hash`` are what the journal gives for the signed checkpoint's
    size; ``causes`` is how many entries were decided again from what was signed.
    """

    balanced: bool
    entries: int
    tree_size: int
    root_hash: Digest
    causes: int
    violations: tuple[str, ...]


@dataclass(slots=True)
class JournalAuditor:
    """Takes a journal page by page. ``committee``: several authorities grant together.

    Then dates of reservations and their order in a lane are the committee's business.
    ``judging`` is the network file's rule of escrow.
    """

    network_id: str
    issuer_key: bytes
    committee: bool = False
    judging: Judging = NO_JUDGES
    tree: Tree = field(default_factory=Tree)
    causes: int = 0
    violations: list[str] = field(default_factory=list)
    books: Books = field(init=False)
    _aside: Entry | None = None
    """What must come next: the share of the payment before it."""
    _returns: list[Entry] = field(default_factory=list)
    _payers: dict[SessionId, set[bytes]] = field(default_factory=dict)
    _latest_ms: int = 0
    """The latest date so far."""
    _rises: list[tuple[int, int]] = field(default_factory=list)
    """(index, date) of each entry that is dated a minute or more after the last one here."""

    def __post_init__(self) -> None:
        self.books = Books(self.network_id, self.judging.terms)

    def add(self, page: JournalPage) -> None:
        """Check a page's entries against what was signed."""
        objects = _Objects.of(page)
        for payload in page.entries:
            index = self.tree.append(leaf_hash(payload))
            if self.violations:
                continue  # what follows a false entry can only be false as well
            try:
                self._add(entry_from_payload(payload), objects)
            except PlaitError as error:
                self.violations.append(f"entry {index}: {error}")

    def report(self, checkpoint: Checkpoint, seen_ms: int | None = None) -> JournalReport:
        """What was found; entries beyond the checkpoint, verified already, are newer.

        ``seen_ms`` is when its witnesses saw the checkpoint: what it covers is not of later.
        """
        entries, size = self.tree.size, min(self.tree.size, checkpoint.size)
        violations = list(self.violations)
        if not violations and self._aside is not None:
            violations.append("the share of the last payment is not in escrow")
        balanced = not violations and sum(self.books.balances.all().values()) == 0
        if entries < checkpoint.size:
            violations.append(
                f"the checkpoint covers {checkpoint.size} entries, the journal has {entries}"
            )
        elif self.tree.root(size) != checkpoint.root:
            violations.append("the journal's root is not the one that the checkpoint signs")
        if seen_ms is not None and self._dated(size) > seen_ms + FRESHNESS_MS:
            violations.append("an entry is dated after its witnesses saw it")
        root = self.tree.root(size)
        return JournalReport(balanced, entries, size, root, self.causes, tuple(violations))

    def _note_date(self, entry: Entry) -> None:
        # Holds expire and escrows mature by these dates: an authority may not choose them.
        if entry.posted_ms < self._latest_ms - FRESHNESS_MS:
            raise LedgerError("it is dated before what stands before it")
        if not self._rises or entry.posted_ms >= self._rises[-1][1] + _RISE_MS:
            self._rises.append((entry.index, entry.posted_ms))
        self._latest_ms = max(self._latest_ms, entry.posted_ms)

    def _dated(self, size: int) -> int:
        """The latest date among the first ``size`` entries, to a minute."""
        rises = bisect_left(self._rises, (size, 0))
        return self._rises[rises - 1][1] if rises else 0

    def _add(self, entry: Entry, objects: _Objects) -> None:
        self._note_date(entry)
        if self._aside is not None and entry != self._aside:
            raise LedgerError("the share of the payment before it is not in escrow")
        if self._returns and entry != self._returns[0]:
            raise LedgerError("the escrow of the session before it has not gone back whole")
        if entry.kind is not EntryKind.SETTLE:  # a payment is compared whole
            reason = self.books.balances.violation(entry)
            if reason is not None:
                raise LedgerError(reason)
        match entry.kind:
            case EntryKind.SETTLE:  # first, since most are
                self._settle(entry, objects)
            case EntryKind.ISSUE:
                order = self._caused(entry, objects, IssueOrder, self.issuer_key)
                self._decide(entry, Issue(order, Digest(entry.cause)))
            case EntryKind.LIMIT:
                limit = self._caused(entry, objects, LimitOrder, self.issuer_key)
                self._decide(entry, SetLimit(limit, Digest(entry.cause)))
            case EntryKind.SUB_ACCOUNT:
                self._set_sub_account(entry, objects)
            case EntryKind.RESERVE:
                self._reserve(entry, objects)
            case EntryKind.VOID:
                self._void(entry, objects)
            case EntryKind.ESCROW:
                self._post(entry, self._aside)
                self._aside = None
            case EntryKind.MATURE | EntryKind.FORFEIT:
                self._end_escrow(entry, objects)
        self.causes += 1

    def _caused(
        self,
        entry: Entry,
        objects: _Objects,
        message_class: type[MessageT],
        signer: bytes | None = None,
    ) -> MessageT:
        if entry.cause not in objects.envelopes:
            raise LedgerError("the signed object that caused it is missing")
        return objects.open(Digest(entry.cause), message_class, signer)

    def _decide(self, entry: Entry, command: Issue | SetLimit | SetSubAccount | Reserve) -> None:
        outcome = self.books.apply(command, entry.posted_ms)
        if not isinstance(outcome, Accepted) or outcome.entries != (entry,):
            raise LedgerError("it is not what its cause says")

    def _set_sub_account(self, entry: Entry, objects: _Objects) -> None:
        order = self._caused(entry, objects, SubAccountOrder)
        signer = objects.envelopes[Digest(entry.cause)].signer
        self._check_key(order.terms.account, signer, entry.posted_ms, objects)
        self._decide(entry, SetSubAccount(order, Digest(entry.cause)))

    def _reserve(self, entry: Entry, objects: _Objects) -> None:
        reservation = self._caused(entry, objects, BudgetReservation)
        signer = objects.envelopes[Digest(entry.cause)].signer
        self._check_key(reservation.account, signer, entry.posted_ms, objects)
        command = Reserve(
            reservation,
            Digest(entry.cause),
            certified=self.committee,
            dated=not self.committee,
        )
        self._decide(entry, command)
        self._payers.setdefault(SessionId(entry.session_id), set()).add(signer)

    def _settle(self, entry: Entry, objects: _Objects) -> None:
        voucher = self._caused(entry, objects, SessionVoucher)
        session_id = SessionId(entry.session_id)
        holds = self.books.holds(session_id)
        named = voucher.network_id == self.network_id and voucher.session_id == session_id
        if not named or any(hold.account != voucher.account for hold in holds.values()):
            raise LedgerError("its voucher is of another network, session or account")
        if objects.envelopes[Digest(entry.cause)].signer not in self._payers.get(session_id, ()):
            raise LedgerError("its voucher is not signed by who reserved")
        self._post(entry, self.books.payment(voucher, Digest(entry.cause), entry.posted_ms))
        self._aside = self.books.set_aside(entry)

    def _void(self, entry: Entry, objects: _Objects) -> None:
        session_id = SessionId(entry.session_id)
        epoch = int(entry.lines[0].account.rpartition(":")[2])
        hold = self.books.holds(session_id)[epoch]
        if not entry.cause:
            if not has_expired(hold, entry.posted_ms):
                raise LedgerError("the hold had not expired, and nobody released it")
        elif not hold.caps.keys() <= self._released(entry, hold, objects):
            raise LedgerError("not every payee has released the hold")
        self._post(entry, self.books.void(session_id, epoch, entry.cause, entry.posted_ms))

    def _end_escrow(self, entry: Entry, objects: _Objects) -> None:
        session_id = SessionId(entry.session_id)
        if not self._returns and session_id in self.books.escrows.due(entry.posted_ms):
            self._returns = self.books.returns(session_id, entry.posted_ms)
        if self._returns:
            self._post(entry, self._returns.pop(0))
            return
        if entry.kind is EntryKind.MATURE:
            raise LedgerError("the window of this escrow is not over")
        envelope = objects.envelopes.get(Digest(entry.cause))
        if envelope is None:
            raise LedgerError("the judgement that caused it is missing")
        judged = check_judged(envelope, self.network_id, self.judging)
        if self.books.escrows.forfeited(judged.session_id, judged.payee) is not None:
            raise LedgerError("its judgement was carried out before")
        self._post(entry, self.books.forfeit(judged, entry.posted_ms))

    def _released(self, entry: Entry, hold: Hold, objects: _Objects) -> set[AccountId]:
        if Digest(entry.cause) not in objects.envelopes:
            raise LedgerError("the request that caused it is missing")
        payees = set[AccountId]()
        for cause, envelope in objects.of_type("settlement"):
            request = decode(envelope.payload, SettlementRequest)
            fits = request.network_id == self.network_id and request.release
            if request.session_id == entry.session_id and fits and may_release(hold, request):
                objects.open(cause, SettlementRequest)
                self._check_key(request.payee, envelope.signer, entry.posted_ms, objects)
                payees.add(AccountId(request.payee))
        return payees

    def _post(self, entry: Entry, expected: Entry | None) -> None:
        if entry != expected:
            raise LedgerError("it is not what its cause says")
        self.books.post(entry, None)

    def _check_key(self, peer: str, key: bytes, at_ms: int, objects: _Objects) -> None:
        """Raises ``LedgerError`` unless a certificate says that the key was the peer's then."""
        for _, envelope in objects.of_type("node-key-cert"):
            cert = decode(envelope.payload, NodeKeyCert)
            if (cert.peer_id, cert.ledger_key) == (peer, key) and at_ms < cert.expires_ms:
                with suppress(BadSignature):  # another may be valid at this time
                    check_key_cert(envelope, self.network_id, at_ms, PeerId(peer))
                    return
        raise LedgerError(f"no certificate says that its signer is {peer}")


def audit_journal(
    auditor: JournalAuditor,
    pages: Iterable[JournalPage],
    checkpoint: Checkpoint,
    seen_ms: int | None = None,
) -> JournalReport:
    """Check a journal from its first entry on. ``checkpoint`` is verified already, and the time
    at which witnesses saw it, if there are any."""
    for page in pages:
        auditor.add(page)
    return auditor.report(checkpoint, seen_ms)
