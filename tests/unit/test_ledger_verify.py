import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.envelope import digest, encode, seal
from plait.identity import SigningKey
from plait.ledger.bundle import BundleParts, build_bundle, read_bundle
from plait.ledger.bundle_fields import write_envelope
from plait.ledger.canonical import encode_canonical
from plait.ledger.certs import CLOCK_SKEW_MS_MAX
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.merkle import Tree, leaf_hash
from plait.ledger.verify import Report, verify_bundle
from plait.testing.accounting import (
    END_ID,
    NOW_MS,
    PaperSession,
    Plot,
    cert_of,
    grant_of,
    key_of,
    paper_network,
)
from plait.types import Digest, Prices, SessionId, Span
from plait.v1.bundle_pb2 import BundleSeal, ModelManifest
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    JournalEntry,
    JournalLine,
    ReservationGrant,
    SessionVoucher,
    StageReceipt,
)
from plait.v1.offer_pb2 import Offer
from plait.v1.session_pb2 import SessionOpen

NETWORK = paper_network()
PARTS = PaperSession(Plot()).play().bundle_parts()
EPOCH = PARTS.epochs[0]
DATA = build_bundle(PARTS, key_of("client"))
OTHER = PaperSession(Plot(session="another", drawn_ids=(20, 21, END_ID))).play().bundle_parts()

Change = Callable[[Any], object]


def check(parts: BundleParts) -> Report:
    """Verify parts that the client itself sealed: the seal is no help against its lies."""
    return verify_bundle(build_bundle(parts, key_of("client")), NETWORK)


def failures(report: Report) -> dict[str, str]:
    return {claim.name: claim.detail for claim in report.claims if claim.ok is False}


def present(envelope: SignedEnvelope | None) -> SignedEnvelope:
    assert envelope is not None
    return envelope


def put(name: str, value: Any, parts: BundleParts = PARTS) -> BundleParts:
    return put_all(parts, **{name: value})


def put_all(parts: BundleParts, **changes: Any) -> BundleParts:
    """Parts with some members of the bundle, or of its first epoch, changed."""
    inner = {name: value for name, value in changes.items() if hasattr(EPOCH, name)}
    outer = {name: value for name, value in changes.items() if name not in inner}
    epochs = (replace(parts.epochs[0], **inner), *parts.epochs[1:])
    return replace(parts, **{"epochs": epochs, **outer})


def terms(**changes: Any) -> BundleParts:
    return put("terms", replace(PARTS.terms, **changes))


def item(name: str, index: int, value: Any) -> BundleParts:
    items = list(getattr(EPOCH if hasattr(EPOCH, name) else PARTS, name))
    items[index] = value
    return put(name, tuple(items))


def again(
    envelope: SignedEnvelope, kind: type[Message], key: SigningKey | str, change: Change
) -> SignedEnvelope:
    """The envelope with its contents changed and signed anew."""
    message = kind.FromString(envelope.payload)
    change(message)
    return seal(key_of(key) if isinstance(key, str) else key, message)


def setting(**changes: Any) -> Change:
    def change(message: Message) -> None:
        for name, value in changes.items():
            setattr(message, name, value)

    return change


def flipped(envelope: SignedEnvelope) -> SignedEnvelope:
    copy = SignedEnvelope.FromString(envelope.SerializeToString())
    copy.signature = bytes([copy.signature[0] ^ 1]) + copy.signature[1:]
    return copy


def receipt(index: int, **changes: Any) -> BundleParts:
    key = f"stage {index % 3} ledger"
    return item(
        "receipts", index, again(EPOCH.receipts[index], StageReceipt, key, setting(**changes))
    )


def voucher(change: Change, key: str = "client ledger") -> BundleParts:
    return put("voucher", again(present(EPOCH.voucher), SessionVoucher, key, change))


def opening(change: Change, key: str = "client ledger") -> BundleParts:
    return put("session_open", again(EPOCH.session_open, SessionOpen, key, change))


def offer(change: Change, key: str = "stage 1") -> BundleParts:
    """The changed offer, with the route naming it: only the offer itself is then wrong."""
    return item("offers", 1, again(EPOCH.offers[1], Offer, key, change))


