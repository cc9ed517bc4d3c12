"""Every lie alone in a bundle of four epochs: client and stages collude in all the rest."""

import base64
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from plait.envelope import encode, open_envelope, pae, seal
from plait.ledger.bundle import BundleParts, EpochParts, build_bundle, read_bundle
from plait.ledger.bundle_fields import write_envelope
from plait.ledger.canonical import encode_canonical
from plait.ledger.client_books import CutEvidence
from plait.ledger.opening import opening_to_message
from plait.ledger.report import Report
from plait.ledger.terms import SessionTerms, StageTerms
from plait.ledger.verify import verify_bundle
from plait.testing.accounting import (
    END_ID,
    HOUR_MS,
    NOW_MS,
    Plot,
    grant_of,
    key_of,
    opening_of,
    paper_network,
)
from plait.testing.course import Cut, PaperCourse
from plait.types import Microcredits, Prices, Sampling, TokenCounts
from plait.v1.bundle_pb2 import BundleSeal
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    DrawStatement,
    JournalEntry,
    SessionVoucher,
    StageReceipt,
)

NETWORK = paper_network()
CLIENT = key_of("client")
PLOT = Plot(
    drawn_ids=(*range(40, 70), END_ID),
    max_tokens=40,
    chunk_tokens=8,
    prices=Prices(prompt=500_000, output=2_000_000, replayed=100_000),
)
CUTS = (
    Cut(5, frozenset({1}), beyond=True),
    Cut(3, frozenset({0, 2})),
    Cut(4, forgot=frozenset({1})),
)
COURSE = PaperCourse(PLOT, CUTS, wrong_every=3).play()
PARTS = COURSE.bundle_parts()
DATA = build_bundle(PARTS, CLIENT)
NAMES = [epoch.names for epoch in COURSE.epochs]

Lie = Callable[[], bytes]


def failures(report: Report) -> dict[str, str]:
    return {claim.name: claim.detail for claim in report.claims if claim.ok is False}


def sealed(parts: BundleParts) -> bytes:
    return build_bundle(parts, CLIENT)


def put(number: int, parts: BundleParts = PARTS, **changes: Any) -> BundleParts:
    """The bundle with members of one epoch changed."""
    epochs = list(parts.epochs)
    epochs[number - 1] = replace(epochs[number - 1], **changes)
    return replace(parts, epochs=tuple(epochs))


def epoch(number: int) -> EpochParts:
    return PARTS.epochs[number - 1]


def order(*numbers: int) -> bytes:
    return sealed(replace(PARTS, epochs=tuple(map(epoch, numbers))))


def retermed(number: int, change: Callable[[SessionTerms], SessionTerms]) -> bytes:
    """Other terms of an epoch, which the client signed."""
    terms = change(epoch(number).terms)
    return sealed(put(number, terms=terms, session_open=opening_of(terms)))


def restaged(number: int, index: int, **changes: Any) -> bytes:
    def change(terms: SessionTerms) -> SessionTerms:
        stages = list(terms.stages)
        stages[index] = replace(stages[index], **changes)
        return replace(terms, stages=tuple(stages))

    return retermed(number, change)


def resumed(number: int, by: int) -> bytes:
    def change(terms: SessionTerms) -> SessionTerms:
        position = terms.resume_position + by
        start = terms.counts_at(position, 0, terms.start.rejected_draft)
        stages = tuple(
            replace(stage, base=start, replayed=position)
            if stage.entered_epoch == terms.epoch
            else stage
            for stage in terms.stages
        )
        return replace(terms, resume_position=position, start=start, stages=stages)

    return retermed(number, change)


def reopened(number: int, sampling: Sampling, issued_ms: int) -> bytes:
    message = opening_to_message(epoch(number).terms, sampling, issued_ms, NOW_MS + HOUR_MS)
    return sealed(put(number, session_open=seal(key_of("client ledger"), message)))


def rewritten(change: Callable[[Any], object]) -> bytes:
    """The bundle's JSON changed, and sealed again."""
    document = json.loads(DATA)
    change(document)
    document.pop("seal", None)
    statement = open_envelope(read_bundle(DATA).seal, BundleSeal)
    statement.sha256 = hashlib.sha256(encode_canonical(document)).digest()
    return encode_canonical({**document, "seal": write_envelope(seal(CLIENT, statement))})


