"""The audit of a journal: every entry against its signed cause, and every lie is named."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from plait.envelope import digest, pae, seal
from plait.errors import BadSignature, RemoteProtocolError
from plait.identity import SigningKey, verify
from plait.ledger.balances import (
    EQUITY,
    Entry,
    EntryKind,
    Limit,
    Line,
    entry_from_payload,
    hold_account,
)
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import Checkpoint
from plait.ledger.journal import (
    FRESHNESS_MS,
    GRACE_MS,
    Accepted,
    Books,
    Command,
    Decline,
    Expire,
    Issue,
    Reserve,
    SetLimit,
    Settle,
)
from plait.ledger.journal_audit import JournalAuditor, JournalPage, JournalReport, audit_journal
from plait.ledger.journal_file import journal_lines, read_journal
from plait.ledger.merkle import EMPTY_ROOT, leaf_hash, root_of
from plait.ledger.statement import Coverage, Period, make_invoice, make_statement
from plait.testing.accounting import key_of
from plait.types import AccountId, SessionId
from plait.v1 import ledger_pb2 as pb
from plait.v1.identity_pb2 import SignedEnvelope

NETWORK = "net-1"
NOW = 1_700_000_000_000
TTL_MS = 60_000
CLIENT, ALICE, BOB = (AccountId(key_of(name).peer_id) for name in ("client", "alice", "bob"))
SESSION = SessionId(b"s" * 16)
PAYEES = {ALICE: "alice", BOB: "bob"}


def ledger_key(name: str) -> SigningKey:
    return key_of(f"{name} ledger")


def cert_of(name: str, not_before_ms: int = NOW) -> SignedEnvelope:
    return make_key_cert(key_of(name), ledger_key(name).public, NETWORK, not_before_ms, 10**7, 1)


CERTS = tuple(cert_of(name) for name in ("client", "alice", "bob"))


@dataclass
class World:
    """Honest books and what was signed for them."""

    books: Books = field(default_factory=lambda: Books(NETWORK))
    entries: list[Entry] = field(default_factory=list)
    objects: list[SignedEnvelope] = field(default_factory=lambda: [*CERTS])
    orders: int = 0

    def run(self, command: Command, *objects: SignedEnvelope, now_ms: int = NOW) -> Accepted:
        outcome = self.books.apply(command, now_ms)
        assert isinstance(outcome, Accepted), outcome
        self.entries += outcome.entries
        self.objects += objects
        return outcome

    def issue(self, account: str = CLIENT, amount: int = 1_000, now_ms: int = NOW) -> None:
        self.orders += 1
        order = pb.IssueOrder(
            network_id=NETWORK,
            account=account,
            amount=amount,
            order_id=b"%d" % self.orders,
            issued_ms=NOW,
        )
        envelope = seal(key_of("issuer"), order)
        self.run(Issue(order, digest(envelope.payload)), envelope, now_ms=now_ms)

    def limit(self, credit_limit: int, account: str = CLIENT) -> None:
        self.orders += 1
        order = pb.LimitOrder(
            network_id=NETWORK,
            account=account,
            credit_limit=credit_limit,
            order_id=b"%d" % self.orders,
            issued_ms=NOW,
        )
        envelope = seal(key_of("issuer"), order)
        self.run(SetLimit(order, digest(envelope.payload)), envelope)

    def reserve(self, number: int = 1, session: bytes = SESSION) -> None:
        reservation = pb.BudgetReservation(
            network_id=NETWORK,
            account=CLIENT,
            sequence=number,
            session_id=session,
            amount=100,
            caps=[pb.PayeeAmount(payee=payee, microcredits=50) for payee in PAYEES],
            issued_ms=NOW,
            expires_ms=NOW + TTL_MS,
        )
        envelope = seal(ledger_key("client"), reservation)
        self.run(Reserve(reservation, digest(envelope.payload)), envelope)

    def settle(self, amounts: dict[AccountId, int], payee: AccountId = ALICE, **more: Any) -> None:
        voucher = pb.SessionVoucher(
            network_id=NETWORK,
            session_id=more.get("session", SESSION),
            account=CLIENT,
            amounts=[pb.PayeeAmount(payee=p, microcredits=m) for p, m in amounts.items()],
        )
        shown = seal(ledger_key("client"), voucher)
        request = self.request(payee, digest(shown.payload), more.get("session", SESSION))
        request.release = more.get("release", False)
        asked = seal(ledger_key(PAYEES[payee]), request)
        command = Settle(voucher, digest(shown.payload), request, digest(asked.payload))
        self.run(command, asked, shown)

    def decline(self, payee: AccountId, session: bytes = SESSION) -> Accepted:
        request = self.request(payee, b"", session)
        request.release = True
        asked = seal(ledger_key(PAYEES[payee]), request)
        return self.run(Decline(request, digest(asked.payload)), asked)

    def request(self, payee: str, voucher: bytes, session: bytes) -> pb.SettlementRequest:
        return pb.SettlementRequest(
            network_id=NETWORK,
            session_id=session,
            payee=payee,
            voucher_digest=voucher,
            issued_ms=NOW,
        )

    def audit(
        self, entries: Sequence[Entry] | None = None, objects: Iterable[SignedEnvelope] = ()
    ) -> JournalReport:
        entries = self.entries if entries is None else entries
        leaves = tuple(entry.payload for entry in entries)
        signed = Checkpoint("log", len(leaves), root_of(map(leaf_hash, leaves)))
        page = JournalPage(leaves, tuple(objects or self.objects))
        looked_at = replace(page, sound=tuple(map(is_sound, page.objects)))
        report, same = (
            audit_journal(JournalAuditor(NETWORK, key_of("issuer").public), [one], signed)
            for one in (page, looked_at)
        )
        assert same == report  # whoever looked at the signatures
        return report


def is_sound(envelope: SignedEnvelope) -> bool:
    try:
        verify(envelope.signer, envelope.signature, pae(envelope.payload_type, envelope.payload))
    except BadSignature:
        return False
    return True


@pytest.fixture
def world() -> World:
    """An entry of each kind and every way to end a hold."""
    world = World()
    world.issue()
    world.limit(200)
    world.reserve(1)
    world.settle({ALICE: 10, BOB: 5})
    world.settle({ALICE: 20, BOB: 5}, ALICE, release=True)
    world.decline(BOB)
    world.reserve(2, b"t" * 16)
    world.run(Expire(), now_ms=NOW + TTL_MS + GRACE_MS)
    return world


def test_an_honest_journal(world: World) -> None:
    kinds = [entry.kind.name for entry in world.entries]
    assert kinds == ["ISSUE", "LIMIT", "RESERVE", "SETTLE", "SETTLE", "VOID", "RESERVE", "VOID"]
    report = world.audit()
    assert report.violations == ()
    assert (report.balanced, report.entries, report.causes) == (True, 8, 8)


def reindexed(entries: Iterable[Entry]) -> list[Entry]:
    return [replace(entry, index=index) for index, entry in enumerate(entries)]


def invented(
    world: World, kind: EntryKind, *lines: Line, cause: bytes, session: bytes = SESSION
) -> Entry:
    return Entry(NETWORK, len(world.entries), kind, session, cause, lines, NOW)


def unsigned_issue(world: World) -> list[Entry]:
    lines = Line(EQUITY, 500), Line(BOB, 0, 500)
    return [*world.entries, invented(world, EntryKind.ISSUE, *lines, cause=bytes(32), session=b"")]


def more_than_ordered(world: World) -> list[Entry]:
    lines = Line(EQUITY, 1_001), Line(CLIENT, 0, 1_001)
    return [replace(world.entries[0], lines=lines), *world.entries[1:]]


def another_limit(world: World) -> list[Entry]:
    changed = replace(world.entries[1], limit=Limit(CLIENT, 10**6))
    return [world.entries[0], changed, *world.entries[2:]]


def void_before_expiry(world: World) -> list[Entry]:
    void = replace(world.entries[7], posted_ms=NOW + TTL_MS + GRACE_MS - 1)
    return [*world.entries[:7], void]


def void_without_all_releases(world: World) -> list[Entry]:
    hold = hold_account(b"t" * 16, 0)
    cause = world.entries[5].cause
    lines = Line(hold, 100), Line(CLIENT, 0, 100)
    void = Entry(NETWORK, 7, EntryKind.VOID, b"t" * 16, cause, lines, NOW)
    return [*world.entries[:7], void]


def paid_more(world: World) -> list[Entry]:
    hold = hold_account(SESSION, 0)
    lines = Line(hold, 16), Line(ALICE, 0, 11), Line(BOB, 0, 5)
    return [*world.entries[:3], replace(world.entries[3], lines=lines)]


def paid_twice(world: World) -> list[Entry]:
    return reindexed([*world.entries[:4], world.entries[3], *world.entries[4:]])


def reserved_at_another_time(world: World) -> list[Entry]:
    late = replace(world.entries[2], posted_ms=NOW + 10**6)
    return [*world.entries[:2], late]


def left_out(world: World) -> list[Entry]:
    return reindexed([*world.entries[:2], *world.entries[3:]])


@pytest.mark.parametrize(
    "lie",
    [
        unsigned_issue,
        more_than_ordered,
        another_limit,
        void_before_expiry,
        void_without_all_releases,
        paid_more,
        paid_twice,
        reserved_at_another_time,
        left_out,
    ],
)
def test_an_authority_that_lies_is_named(world: World, lie: Callable[[World], list[Entry]]) -> None:
    report = world.audit(lie(world))
    assert not report.balanced
    assert report.violations[0].startswith("entry ")


def resigned(envelope: SignedEnvelope, key: SigningKey) -> SignedEnvelope:
    """The same payload by another key."""
    signature = key.sign(pae(envelope.payload_type, envelope.payload))
    return SignedEnvelope(
        payload_type=envelope.payload_type,
        payload=envelope.payload,
        signer=key.public,
        signature=signature,
    )


@pytest.mark.parametrize(
    "kind", ["issue-order", "limit-order", "reservation", "voucher", "settlement"]
)
def test_every_object_needs_its_own_signer(world: World, kind: str) -> None:
    stranger = key_of("stranger")
    forged = [
        resigned(item, stranger) if f".{kind}." in item.payload_type else item
        for item in world.objects
    ]
    assert not world.audit(objects=forged).balanced
    broken = [
        SignedEnvelope(
            payload_type=item.payload_type,
            payload=item.payload,
            signer=item.signer,
            signature=bytes(64),
        )
        if f".{kind}." in item.payload_type
        else item
        for item in world.objects
    ]
    assert not world.audit(objects=broken).balanced
    absent = [item for item in world.objects if f".{kind}." not in item.payload_type]
    assert not world.audit(objects=absent).balanced


def test_a_certificate_must_be_there_and_valid_then(world: World) -> None:
    without = [item for item in world.objects if "node-key-cert" not in item.payload_type]
    assert "no certificate" in world.audit(objects=without).violations[0]
    later = [cert_of(name, NOW + 10**6) for name in ("client", "alice", "bob")]
    assert "no certificate" in world.audit(objects=[*without, *later]).violations[0]
    assert world.audit(objects=[*without, *later, *CERTS]).violations == ()
    foreign = make_key_cert(key_of("client"), ledger_key("client").public, "net-2", NOW, 10**7, 1)
    assert world.audit(objects=[*without, foreign, *CERTS[1:]]).violations


def test_a_journal_file_holds_all_of_it(world: World) -> None:
    pages = [
        JournalPage(tuple(e.payload for e in world.entries[:3]), tuple(world.objects)),
        JournalPage(tuple(e.payload for e in world.entries[3:]), tuple(world.objects)),
    ]
    lines = [line for page in pages for line in journal_lines(page, 7, "note\n7\n")]
    read = read_journal(lines)
    assert read.pages == tuple(pages)
    assert read.checkpoint == "note\n7\n"
    assert not read.forged


def test_a_line_says_the_same_to_readers_as_its_payload(world: World) -> None:
    world.limit(50)
    page = JournalPage(tuple(entry.payload for entry in world.entries), tuple(world.objects))
    lines = list(journal_lines(page, 9, "note\n9\n"))
    assert not read_journal(lines).forged
    for number, text in enumerate(lines):
        members = json.loads(text)
        for name in members.keys() - {"payload", "objects", "checkpoint"}:
            for changed in (members | {name: "x"}, {k: v for k, v in members.items() if k != name}):
                forged = [*lines[:number], json.dumps(changed), *lines[number + 1 :]]
                assert read_journal(forged).forged.startswith(f"line {number + 1} ")
    twice = lines[0][:-1] + ', "kind": "issue"}'
    with pytest.raises(RemoteProtocolError, match="twice"):
        read_journal([twice, *lines[1:]])
    no_entry = json.dumps(json.loads(lines[0]) | {"payload": "ff"})
    assert not read_journal([no_entry]).forged  # what it is, the audit says


def test_an_authority_cannot_choose_its_dates(world: World) -> None:
    # To void a hold before its time it must date an entry ahead.
    leaves = tuple(entry.payload for entry in world.entries)
    signed = Checkpoint("log", 8, root_of(map(leaf_hash, leaves)))
    page = JournalPage(leaves, tuple(world.objects))

    def seen_at(ms: int) -> tuple[str, ...]:
        auditor = JournalAuditor(NETWORK, key_of("issuer").public)
        return audit_journal(auditor, [page], signed, ms).violations

    voided_ms = world.entries[-1].posted_ms
    assert seen_at(voided_ms) == ()
    assert seen_at(voided_ms - FRESHNESS_MS) == ()
    assert seen_at(voided_ms - FRESHNESS_MS - 1) == (
        "an entry is dated after its witnesses saw it",
    )
    world.issue(now_ms=voided_ms - FRESHNESS_MS)
    assert world.audit().violations == ()
    world.issue(now_ms=voided_ms - FRESHNESS_MS - 1)  # and go on at the true time
    (violation,) = world.audit().violations
    assert violation == "entry 9: it is dated before what stands before it"


def test_a_damaged_tree_or_network(world: World) -> None:
    leaves = tuple(entry.payload for entry in world.entries)
    root = root_of(map(leaf_hash, leaves))

    def audited(network: str, data: tuple[bytes, ...], signed: Checkpoint) -> JournalReport:
        auditor = JournalAuditor(network, key_of("issuer").public)
        return audit_journal(auditor, [JournalPage(data, tuple(world.objects))], signed)

    good = Checkpoint("log", 8, root)
    assert "covers" in audited(NETWORK, leaves[:-1], good).violations[0]
    assert "root" in audited(NETWORK, leaves, replace(good, root=leaf_hash(b""))).violations[0]
    assert not audited("net-2", leaves, good).balanced
    assert not audited(NETWORK, (b"\xff", *leaves[1:]), good).balanced
    assert not audited(NETWORK, (leaves[1], leaves[0], *leaves[2:]), good).balanced


def test_statement_and_invoice(world: World) -> None:
    entries = [entry_from_payload(entry.payload) for entry in world.entries]
    late = NOW + TTL_MS + GRACE_MS
    now, then, always = Period(NOW, NOW + 1), Period(NOW + 1, late + 1), Period(0, late + 1)
    first, second = (make_statement(entries, CLIENT, period) for period in (now, then))
    whole = make_statement(entries, CLIENT, always)
    assert (first.opening, first.closing, second.opening) == (0, 875, 875)
    assert (second.closing, whole.closing) == (975, 975)
    assert [m.change for m in whole.movements] == [1_000, -100, 75, -100, 100]
    assert whole.closing == world.books.balances.of(CLIENT)
    bill = make_invoice(entries, CLIENT, always)
    assert {(charge.payee, charge.amount) for charge in bill.charges} == {(ALICE, 20), (BOB, 5)}
    assert bill.total == 25
    assert make_invoice(entries, ALICE, always).charges == ()
    assert make_invoice(entries, CLIENT, then).total == 0
    assert make_invoice(reversed([*reversed(entries)]), CLIENT, always) == bill
    assert make_invoice(entries[:-1], CLIENT, always).total == bill.total


def test_a_document_names_the_tree_and_how_far_it_reaches(world: World) -> None:
    late = world.entries[-1].posted_ms - FRESHNESS_MS + 1
    root = root_of(leaf_hash(entry.payload) for entry in world.entries)
    coverage = Coverage.of(world.entries, "log.example", root)
    assert (coverage.tree_size, coverage.complete_until_ms) == (8, late - 1)
    for until_ms, complete in ((late - 1, b"true"), (late, b"false")):
        period = Period(0, until_ms)
        for made in (make_statement, make_invoice):
            document = made(world.entries, CLIENT, period).encoded(coverage)
            assert document.startswith(b'{"account":"12D3KooW')
            assert b'"complete":' + complete in document
            assert root.hex().encode() in document and b'"tree_size":8' in document
    fallen = [*world.entries, replace(world.entries[-1], posted_ms=NOW)]
    assert Coverage.of(fallen, "log.example", root).complete_until_ms == late - 1
    nothing = Coverage.of((), "log.example", EMPTY_ROOT)
    assert not nothing.covers(Period(0, 1))


def test_declining_frees_a_hold_that_nobody_used() -> None:
    world = World()
    world.issue()
    world.reserve()
    first = world.decline(ALICE)
    assert (first.entries, len(first.releases), first.value) == ((), 1, 0)
    last = world.decline(BOB)
    assert [entry.kind for entry in last.entries] == [EntryKind.VOID]
    assert world.books.available(CLIENT) == 1_000
    assert world.decline(BOB) == Accepted((), (), 0)
    assert world.audit().violations == ()