def reservation(change: Change, key: str = "client ledger") -> BundleParts:
    return put("reservation", again(present(EPOCH.reservation), BudgetReservation, key, change))


def grant(change: Change, key: str = "authority ledger") -> BundleParts:
    return put("grant", again(present(EPOCH.grant), ReservationGrant, key, change))


def cert(name: str, key: str, **changes: Any) -> SignedEnvelope:
    return again(cert_of(name), NodeKeyCert, key, setting(**changes))


def ledger_that_posts(*changes: tuple[int, Change]) -> BundleParts:
    """A lying ledger: entries changed, and a log that contains exactly these."""
    entries = [JournalEntry.FromString(payload) for payload in PARTS.entries]
    for index, change in changes:
        change(entries[index])
    return logged([encode(entry) for entry in entries])


def logged(entries: list[bytes]) -> BundleParts:
    leaves = [leaf_hash(b"%d" % i) for i in range(8)]
    for payload in entries:
        leaves[JournalEntry.FromString(payload).index] = leaf_hash(payload)
    tree = Tree(leaves)
    indexes = [JournalEntry.FromString(payload).index for payload in entries]
    proofs = tuple((i, tuple(tree.inclusion_proof(i, tree.size))) for i in indexes)
    origin = NETWORK.authorities[0].log_origin
    checkpoint = sign_checkpoint(key_of("authority log"), origin, tree.size, tree.root())
    return replace(PARTS, entries=tuple(entries), proofs=proofs, checkpoint=checkpoint)


def extra_line(account: str, debit: int = 0, credit: int = 0) -> Change:
    return lambda entry: entry.lines.append(
        JournalLine(account=account, debit=debit, credit=credit)
    )


def line(number: int, **changes: Any) -> Change:
    return lambda entry: setting(**changes)(entry.lines[number])


def test_an_honest_bundle_is_verified() -> None:
    report = verify_bundle(DATA, NETWORK)
    assert report.outcome == "verified"
    assert report.exit_code == 0
    assert all(claim.ok for claim in report.claims)
    assert any("computation" in item for item in report.unchecked)
    assert any("no revocation is looked at" in item for item in report.unchecked)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_honest_session_is_verified(data: st.DataObject) -> None:
    ends = sorted(data.draw(st.sets(st.integers(1, 30), min_size=1, max_size=5)))
    drawn = tuple(range(40, 40 + data.draw(st.integers(1, 12))))
    plot = Plot(
        spans=tuple(Span(a, b) for a, b in zip([0, *ends], ends, strict=False)),
        prompt_ids=tuple(range(3, 3 + data.draw(st.integers(1, 12)))),
        drawn_ids=(*drawn[:-1], END_ID) if data.draw(st.booleans()) else drawn,
        max_tokens=len(drawn),
        chunk_tokens=data.draw(st.integers(1, 5)),
        prefill_chunk_tokens=data.draw(st.integers(1, 5)),
        prices=Prices(data.draw(st.integers(0, 10**6)), data.draw(st.integers(10**6, 10**9))),
    )
    report = check(PaperSession(plot).play().bundle_parts())
    assert report.outcome == "verified", report.lines()