def in_terms(number: int, path: tuple[Any, ...], value: object) -> bytes:
    def change(document: Any) -> None:
        place = document["epochs"][number - 1]["terms"]
        for step in path[:-1]:
            place = place[step]
        assert place[path[-1]] != value
        place[path[-1]] = value

    return rewritten(change)


def frames_of(number: int, at: int, change: Callable[[Any], Any] | None) -> bytes:
    """One frame of an epoch changed, or left out."""
    frames = list(epoch(number).frames)
    frames[at : at + 1] = [] if change is None else [change(frames[at])]
    return sealed(put(number, frames=tuple(frames)))


def cut_of(number: int, **changes: Any) -> bytes:
    cut = epoch(number).cut
    assert cut is not None
    return sealed(put(number, cut=replace(cut, **changes)))


def cut_receipts(number: int, index: int, envelope: SignedEnvelope | None) -> bytes:
    cut = epoch(number).cut
    assert cut is not None
    receipts = list(cut.receipts)
    assert receipts[index] != envelope
    receipts[index] = envelope
    return cut_of(number, receipts=tuple(receipts))


def resigned(
    envelope: SignedEnvelope | None, kind: Any, key: str, **changes: Any
) -> SignedEnvelope:
    assert envelope is not None
    message = kind.FromString(envelope.payload)
    for name, value in changes.items():
        setattr(message, name, value)
    return seal(key_of(key), message)


def cut_receipt(number: int, index: int, **changes: Any) -> bytes:
    cut = epoch(number).cut
    assert cut is not None
    key = f"{NAMES[number - 1][index]} ledger"
    return cut_receipts(number, index, resigned(cut.receipts[index], StageReceipt, key, **changes))


def receipt(number: int, index: int, at: int = 0, **changes: Any) -> bytes:
    receipts = list(epoch(number).receipts)
    place = 3 * at + index
    key = f"{NAMES[number - 1][index]} ledger"
    receipts[place] = resigned(receipts[place], StageReceipt, key, **changes)
    return sealed(put(number, receipts=tuple(receipts)))


def voucher(number: int, change: Callable[[SessionVoucher], object]) -> bytes:
    message = SessionVoucher.FromString(epoch(number).voucher.payload)  # type: ignore[union-attr]
    change(message)
    return sealed(put(number, voucher=seal(key_of("client ledger"), message)))


def pay_the_lost(message: SessionVoucher) -> None:
    """Stage 1 was lost in the cut chunk of epoch 1, and yet is paid for it."""
    cut = COURSE.epochs[1].terms.start
    message.amounts[1].microcredits = epoch(1).terms.price(1, cut)


def draws(number: int, key: str = "stage 2 ledger", **changes: Any) -> bytes:
    cut = epoch(number).cut
    assert cut is not None
    return cut_of(number, draws=resigned(cut.draws, DrawStatement, key, **changes))


def reservation(number: int, change: Callable[[BudgetReservation], object]) -> bytes:
    """Another reservation, with an honest grant."""
    message = BudgetReservation.FromString(epoch(number).reservation.payload)  # type: ignore[union-attr]
    change(message)
    envelope = seal(key_of("client ledger"), message)
    return sealed(put(number, reservation=envelope, grant=grant_of(envelope)))


def journal(change: Callable[[list[JournalEntry]], object]) -> bytes:
    """A lying ledger's entries; its log is not looked at here."""
    entries = [JournalEntry.FromString(payload) for payload in PARTS.entries]
    change(entries)
    return sealed(replace(PARTS, entries=tuple(map(encode, entries))))


def holding(entries: list[JournalEntry], number: int) -> JournalEntry:
    return [entry for entry in entries if entry.kind == 2][number]


def swap_holds(entries: list[JournalEntry]) -> None:
    first, second = holding(entries, 0), holding(entries, 1)
    first.lines[1].account, second.lines[1].account = (
        second.lines[1].account,
        first.lines[1].account,
    )


