"""Escrow: what stands aside, comes back, or is forfeited; who decides; what lies about it show."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from plait.envelope import decode, digest, encode, seal
from plait.errors import BadProof, BadSignature
from plait.ledger.balances import Entry, EntryKind, Line, escrow_account
from plait.ledger.bundle import BundleParts, build_bundle
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import Checkpoint, sign_checkpoint
from plait.ledger.escrow import EscrowTerms
from plait.ledger.exposure import (
    JUDGED_EXPOSURE_TYPE,
    Judging,
    check_judged,
    combine_judgements,
    judging_of,
    sign_judgement,
)
from plait.ledger.journal import (
    Accepted,
    Books,
    Command,
    Expire,
    Forfeit,
    Issue,
    Refusal,
    Reserve,
    Settle,
)
from plait.ledger.journal_audit import JournalAuditor, JournalPage, JournalReport, audit_journal
from plait.ledger.merkle import Tree, leaf_hash, root_of
from plait.ledger.statement import Period, make_statement
from plait.ledger.verify import verify_bundle
from plait.network_file import Judge, parse_network_file
from plait.testing.accounting import NETWORK_ID, PaperSession, Plot, key_of, paper_network
from plait.types import AccountId, Digest, SessionId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    ExposureJudgement,
    IssueOrder,
    JournalEntry,
    PayeeAmount,
    SessionVoucher,
    SettlementRequest,
)

NOW = 1_700_000_000_000
WINDOW_MS = 86_400_000
CLIENT, OTHER, ALICE, BOB = (
    AccountId(key_of(name).peer_id) for name in ("client", "other", "alice", "bob")
)
FIRST, SECOND = SessionId(b"1" * 16), SessionId(b"2" * 16)
RECEIPT = bytes(range(32))
JUDGING = Judging(
    EscrowTerms(10, WINDOW_MS),
    frozenset(key_of(f"judge {number}").public for number in range(3)),
    quorum=2,
)


def judgement(
    number: int,
    session: SessionId = FIRST,
    payee: AccountId = ALICE,
    network_id: str = NETWORK_ID,
    receipt: bytes = RECEIPT,
) -> SignedEnvelope:
    message = ExposureJudgement(
        network_id=network_id,
        session_id=session,
        payee=payee,
        receipt_digest=receipt,
        evidence_digest=bytes(32),
        issued_ms=NOW + number,
    )
    return sign_judgement(key_of(f"judge {number}"), message)


@dataclass
class World:
    """Books with two clients' sessions; every signed object behind them."""

    books: Books = field(default_factory=lambda: Books(NETWORK_ID, JUDGING.terms))
    entries: list[Entry] = field(default_factory=list)
    objects: list[SignedEnvelope] = field(default_factory=list)

    def run(self, command: Command, *objects: SignedEnvelope, now_ms: int = NOW) -> Accepted:
        outcome = self.books.apply(command, now_ms)
        assert isinstance(outcome, Accepted), outcome
        self.entries += outcome.entries
        self.objects += objects
        return outcome

    def open(self, client: str, session: SessionId) -> None:
        key, account = key_of(f"{client} ledger"), key_of(client).peer_id
        order = IssueOrder(
            network_id=NETWORK_ID, account=account, amount=10_000, order_id=session, issued_ms=NOW
        )
        signed = seal(key_of("issuer"), order)
        self.run(Issue(order, digest(signed.payload)), signed)
        reservation = BudgetReservation(
            network_id=NETWORK_ID,
            account=account,
            sequence=1,
            session_id=session,
            amount=4_000,
            caps=[PayeeAmount(payee=one, microcredits=2_000) for one in (ALICE, BOB)],
            issued_ms=NOW,
            expires_ms=NOW + 600_000,
        )
        asked = seal(key, reservation)
        cert = make_key_cert(key_of(client), key.public, NETWORK_ID, NOW - 1, 10**9, 1)
        self.run(Reserve(reservation, digest(asked.payload)), asked, cert)

    def settle(
        self, client: str, session: SessionId, alice: int, bob: int, now_ms: int = NOW
    ) -> Accepted:
        amounts = {ALICE: alice, BOB: bob}
        voucher = SessionVoucher(
            network_id=NETWORK_ID,
            session_id=session,
            account=key_of(client).peer_id,
            amounts=[PayeeAmount(payee=p, microcredits=m) for p, m in amounts.items()],
        )
        shown = seal(key_of(f"{client} ledger"), voucher)
        request = SettlementRequest(
            network_id=NETWORK_ID,
            session_id=session,
            payee=ALICE,
            voucher_digest=digest(shown.payload),
        )
        asked = digest(encode(request))
        command = Settle(voucher, digest(shown.payload), request, asked)
        return self.run(command, shown, now_ms=now_ms)

    def forfeit(self, *judges: int, session: SessionId = FIRST, now_ms: int = NOW) -> Accepted:
        exposure = combine_judgements([judgement(number, session) for number in judges])
        return self.run(check_judged(exposure, NETWORK_ID, JUDGING), exposure, now_ms=now_ms)

    def balance(self, account: AccountId) -> int:
        return self.books.balances.of(account)

    def audit(self, entries: list[Entry] | None = None) -> JournalReport:
        entries = self.entries if entries is None else entries
        leaves = tuple(entry.payload for entry in entries)
        signed = Checkpoint("log", len(leaves), root_of(map(leaf_hash, leaves)))
        auditor = JournalAuditor(NETWORK_ID, key_of("issuer").public, judging=JUDGING)
        return audit_journal(auditor, [JournalPage(leaves, tuple(self.objects))], signed)