LIES: list[tuple[str, Callable[[], BundleParts]]] = [
    # Who and on which terms.
    ("session terms", partial(terms, max_tokens=21)),
    ("session terms", partial(terms, epoch=2)),
    ("session terms", partial(terms, handoff_salt=bytes(32))),
    ("session terms", partial(terms, session_id=SessionId(bytes(16)))),
    ("session terms", partial(terms, model_digest=Digest(bytes(32)))),
    ("session terms", partial(terms, client_ledger_key=key_of("x").public)),
    ("session terms", partial(terms, stages=PARTS.terms.stages[:2])),
    ("session terms", partial(opening, setting(max_tokens=21))),
    ("session terms", partial(opening, lambda m: m.route.stages[0].prices.ClearField("output"))),
    ("session terms", partial(opening, lambda m: None, "client")),
    ("session terms", lambda: put("session_open", OTHER.epochs[0].session_open)),
    ("session terms", lambda: put("session_open", flipped(EPOCH.session_open))),
    ("client certificate", lambda: put("client_cert", cert_of("stage 0"))),
    ("client certificate", lambda: put("client_cert", cert("client", "stranger"))),
    ("client certificate", lambda: put("client_cert", cert("client", "client", network_id="x"))),
    (
        "client certificate",
        lambda: put("client_cert", cert("client", "client", ledger_key=key_of("x").public)),
    ),
    (
        "client certificate",
        lambda: put("client_cert", cert("client", "client", expires_ms=NOW_MS)),
    ),
    ("stage certificates", lambda: put("stage_certs", EPOCH.stage_certs[:2])),
    ("stage certificates", lambda: put("stage_certs", (*EPOCH.stage_certs, cert_of("client")))),
    ("stage certificates", lambda: item("stage_certs", 1, cert_of("stage 2"))),
    ("stage certificates", lambda: item("stage_certs", 1, flipped(EPOCH.stage_certs[1]))),
    ("offers", lambda: put("offers", EPOCH.offers[1:])),
    ("offers", lambda: item("offers", 1, EPOCH.offers[2])),
    ("offers", lambda: item("offers", 1, flipped(EPOCH.offers[1]))),
    ("offers", partial(offer, setting(sequence=2))),
    ("offers", partial(offer, lambda m: None, "stranger")),
    # The model and the route.
    ("manifest", lambda: put("manifest", b"")),
    ("manifest", lambda: put("manifest", manifest(name="another"))),
    ("route", partial(terms, stages=(PARTS.terms.stages[0], *PARTS.terms.stages[2:]))),
    ("route", partial(terms, stages=PARTS.terms.stages[:2])),
    ("route", partial(terms, stages=PARTS.terms.stages[1:])),
    (
        "route",
        lambda: terms(stages=(replace(PARTS.terms.stages[0], priced_layers=4), *stages(1, 2))),
    ),
    # The tokens.
    ("frames", lambda: put("frames", EPOCH.frames[1:])),
    ("frames", lambda: put("frames", EPOCH.frames[:-1])),
    ("frames", lambda: put("frames", ())),
    ("frames", lambda: put("frames", (*EPOCH.frames[:4], *EPOCH.frames[5:]))),
    ("frames", lambda: put("frames", (*EPOCH.frames, EPOCH.frames[-1]))),
    ("frames", lambda: item("frames", 3, (4, *EPOCH.frames[3][1:]))),
    ("frames", lambda: item("frames", 3, (3, 6, 2, (), True, False, False))),
    ("frames", lambda: item("frames", 5, (5, 8, 1, (), True, False, False))),
    ("frames", lambda: item("frames", 0, (0, 0, 3, (), False, False, False))),
    ("frames", lambda: item("frames", 9, (9, 12, 0, (), False, False, False))),
    ("frames", lambda: put("prompt_ids", PARTS.prompt_ids[1:])),
    ("frames", lambda: put("token_ids", PARTS.token_ids[:-1])),
    ("frames", lambda: put("token_ids", ())),
    ("receipts complete", lambda: item("frames", 4, (*EPOCH.frames[4][:5], True, False))),
    ("ring", lambda: item("prompt_ids", 0, 4)),
    ("ring", lambda: item("token_ids", 3, 99)),
    ("ring", lambda: item("token_ids", 6, 99)),
    ("answer", lambda: item("token_ids", 3, 50_000)),
    ("answer", lambda: item("token_ids", 3, END_ID)),
    ("answer", lambda: put("finish_reason", "length")),
    ("answer", lambda: put("finish_reason", "")),
    # Receipts.
    ("receipts complete", lambda: put("receipts", EPOCH.receipts[:-1])),
    ("receipts complete", lambda: put("receipts", ())),
    ("receipts complete", lambda: put("receipts", (*EPOCH.receipts, EPOCH.receipts[-1]))),
    ("receipts of stage 0", lambda: put("receipts", OTHER.epochs[0].receipts + EPOCH.receipts[9:])),
    ("receipts of stage 0", lambda: item("receipts", 3, EPOCH.receipts[0])),
    ("receipts of stage 0", lambda: item("receipts", 0, EPOCH.receipts[1])),
    ("receipts of stage 1", lambda: item("receipts", 1, flipped(EPOCH.receipts[1]))),
    ("receipts of stage 1", partial(receipt, 1, output_tokens=1)),
    ("receipts of stage 1", partial(receipt, 4, previous_digest=b"")),
    ("receipts of stage 1", partial(receipt, 4, numeric_class="int4")),
    ("receipts of stage 1", partial(receipt, 4, end_layer=5)),
    ("receipts of stage 1", partial(receipt, 4, issued_ms=1)),  # breaks the chain after it
    ("receipts of stage 2", partial(receipt, 11, session_id=bytes(16))),
    ("hand-offs", partial(receipt, 10, input_commit=bytes(32))),
    ("hand-offs", partial(receipt, 10, output_commit=bytes(32))),
    ("ring", partial(receipt, 9, input_commit=bytes(32))),
    ("ring", partial(receipt, 11, output_commit=bytes(32))),
    # The voucher.
    ("voucher", partial(voucher, lambda m: None, "client")),
    ("voucher", partial(voucher, setting(sequence=3))),
    ("voucher", partial(voucher, setting(session_id=bytes(16)))),
    ("voucher", partial(voucher, setting(epoch=2))),
    ("voucher", partial(voucher, setting(account=key_of("x").peer_id))),
    ("voucher", partial(voucher, setting(output_tokens=7))),
    ("voucher", partial(voucher, setting(transcript=bytes(32)))),
    ("voucher", partial(voucher, lambda m: setting(microcredits=1)(m.amounts[0]))),
    ("voucher", partial(voucher, lambda m: m.amounts.pop())),
    ("voucher", partial(voucher, lambda m: m.amounts.add(payee="x", microcredits=1))),
    ("voucher", lambda: put("voucher", OTHER.epochs[0].voucher)),
    ("voucher", lambda: put("voucher", flipped(present(EPOCH.voucher)))),
    # Credit.
    ("reservation and grant", partial(reservation, setting(lane=7))),
    ("reservation and grant", partial(reservation, lambda m: None, "stranger")),
    ("reservation and grant", partial(reservation, setting(route_digest=bytes(32)))),
    ("reservation and grant", lambda: put("reservation", OTHER.epochs[0].reservation)),
    ("reservation and grant", partial(grant, lambda m: None, "stranger")),
    ("reservation and grant", partial(grant, lambda m: None, "client ledger")),
    ("reservation and grant", partial(grant, setting(amount=1))),
    ("reservation and grant", partial(grant, setting(expires_ms=NOW_MS - 1))),
    ("reservation and grant", lambda: put("grant", OTHER.epochs[0].grant)),
    ("caps", lambda: caps_below_the_voucher()),
    # The journal.
    ("journal", lambda: ledger_that_posts((1, line(1, credit=1)))),
    ("journal", lambda: ledger_that_posts((1, line(1, account=key_of("x").peer_id)))),
    ("journal", lambda: ledger_that_posts((1, pay_more(1)))),
    ("journal", lambda: ledger_that_posts((0, setting(sub_account="another")))),
    ("journal", lambda: ledger_that_posts((1, pay_more(-1)))),
    ("journal", lambda: ledger_that_posts((1, line(0, account=key_of("x").peer_id)))),
    ("journal", lambda: ledger_that_posts((0, setting(cause_digest=bytes(32))))),
    ("journal", lambda: ledger_that_posts((0, line(0, account=key_of("x").peer_id)))),
    ("journal", lambda: ledger_that_posts((0, reserve_more))),
    ("journal", lambda: ledger_that_posts((2, line(1, account=key_of("x").peer_id)))),
    ("journal", lambda: ledger_that_posts((2, setting(kind=1)))),
    ("journal", lambda: ledger_that_posts((2, setting(kind=9)))),
    ("journal", lambda: ledger_that_posts((2, setting(session_id=bytes(16))))),
    ("journal", lambda: ledger_that_posts((2, setting(network_id="x")))),
    ("journal", lambda: ledger_that_posts((1, extra_line(key_of("x").peer_id)))),
    ("journal", lambda: logged([PARTS.entries[0], PARTS.entries[2]])),
    ("journal", lambda: logged(list(PARTS.entries[1:]))),
    ("journal", lambda: put("entries", PARTS.entries[::-1])),
    ("journal", lambda: put("entries", (b"\xff", *PARTS.entries[1:]))),
    ("journal", lambda: put("entries", OTHER.entries)),
    # The log.
    ("log", lambda: put("proofs", PARTS.proofs[:-1])),
    ("log", lambda: put("proofs", PARTS.proofs[::-1])),
    ("log", lambda: item("proofs", 0, (PARTS.proofs[0][0], PARTS.proofs[0][1][:-1]))),
    ("log", lambda: item("proofs", 0, (PARTS.proofs[0][0], (b"short",)))),
    ("log", lambda: item("proofs", 0, (2**63, PARTS.proofs[0][1]))),
    ("log", lambda: put("checkpoint", OTHER.checkpoint)),
    ("log", lambda: put("checkpoint", "")),
    ("log", lambda: put("checkpoint", str(PARTS.checkpoint).replace("6\n", "7\n"))),
    ("log", lambda: put("checkpoint", checkpoint_by("stranger"))),
]