class Lying(PaperCourse):
    """All collude about the terms of the later epochs."""

    def __init__(self, change: Callable[[StageTerms], StageTerms], *cuts: Cut) -> None:
        super().__init__(PLOT, cuts)
        self._change = change

    def agreed(self, terms: SessionTerms) -> SessionTerms:
        stages = tuple(
            self._change(stage) if terms.entered(index) else stage
            for index, stage in enumerate(terms.stages)
        )
        return replace(terms, stages=stages)


def lied(change: Callable[[StageTerms], StageTerms], *cuts: Cut) -> bytes:
    return sealed(Lying(change, *cuts).play().bundle_parts())


def cheaper(stage: StageTerms, **prices: int) -> StageTerms:
    return replace(stage, prices=replace(stage.prices, **prices))


def drafts_of(frame: Any, drafts: tuple[int, ...]) -> Any:
    return (*frame[:2], 1 + len(drafts), drafts, *frame[4:])


def drafted(number: int, *, accepted: bool) -> int:
    """The index of a frame with drafts, the first of them accepted or not."""
    frames = epoch(number).frames
    for index, frame in enumerate(frames[:-1]):
        if frame[3] and (frames[index + 1][1] > frame[1] + 1) is accepted:
            return index
    raise AssertionError("no such frame")


def accepted_otherwise() -> bytes:
    """An id that was accepted as a draft is delivered as another."""
    frame = epoch(1).frames[drafted(1, accepted=True)]
    ids = list(PARTS.token_ids)
    ids[frame[1] + 1 - len(PARTS.prompt_ids)] = 99
    return sealed(replace(PARTS, token_ids=tuple(ids)))