@pytest.fixture
def world() -> World:
    world = World()
    world.open("client", FIRST)
    world.open("other", SECOND)
    world.settle("client", FIRST, 1_000, 500)
    world.settle("other", SECOND, 400, 300)
    return world


def test_a_share_stands_aside_and_comes_back(world: World) -> None:
    assert (world.balance(ALICE), world.books.escrows.of(ALICE)) == (1_260, 140)
    world.run(Expire(), now_ms=NOW + 700_000)  # the holds' rest goes back, no escrow does
    assert world.books.escrows.of(ALICE) == 140
    world.run(Expire(), now_ms=NOW + WINDOW_MS)
    assert (world.balance(ALICE), world.balance(BOB)) == (1_400, 800)
    assert world.books.escrows.of(ALICE) == world.books.escrows.of(BOB) == 0
    assert world.audit().violations == ()
    assert world.audit().balanced


def test_the_share_does_not_depend_on_how_often_a_payee_settles() -> None:
    often, once = World(), World()
    for one in (often, once):
        one.open("client", FIRST)
    for paid in range(1, 96):
        often.settle("client", FIRST, paid, 0)
    once.settle("client", FIRST, 95, 0)
    assert often.books.escrows.of(ALICE) == once.books.escrows.of(ALICE) == 10
    assert often.audit().violations == ()


def test_the_window_begins_with_the_last_payment(world: World) -> None:
    world.settle("client", FIRST, 1_100, 500, now_ms=NOW + 60_000)
    world.run(Expire(), now_ms=NOW + WINDOW_MS)
    assert world.books.escrows.standing(FIRST, ALICE) == 110
    assert world.books.escrows.standing(SECOND, ALICE) == 0


def test_an_exposed_payee_loses_all_that_stands(world: World) -> None:
    before = world.balance(CLIENT), world.balance(OTHER)
    assert world.forfeit(0, 2, now_ms=NOW + 5_000).value == 100
    assert world.balance(CLIENT) == before[0] + 100
    assert world.forfeit(0, 1, now_ms=NOW + 9_000).entries == ()
    # What it earns after the judgement is another matter.
    world.settle("client", FIRST, 1_200, 500, now_ms=NOW + 6_000)
    world.run(Expire(), now_ms=NOW + WINDOW_MS + 6_000)
    assert world.balance(OTHER) == 10_000 - 400 - 300 + 40
    assert world.balance(ALICE) == 1_200 - 100 + 400 - 40
    assert world.balance(BOB) == 800
    assert world.audit().violations == ()


def test_after_the_window_nothing_is_left_to_forfeit(world: World) -> None:
    world.run(Expire(), now_ms=NOW + WINDOW_MS)
    outcome = world.books.apply(Forfeit(FIRST, ALICE, Digest(bytes(32))), NOW + WINDOW_MS)
    assert isinstance(outcome, Refusal)
    assert outcome.code == "escrow"


def test_without_terms_nothing_stands_aside() -> None:
    world = World(books=Books(NETWORK_ID))
    world.open("client", FIRST)
    world.settle("client", FIRST, 1_000, 500)
    assert {entry.kind for entry in world.entries} & {EntryKind.ESCROW} == set()
    assert world.audit().violations != ()  # where the network file asks for it, it is missed


def test_a_statement_shows_it(world: World) -> None:
    world.forfeit(0, 1)
    statement = make_statement(world.entries, ALICE, Period(0, NOW + 1))
    kinds = [(one.kind, one.change) for one in statement.movements]
    settled, aside = EntryKind.SETTLE, EntryKind.ESCROW
    assert kinds == [(settled, 1_000), (aside, -100), (settled, 400), (aside, -40)]
    back = make_statement(world.entries, CLIENT, Period(0, NOW + 1)).movements[-1]
    assert (back.kind, back.change) == (EntryKind.FORFEIT, 100)
    assert world.entries[-1].index in world.books.history(ALICE)
    assert world.entries[-1].index in world.books.history(CLIENT)