def stages(*indexes: int) -> tuple[Any, ...]:
    return tuple(PARTS.terms.stages[index] for index in indexes)


def manifest(**changes: Any) -> bytes:
    message = ModelManifest.FromString(PARTS.manifest or b"")
    setting(**changes)(message)
    return encode(message)


def checkpoint_by(name: str) -> str:
    origin = NETWORK.authorities[0].log_origin
    return sign_checkpoint(key_of(name), origin, 6, bytes(32))


def pay_more(by: int) -> Change:
    def change(entry: JournalEntry) -> None:
        entry.lines[0].debit += by
        entry.lines[1].credit += by

    return change


def reserve_more(entry: JournalEntry) -> None:
    entry.lines[0].debit += 1
    entry.lines[1].credit += 1


def caps_below_the_voucher() -> BundleParts:
    """A client that reserved less for a stage than it promised, with an honest grant of it."""
    parts = reservation(lambda m: setting(microcredits=1)(m.caps[0]))
    reserved = parts.epochs[0].reservation
    assert reserved is not None
    return put("grant", grant_of(reserved), parts)


@pytest.mark.parametrize(("name", "lie"), LIES, ids=[f"{i}-{n}" for i, (n, _) in enumerate(LIES)])
def test_each_lie_is_false_and_named(name: str, lie: Callable[[], BundleParts]) -> None:
    report = check(lie())
    assert report.outcome == "false"
    assert report.exit_code == 1
    assert name in failures(report), report.lines()