BASE = TokenCounts(prompt=5, output=1)
LIES: list[tuple[str, Lie]] = [
    # What no reader takes for a session's terms.
    ("encoding", partial(rewritten, lambda d: d.update(format="plait.bundle.v1"))),
    ("encoding", partial(rewritten, lambda d: d.update(format="plait.bundle.v2"))),
    ("encoding", partial(rewritten, lambda d: d.update(epochs=[]))),
    ("encoding", partial(in_terms, 2, ("stages", 1, "base", "output"), 1)),
    ("encoding", partial(in_terms, 2, ("stages", 1, "replayed"), 0)),
    ("encoding", partial(in_terms, 2, ("stages", 1, "rebuilt"), False)),
    ("encoding", partial(in_terms, 2, ("stages", 1, "entered_epoch"), 3)),
    ("encoding", partial(in_terms, 2, ("stages", 0, "carried"), 1)),
    ("encoding", partial(in_terms, 2, ("start", "output"), 1)),
    ("encoding", partial(in_terms, 2, ("resume_position",), 5)),
    ("encoding", partial(in_terms, 1, ("resume_position",), 5)),
    ("encoding", partial(in_terms, 1, ("stages", 0, "rebuilt"), True)),
    # How an epoch goes on with the one before.
    ("succession", partial(order, 1, 3, 4)),
    ("succession", partial(order, 2, 3, 4)),
    ("succession", partial(order, 1, 3, 2, 4)),
    ("succession", partial(order, 1, 2, 2, 3, 4)),
    ("frames", partial(order, 1, 2, 3)),
    ("succession", partial(restaged, 2, 1, carried=Microcredits(5))),
    ("succession", partial(restaged, 3, 1, carried=Microcredits(5))),
    ("succession", partial(restaged, 3, 1, base=BASE)),
    ("succession", partial(restaged, 3, 1, replayed=0)),
    ("succession", partial(restaged, 3, 1, entered_epoch=1, base=TokenCounts(), replayed=0)),
    ("succession", partial(restaged, 4, 0, prices=Prices())),
    ("succession", partial(restaged, 4, 0, priced_layers=1)),
    ("succession", partial(restaged, 4, 0, numeric_class="int4")),
    ("succession", partial(retermed, 2, partial(replace, max_tokens=41))),
    ("succession", partial(retermed, 2, partial(replace, chunk_tokens=9))),
    ("succession", partial(retermed, 2, partial(replace, qos="batch"))),
    ("succession", partial(reopened, 2, Sampling(end_ids=(END_ID,), seed=1), NOW_MS)),
    ("succession", partial(reopened, 2, Sampling(end_ids=(END_ID,)), NOW_MS - 1)),
    ("epoch 2: session terms", lambda: sealed(put(2, session_open=epoch(3).session_open))),
    ("frames", partial(resumed, 2, 1)),
    ("frames", partial(resumed, 2, -1)),
    (
        "frames",
        partial(
            retermed,
            4,
            lambda t: replace(t, start=replace(t.start, rejected_draft=t.start.rejected_draft + 1)),
        ),
    ),
    (
        "succession",
        partial(lied, lambda s: replace(s, carried=Microcredits(9)), Cut(5, frozenset({1}))),
    ),
    (
        "succession",
        partial(
            lied,
            lambda s: replace(s, carried=Microcredits(0)),
            Cut(5, frozenset({1})),
            Cut(6, frozenset({1}), back=True),
        ),
    ),
    ("epoch 2: offers", partial(lied, partial(cheaper, output=9), Cut(5, frozenset({1})))),
    ("epoch 2: offers", partial(lied, partial(cheaper, replayed=9), Cut(5, frozenset({1})))),
    ("epoch 3: offers", lambda: sealed(put(3, offers=epoch(1).offers))),
    ("epoch 3: stage certificates", lambda: sealed(put(3, stage_certs=epoch(1).stage_certs))),
    # Frames, drafts and replays.
    ("frames", partial(frames_of, 1, 4, None)),
    ("frames", partial(frames_of, 3, 0, None)),
    ("frames", partial(frames_of, 3, 0, lambda f: (*f[:2], f[2] - 1, *f[3:]))),
    ("frames", partial(frames_of, 3, 0, lambda f: (*f[:6], False))),
    ("frames", partial(frames_of, 3, 1, lambda f: (f[0] - 1, *f[1:]))),
    ("frames", lambda: sealed(put(2, frames=(*epoch(3).frames[:1], *epoch(2).frames)))),
    ("frames", lambda: sealed(put(4, frames=()))),
    ("frames", accepted_otherwise),
    (
        "frames",
        lambda: frames_of(1, drafted(1, accepted=True), lambda f: drafts_of(f, (9, *f[3][1:]))),
    ),
    (
        "epoch 1: ring",
        lambda: frames_of(1, drafted(1, accepted=True), lambda f: drafts_of(f, (*f[3][:-1], 9))),
    ),
    ("frames", lambda: frames_of(1, drafted(1, accepted=True), lambda f: drafts_of(f, ()))),
    (
        "frames",
        lambda: frames_of(1, drafted(1, accepted=True), lambda f: drafts_of(f, f[3][:-1])),
    ),
    (
        "frames",
        lambda: frames_of(1, drafted(1, accepted=True), lambda f: drafts_of(f, (9,) * 17)),
    ),
    # The cut.
    ("frames", lambda: sealed(put(1, cut=None))),
    ("frames", partial(cut_of, 1, traversal=3)),
    ("frames", lambda: sealed(put(4, cut=CutEvidence(8, (None,) * 3, None)))),
    ("epoch 1: receipts complete", partial(cut_of, 1, receipts=())),
    ("epoch 1: voucher", lambda: cut_of(1, receipts=epoch(1).cut.receipts[:1])),  # type: ignore[union-attr]
    ("epoch 1: voucher", partial(cut_receipts, 1, 0, None)),
    ("epoch 1: receipts of stage 0", partial(cut_receipts, 1, 0, epoch(1).receipts[0])),
    ("epoch 1: receipts of stage 1", lambda: cut_receipts(1, 1, epoch(1).cut.receipts[0])),  # type: ignore[union-attr]
    ("epoch 1: receipts of stage 0", partial(cut_receipt, 1, 0, output_tokens=9)),
    ("epoch 1: receipts of stage 0", partial(cut_receipt, 1, 0, rejected_draft_tokens=9)),
    ("epoch 1: receipts of stage 0", partial(cut_receipt, 1, 0, previous_digest=b"")),
    ("epoch 1: ring", partial(cut_receipt, 1, 0, input_commit=bytes(32))),
    ("epoch 1: ring", partial(cut_receipt, 1, 2, output_commit=bytes(32))),
    ("epoch 3: hand-offs", partial(cut_receipt, 3, 1, input_commit=bytes(32))),
    ("epoch 1: voucher", partial(voucher, 1, pay_the_lost)),
    ("epoch 1: voucher", partial(voucher, 1, lambda m: setattr(m, "epoch_close", False))),
    ("epoch 1: voucher", partial(voucher, 1, lambda m: setattr(m, "rejected_draft_tokens", 9))),
    ("epoch 1: voucher", lambda: sealed(put(1, voucher=None))),
    ("epoch 2: voucher", lambda: sealed(put(2, voucher=epoch(1).voucher))),
    ("epoch 4: voucher", partial(voucher, 4, lambda m: setattr(m, "epoch_close", True))),
    ("epoch 2: draws of the cut", partial(draws, 2, output_commit=bytes(32))),
    ("epoch 2: draws of the cut", partial(draws, 2, traversal=1)),
    ("epoch 2: draws of the cut", partial(draws, 2, epoch=1)),
    ("epoch 2: draws of the cut", partial(draws, 2, key="stage 0 ledger")),
    # Who was built by a replay says so in each receipt.
    ("epoch 2: receipts of stage 1", partial(receipt, 2, 1, replayed_tokens=0)),
    ("epoch 3: receipts of stage 2", partial(receipt, 3, 2, replayed_tokens=1)),
    ("epoch 3: receipts of stage 1", partial(receipt, 3, 1, replayed_tokens=0)),
    ("epoch 1: receipts of stage 1", partial(receipt, 1, 1, replayed_tokens=1)),
    ("epoch 4: ring", partial(receipt, 4, 0, 1, input_commit=bytes(32))),
    (
        "coverage",
        lambda: sealed(
            PaperCourse(PLOT, [Cut(6, frozenset({1}), silent=frozenset({0}))]).play().bundle_parts()
        ),
    ),
    (
        "coverage",
        lambda: sealed(
            PaperCourse(
                PLOT, [Cut(6, frozenset({1}), silent=frozenset({0}), forgot=frozenset({0}))]
            )
            .play()
            .bundle_parts()
        ),
    ),
    # Credit.
    ("reservation and grant", lambda: sealed(put(2, reservation=None))),
    ("reservation and grant", lambda: sealed(put(2, grant=epoch(1).grant))),
    (
        "reservation and grant",
        lambda: sealed(put(4, reservation=epoch(3).reservation, grant=epoch(3).grant)),
    ),
    (
        "reservation and grant",
        partial(reservation, 2, lambda m: setattr(m.caps[0], "payee", key_of("x").peer_id)),
    ),
    ("reservation and grant", partial(reservation, 3, lambda m: m.caps.pop())),
    ("reservation and grant", partial(reservation, 3, lambda m: setattr(m, "epoch", 2))),
    (
        "reservation and grant",
        partial(reservation, 3, lambda m: setattr(m, "route_digest", bytes(32))),
    ),
    ("caps", partial(reservation, 2, lambda m: setattr(m.caps[0], "microcredits", 1))),
    ("caps", partial(reservation, 3, lambda m: setattr(m.caps[1], "microcredits", 1))),
    ("journal", partial(journal, lambda e: e.pop(e.index(holding(e, 1))))),
    ("journal", partial(journal, lambda e: setattr(holding(e, 1), "cause_digest", bytes(32)))),
    ("journal", partial(journal, swap_holds)),
    ("journal", partial(journal, lambda e: e.insert(4, holding(e, 1)))),
    ("journal", partial(journal, lambda e: setattr(e[-1], "kind", 3))),
]