NO_QUORUM: list[Callable[[], SignedEnvelope]] = [
    lambda: combine_judgements([judgement(0)]),
    lambda: combine_judgements([judgement(0), judgement(0)]),
    lambda: combine_judgements([]),
    lambda: combine_judgements([judgement(0), judgement(7)]),
    lambda: combine_judgements([judgement(0), judgement(1, SECOND)]),
    lambda: combine_judgements([judgement(0), judgement(1, payee=BOB)]),
    lambda: combine_judgements([judgement(0), judgement(1, receipt=bytes(32))]),
    lambda: combine_judgements([judgement(n, network_id="x") for n in (0, 1)]),
    lambda: combine_judgements([judgement(n, receipt=b"short") for n in (0, 1)]),
    lambda: judgement(0),
    lambda: SignedEnvelope(payload_type=JUDGED_EXPOSURE_TYPE, payload=b"\xff"),
    lambda: _signed_outside(),
]


def _signed_outside() -> SignedEnvelope:
    exposure = combine_judgements([judgement(0), judgement(1)])
    exposure.signer = key_of("judge 0").public
    return exposure


@pytest.mark.parametrize("exposure", NO_QUORUM)
def test_what_no_quorum_signed_decides_nothing(exposure: Callable[[], SignedEnvelope]) -> None:
    with pytest.raises((BadProof, BadSignature)):
        check_judged(exposure(), NETWORK_ID, JUDGING)


def test_a_flipped_signature_is_no_judgement() -> None:
    first = judgement(0)
    first.signature = first.signature[:-1] + bytes([first.signature[-1] ^ 1])
    with pytest.raises(BadSignature):
        check_judged(combine_judgements([first, judgement(1)]), NETWORK_ID, JUDGING)


def _without(kind: EntryKind, world: World) -> list[Entry]:
    kept = [entry for entry in world.entries if entry.kind is not kind]
    return [replace(entry, index=number) for number, entry in enumerate(kept)]


def _last(world: World, **changes: object) -> list[Entry]:
    return [*world.entries[:-1], replace(world.entries[-1], **changes)]  # type: ignore[arg-type]