@pytest.mark.parametrize(
    "change",
    [
        setting(network_id="x"),
        setting(model_digest=bytes(32)),
        setting(end_layer=3, start_layer=0),
        lambda m: setting(output=1)(m.prices),
        setting(numeric_class="int4"),
        setting(state=2),
        setting(expires_ms=NOW_MS - CLOCK_SKEW_MS_MAX - 1),
        setting(issued_ms=NOW_MS + CLOCK_SKEW_MS_MAX + 1),
    ],
)
def test_an_offer_that_says_something_else_is_false(change: Change) -> None:
    envelope = again(EPOCH.offers[1], Offer, "stage 1", change)
    stage = replace(PARTS.terms.stages[1], offer_digest=digest(envelope.payload))
    parts = put("offers", (EPOCH.offers[0], envelope, EPOCH.offers[2]))
    named = replace(PARTS.terms, stages=(*stages(0), stage, *stages(2)))
    resigned = again(
        EPOCH.session_open,
        SessionOpen,
        "client ledger",
        lambda m: setting(offer_digest=stage.offer_digest)(m.route.stages[1]),
    )
    report = check(put_all(parts, terms=named, session_open=resigned))
    assert "offer of stage 1" in failures(report)["offers"]
    assert "session terms" not in failures(report)


@pytest.mark.parametrize(
    ("missing", "claim"),
    [
        ({"manifest": None}, "manifest"),
        ({"checkpoint": None}, "log"),
        ({"entries": (), "proofs": ()}, "journal"),
        ({"entries": (), "proofs": (), "checkpoint": None}, "journal"),
        ({"entries": PARTS.entries[:1], "proofs": PARTS.proofs[:1]}, "journal"),
    ],
)
def test_missing_evidence_is_incomplete(missing: dict[str, Any], claim: str) -> None:
    report = check(replace(PARTS, **missing))
    assert report.outcome == "incomplete", report.lines()
    assert report.exit_code == 2
    assert claim in [item.name for item in report.claims if item.ok is None]