def test_the_honest_course_is_verified() -> None:
    report = verify_bundle(DATA, NETWORK)
    assert report.outcome == "verified", report.lines()
    assert "4 epochs" in "\n".join(report.lines())
    cut = epoch(2).cut
    assert cut is not None
    assert cut.receipts[2] is None
    assert epoch(4).reservation is None


@pytest.mark.parametrize(("name", "lie"), LIES, ids=[f"{i}-{n}" for i, (n, _) in enumerate(LIES)])
def test_each_lie_is_false_and_named(name: str, lie: Lie) -> None:
    report = verify_bundle(lie(), NETWORK)
    assert report.outcome == "false"
    assert name in failures(report), report.lines()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("plait.bundle.v9", "the format is not plait.bundle.v3"),
        (
            "plait.bundle.v2",
            "plait.bundle.v2 is the format of an earlier Plait; this one reads plait.bundle.v3",
        ),
    ],
)
def test_another_format_is_told_as_such(name: str, reason: str) -> None:
    report = verify_bundle(rewritten(lambda d: d.update(format=name)), NETWORK)
    assert failures(report) == {"encoding": reason}


@pytest.mark.parametrize(
    ("claim", "parts"),
    [
        ("epoch 2: draws of the cut", lambda: put(2, cut=replace(epoch(2).cut, draws=None))),  # type: ignore[type-var]
        ("reservation and grant", lambda: put(3, grant=None)),
    ],
)
def test_missing_evidence_is_incomplete(claim: str, parts: Callable[[], BundleParts]) -> None:
    report = verify_bundle(sealed(parts()), NETWORK)
    assert report.outcome == "incomplete", report.lines()
    assert claim in [item.name for item in report.claims if item.ok is None]