def test_an_auditor_sees_what_an_authority_makes_up(world: World) -> None:
    assert world.audit(_without(EntryKind.ESCROW, world)).violations
    assert world.audit(world.entries[:-1]).violations  # the last share is owed
    smaller = world.entries[-1]
    lines = [one._replace(debit=one.debit // 2, credit=one.credit // 2) for one in smaller.lines]
    assert world.audit(_last(world, lines=tuple(lines))).violations
    early = Entry(
        NETWORK_ID,
        len(world.entries),
        EntryKind.MATURE,
        FIRST,
        b"",
        (Line(escrow_account(FIRST, ALICE), debit=100), Line(ALICE, credit=100)),
        NOW + WINDOW_MS - 1,
    )
    assert world.audit([*world.entries, early]).violations
    world.forfeit(0, 1)
    assert world.audit().violations == ()
    assert world.audit(_last(world, cause=bytes(32))).violations  # judged by nobody
    to_bob = (world.entries[-1].lines[0], Line(BOB, credit=100))
    assert world.audit(_last(world, lines=to_bob)).violations


def test_a_restart_finds_it_again(world: World) -> None:
    world.forfeit(0, 1, now_ms=NOW + 5_000)
    reservations = {
        digest(one.payload): decode(one.payload, BudgetReservation)
        for one in world.objects
        if one.payload_type.endswith(".reservation.v1")
    }
    orders = {
        digest(one.payload): decode(one.payload, IssueOrder)
        for one in world.objects
        if one.payload_type.endswith(".issue-order.v1")
    }
    again = Books(NETWORK_ID, JUDGING.terms)
    for entry in world.entries:
        cause = Digest(entry.cause)
        again.post(entry, reservations.get(cause) if cause in reservations else orders.get(cause))
    later = NOW + WINDOW_MS + 5_000
    assert again.apply(Expire(), later) == world.books.apply(Expire(), later)
    assert again.balances.all() == world.books.balances.all()


# In bundles -------------------------------------------------------------------------------

PARTS = PaperSession(Plot(escrow_percent=50)).play().bundle_parts()
"""Half of what is paid stands aside; the first stage's is forfeited, the others' comes back."""


def changed(kind: EntryKind, change: Callable[[JournalEntry], None]) -> BundleParts:
    """A lying ledger: an entry changed, and a log that contains exactly these."""
    entries = [JournalEntry.FromString(payload) for payload in PARTS.entries]
    change(next(entry for entry in entries if entry.kind == kind.value))
    leaves = [leaf_hash(b"%d" % index) for index in range(entries[-1].index + 1)]
    for entry in entries:
        leaves[entry.index] = leaf_hash(encode(entry))
    tree = Tree(leaves)
    network = paper_network()
    return replace(
        PARTS,
        entries=tuple(encode(entry) for entry in entries),
        proofs=tuple(
            (one.index, tuple(tree.inclusion_proof(one.index, tree.size))) for one in entries
        ),
        checkpoint=sign_checkpoint(
            key_of("authority log"), network.authorities[0].log_origin, tree.size, tree.root()
        ),
    )


def more(amount: int, entry: JournalEntry) -> None:
    for line in entry.lines[:2]:
        line.debit += amount if line.debit else 0
        line.credit += amount if line.credit else 0


def elsewhere(number: int, entry: JournalEntry) -> None:
    entry.lines[number].account = key_of("thief").peer_id


def other_session(entry: JournalEntry) -> None:
    for line in entry.lines:
        if line.account.startswith("escrow:"):
            line.account = line.account.replace("escrow:", "escrow:0")


def kind(new: EntryKind, entry: JournalEntry) -> None:
    entry.kind = new.value  # type: ignore[assignment]


LIES: list[Callable[[], BundleParts]] = [
    lambda: changed(EntryKind.ESCROW, partial(more, 1_000)),
    lambda: changed(EntryKind.ESCROW, partial(elsewhere, 0)),
    lambda: changed(EntryKind.ESCROW, partial(elsewhere, 1)),
    lambda: changed(EntryKind.ESCROW, other_session),
    lambda: changed(EntryKind.ESCROW, partial(kind, EntryKind.MATURE)),
    lambda: changed(EntryKind.MATURE, partial(more, 1)),
    lambda: changed(EntryKind.MATURE, partial(elsewhere, 1)),
    lambda: changed(EntryKind.MATURE, partial(kind, EntryKind.ESCROW)),
    lambda: changed(EntryKind.FORFEIT, partial(more, 1)),
    lambda: changed(EntryKind.FORFEIT, partial(elsewhere, 0)),
    lambda: changed(EntryKind.FORFEIT, partial(elsewhere, 1)),
    lambda: changed(EntryKind.FORFEIT, other_session),
    lambda: changed(EntryKind.FORFEIT, partial(kind, EntryKind.MATURE)),
]


def test_a_bundle_with_escrow_is_verified() -> None:
    kinds = {JournalEntry.FromString(payload).kind for payload in PARTS.entries}
    assert kinds >= {one.value for one in (EntryKind.ESCROW, EntryKind.MATURE, EntryKind.FORFEIT)}
    report = verify_bundle(build_bundle(PARTS, key_of("client")), paper_network())
    assert report.outcome == "verified", report.lines()


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_escrow_are_false(lie: Callable[[], BundleParts]) -> None:
    report = verify_bundle(build_bundle(lie(), key_of("client")), paper_network())
    assert report.outcome == "false"
    assert any(not claim.ok and claim.name == "journal" for claim in report.claims)


# In the network file ----------------------------------------------------------------------


def test_the_network_file_says_it() -> None:
    judges = tuple(Judge(f"judge {n}", key_of(f"judge {n}").public) for n in range(3))
    network = replace(
        paper_network(), judges=judges, judge_quorum=2, escrow_percent=10, escrow_window_s=86_400
    )
    assert parse_network_file(network.to_toml().encode()) == network
    assert judging_of(network) == JUDGING
    text = network.to_toml()
    for line in ("escrow_percent = 10\n", "escrow_window_s = 86400\n"):
        assert line in text
        text = text.replace(line, "")
    assert judging_of(parse_network_file(text.encode())) == JUDGING  # the defaults


@pytest.mark.parametrize(
    "change",
    [
        ("judge_quorum = 2", "judge_quorum = 4"),
        ("judge_quorum = 2\n", ""),
        ("escrow_percent = 10", "escrow_percent = 101"),
        ("escrow_window_s = 86400", "escrow_window_s = -1"),
        ('name = "judge 1"', 'name = "judge 2"'),
        ('name = "judge 1"', 'name = ""'),
    ],
)
def test_a_network_file_that_makes_no_sense(change: tuple[str, str]) -> None:
    from plait.errors import ConfigError

    judges = tuple(Judge(f"judge {n}", key_of(f"judge {n}").public) for n in range(3))
    network = replace(
        paper_network(), judges=judges, judge_quorum=2, escrow_percent=10, escrow_window_s=86_400
    )
    text = network.to_toml()
    assert change[0] in text
    with pytest.raises(ConfigError):
        parse_network_file(text.replace(*change).encode())