def test_the_seal_must_be_the_clients_and_over_these_contents() -> None:
    document = json.loads(DATA)
    honest = read_bundle(DATA).seal
    for key, change in (
        ("stranger", lambda m: None),
        ("client ledger", lambda m: None),
        ("client", setting(sha256=bytes(32))),
        ("client", setting(network_id="x")),
        ("client", setting(session_id=bytes(16))),
        ("client", setting(sealed_ms=1)),
    ):
        document["seal"] = write_envelope(again(honest, BundleSeal, key, change))
        report = verify_bundle(encode_canonical(document), NETWORK)
        assert list(failures(report)) == ["seal"]


def test_trust_comes_from_the_network_file_alone() -> None:
    assert "network" in failures(verify_bundle(DATA, paper_network(network_id="another")))
    nobody = verify_bundle(DATA, paper_network(authorities=()))
    assert "reservation and grant" in failures(nobody)
    other_log = replace(NETWORK.authorities[0], log_key=key_of("x").public)
    assert list(failures(verify_bundle(DATA, paper_network(authorities=(other_log,))))) == ["log"]
    closed = paper_network(admission="allowlist", allowed_peers=frozenset())
    assert "network" in failures(verify_bundle(DATA, closed))


@pytest.mark.slow
def test_every_flipped_bit_is_false_and_names_a_claim() -> None:
    chosen = random.Random(20)
    for _ in range(300):
        bit = chosen.randrange(8 * len(DATA))
        data = bytearray(DATA)
        data[bit // 8] ^= 1 << bit % 8
        report = verify_bundle(bytes(data), NETWORK)
        assert report.outcome == "false", bit
        assert failures(report)


@pytest.mark.slow
def test_every_truncation_and_addition_is_false() -> None:
    for size in range(0, len(DATA), 251):
        assert verify_bundle(DATA[:size], NETWORK).outcome == "false"
    for tail in (b"\n", b" ", b"\0", DATA):
        assert verify_bundle(DATA + tail, NETWORK).outcome == "false"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_input_raises(data: bytes) -> None:
    report = verify_bundle(data, NETWORK)
    assert list(failures(report)) == ["encoding"]


@pytest.mark.parametrize("name", [n for n in BundleParts.__dataclass_fields__ if n != "network_id"])
def test_every_member_of_another_session_is_false(name: str) -> None:
    mixed = put(name, getattr(OTHER, name))
    if mixed == PARTS:
        return
    if name == "terms":
        assert check(mixed).outcome == "false"
        return
    report = check(mixed)
    # Only the entries' and receipts' own sessions differ: proofs and checkpoint go together.
    assert report.outcome == "false", (name, report.lines())


def test_a_report_is_readable_and_cannot_steer_a_terminal() -> None:
    report = check(put("finish_reason", "\x1b[2J" + "x" * 1000))
    detail = failures(report)["answer"]
    assert "\x1b" not in detail
    assert len(detail) < 500
    text = "\n".join(report.lines())
    assert "✘ answer" in text
    assert "✔ seal" in text
    assert text.endswith("Outcome: false")
    assert '"outcome":"false"' in report.to_json()


def test_the_check_loads_few_packages() -> None:
    """Those that docs/ledger.md names. PyNaCl may be absent: see ``plait.identity``."""
    script = (
        "import sys, plait.ledger.verify\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(n for n in names - sys.stdlib_module_names if not n.startswith('_')))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    known = {"plait", "google", "cryptography", "base58"}
    assert known <= set(loaded) <= known | {"nacl"}