# Nothing that anybody may send makes the verifier raise.


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for step, item in items:
        yield (*path, step)
        if isinstance(item, dict | list):
            yield from places(item, (*path, step))


PLACES = [path for path in places(json.loads(DATA)) if path[0] != "seal"]
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    1,
    2,
    7,
    2**32 - 1,
    2**53 - 1,
    "",
    "x",
    [],
    {},
    str(2**63),
)


def mutated(rng: random.Random) -> bytes:
    def change(document: Any) -> None:
        for _ in range(rng.choice([1, 1, 2])):
            *way, step = rng.choice(PLACES)
            place = document
            for inner in way:
                place = place[inner]
            match rng.randrange(4):
                case 0 if isinstance(place, list):
                    del place[step]
                case 1 if isinstance(place, list):
                    place.insert(step, rng.choice(place))
                case 2 if isinstance(place[step], int):
                    place[step] = max(place[step] + rng.choice([-1, 1]), 0)
                case _:
                    place[step] = rng.choice(VALUES)

    try:
        return rewritten(change)
    except (IndexError, KeyError, TypeError):
        return DATA[: rng.randrange(len(DATA))]


SIGNERS = (
    "client",
    "client ledger",
    "authority ledger",
    *(f"{name} ledger" for names in NAMES for name in names),
)
KEYS = {key_of(name).public.hex(): key_of(name) for name in SIGNERS}


def signed_damage(rng: random.Random) -> bytes:
    """One signed payload is damaged, and signed again by its signer."""

    def change(document: Any) -> None:
        envelopes = [
            path[:-1] for path in PLACES if path[-1] == "payload" and path[0] != "client_cert"
        ]
        place = document
        for step in rng.choice(envelopes):
            place = place[step]
        payload = bytearray(base64.b64decode(place["payload"]))
        at = rng.randrange(len(payload))
        match rng.randrange(3):
            case 0:
                payload[at] ^= 1 << rng.randrange(8)
            case 1:
                del payload[at]
            case _:
                payload.insert(at, rng.randrange(256))
        key = KEYS.get(base64.b64decode(place["signer"]).hex())
        place["payload"] = base64.b64encode(payload).decode()
        if key is not None:
            signature = key.sign(pae(place["payload_type"], bytes(payload)))
            place["signature"] = base64.b64encode(signature).decode()

    return rewritten(change)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [mutated, signed_damage])
def test_no_damage_makes_the_verifier_raise(damage: Callable[[random.Random], bytes]) -> None:
    rng = random.Random(8)
    for number in range(150):
        report = verify_bundle(damage(rng), NETWORK)
        details = [claim.detail for claim in report.claims]
        assert not any("internal" in detail for detail in details), number
