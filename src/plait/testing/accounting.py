"""A whole accounted session in memory: fake activations, real keys, books and ledger.

Everything follows from the arguments, so that two runs give the same bytes. It is what
tests and test vectors are made of; it computes no model.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from plait.envelope import digest, encode, open_envelope, seal
from plait.identity import SigningKey
from plait.ledger.balances import Entry
from plait.ledger.bundle import BundleParts, EpochParts, Frame, InclusionProof
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.client_books import ClientBooks
from plait.ledger.cosignature import cosign
from plait.ledger.escrow import EscrowTerms
from plait.ledger.handoff import ids_payload
from plait.ledger.journal import (
    Accepted,
    Books,
    Command,
    Expire,
    Forfeit,
    Issue,
    Reserve,
    SetSubAccount,
    Settle,
)
from plait.ledger.merkle import Tree, leaf_hash
from plait.ledger.opening import opening_to_message, route_digest
from plait.ledger.progress import Progress
from plait.ledger.reserve import check_grant, make_reservation
from plait.ledger.stage_books import StageBooks
from plait.ledger.sub_accounts import SubAccount, terms_message
from plait.ledger.terms import SessionTerms, StageTerms
from plait.network_file import Authority, NetworkFile, Witness
from plait.prices_wire import prices_to_message
from plait.types import AccountId, Digest, ModelShape, Prices, Sampling, SessionId, Span, WireDtype
from plait.v1.bundle_pb2 import ModelManifest
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    ReservationGrant,
    SessionVoucher,
    SettlementRequest,
    SubAccountOrder,
)
from plait.v1.offer_pb2 import EVIDENCE_LEVEL_STAGE_RECEIPTS, OFFER_STATE_READY, Offer

NETWORK_ID = "plait-paper-net"
NOW_MS = 1_790_000_000_000
HOUR_MS = 3_600_000
END_ID = 2
NUMERIC_CLASS = "paper/fp32/threads-1"


@cache
def key_of(name: str) -> SigningKey:
    """A key that follows from a name. Never use one outside tests."""
    return SigningKey.from_seed(hashlib.sha256(b"plait.testing\0" + name.encode()).digest())


def paper_network(**changes: object) -> NetworkFile:
    """A network with one ledger authority."""
    authority = Authority(
        peer=key_of("authority").peer_id,
        address="127.0.0.1:4711",
        ledger_key=key_of("authority ledger").public,
        log_key=key_of("authority log").public,
        log_origin="plait.example/paper-log",
        certificate=b"",
    )
    fields: dict[str, object] = {
        "network_id": NETWORK_ID,
        "founder": key_of("founder").peer_id,
        "admission": "open",
        "issuer_key": key_of("issuer").public,
        "authorities": (authority,),
        "bootstrap": (),
    }
    return NetworkFile(**{**fields, **changes})  # type: ignore[arg-type]


def witnessed_network() -> NetworkFile:
    """The same with three witnesses, of which two are needed."""
    witnesses = tuple(Witness(f"w{i}.example", key_of(f"witness {i}").public) for i in range(3))
    return paper_network(witnesses=witnesses, witness_quorum=2)


def cosigned_by(checkpoint: str, witnesses: Iterable[int]) -> str:
    """A checkpoint with the cosignatures of some witnesses of ``witnessed_network``."""
    time_s = NOW_MS // 1000
    return checkpoint + "".join(
        cosign(key_of(f"witness {i}"), f"w{i}.example", checkpoint, time_s) for i in witnesses
    )


@dataclass(frozen=True, slots=True)
class Plot:
    """What happens in a session: the route, the sizes, and what is drawn."""

    spans: tuple[Span, ...] = (Span(0, 3), Span(3, 4), Span(4, 8))
    prompt_ids: tuple[int, ...] = (5, 6, 7, 8, 9)
    drawn_ids: tuple[int, ...] = (10, 11, 12, 13, 14, 15, 16, END_ID)
    max_tokens: int = 20
    chunk_tokens: int = 4
    prefill_chunk_tokens: int = 3
    prices: Prices = field(default_factory=lambda: Prices(prompt=500_000, output=2_000_000))
    session: str = "session"
    sub_account: str = ""
    wire_dtype: WireDtype = "fp32"
    escrow_percent: int = 0
    """Of what is paid; the first stage's is forfeited, the others' goes back."""

    @property
    def numeric_class(self) -> str:
        """What the stages' offers state."""
        return NUMERIC_CLASS if self.wire_dtype == "fp32" else "paper/int4/kernel/f32/t1"

    @property
    def shape(self) -> ModelShape:
        """The shape of the model that the manifest describes."""
        return ModelShape(
            name="paper",
            digest=digest(self.manifest),
            layers=self.spans[-1].end,
            head_cost_layers=2,
        )

    @property
    def manifest(self) -> bytes:
        """The payload of the model's manifest."""
        message = ModelManifest(
            name="paper",
            architecture="paper",
            layers=self.spans[-1].end,
            hidden_size=4,
            vocabulary_size=50_000,
            context_length=100_000,
            head_cost_layers=2,
            tokenizer_sha256=hashlib.sha256(b"tokenizer").digest(),
            config_sha256=hashlib.sha256(b"config").digest(),
        )
        return encode(message)

    def frames(self) -> Iterator[Frame]:
        """Every frame that the driver sends, the one that only closes included."""
        prompt, traversal = len(self.prompt_ids), 0
        for start in range(0, prompt, self.prefill_chunk_tokens):
            rows = min(self.prefill_chunk_tokens, prompt - start)
            yield traversal, start, rows, (), start + rows == prompt, True, False
            traversal += 1
        steps = len(self.drawn_ids) - 1
        for step in range(1, steps + 1):
            full = step % self.chunk_tokens == 0 or step + 1 == self.max_tokens
            yield traversal, prompt + step - 1, 1, (), True, full, False
            traversal += 1
        if steps % self.chunk_tokens and len(self.drawn_ids) < self.max_tokens:
            yield traversal, prompt + steps, 0, (), False, True, False


def offer_of(plot: Plot, index: int) -> SignedEnvelope:
    """The signed offer of one stage's peer in the first epoch."""
    return offer_by(f"stage {index}", plot.spans[index], plot)


def offer_by(name: str, span: Span, plot: Plot) -> SignedEnvelope:
    """The signed offer of a named peer for a span."""
    offer = Offer(
        network_id=NETWORK_ID,
        model_digest=plot.shape.digest,
        start_layer=span.start,
        end_layer=span.end,
        incarnation=1,
        sequence=1,
        issued_ms=NOW_MS - 5_000,
        expires_ms=NOW_MS + 55_000,
        state=OFFER_STATE_READY,
        evidence=EVIDENCE_LEVEL_STAGE_RECEIPTS,
        prices=prices_to_message(plot.prices),
        numeric_class=plot.numeric_class,
    )
    return seal(key_of(name), offer)


def terms_of(plot: Plot) -> SessionTerms:
    """The terms that client and stages agree on."""
    stages = tuple(
        StageTerms(
            peer=key_of(f"stage {index}").peer_id,
            ledger_key=key_of(f"stage {index} ledger").public,
            span=span,
            priced_layers=plot.shape.priced_layers(span),
            prices=plot.prices,
            numeric_class=plot.numeric_class,
            offer_digest=digest(offer_of(plot, index).payload),
        )
        for index, span in enumerate(plot.spans)
    )
    return SessionTerms(
        network_id=NETWORK_ID,
        session_id=SessionId(hashlib.sha256(plot.session.encode()).digest()[:16]),
        epoch=1,
        client=key_of("client").peer_id,
        client_ledger_key=key_of("client ledger").public,
        model_digest=plot.shape.digest,
        stages=stages,
        prompt_tokens=len(plot.prompt_ids),
        max_tokens=plot.max_tokens,
        chunk_tokens=plot.chunk_tokens,
        prefill_chunk_tokens=plot.prefill_chunk_tokens,
        handoff_salt=hashlib.sha256(b"salt " + plot.session.encode()).digest(),
        wire_dtype=plot.wire_dtype,
    )


def grant_of(reservation: SignedEnvelope) -> SignedEnvelope:
    """The ledger authority's yes to a reservation."""
    asked = open_envelope(reservation, BudgetReservation)
    grant = ReservationGrant(
        network_id=asked.network_id,
        reservation_digest=digest(reservation.payload),
        account=asked.account,
        session_id=asked.session_id,
        amount=asked.amount,
        granted_ms=NOW_MS,
        expires_ms=asked.expires_ms,
        merge_delay_ms=1_000,
    )
    return seal(key_of("authority ledger"), grant)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the ledger answers about a session."""

    entries: tuple[bytes, ...]
    proofs: tuple[InclusionProof, ...]
    checkpoint: str


Wire = Callable[[int, int, bytes], bytes]
"""What a boundary does to a payload: (boundary, traversal, payload) → payload received."""


class PaperSession:
    """A session played through real books; ``wire`` may alter what crosses a boundary."""

    def __init__(self, plot: Plot, wire: Wire = lambda boundary, traversal, data: data) -> None:
        self.plot = plot
        self.terms = terms_of(plot)
        self.wire = wire
        self.reservation = make_reservation(
            key_of("client ledger"),
            self.terms,
            0,
            1,
            NOW_MS,
            HOUR_MS,
            route_digest(self.terms),
            sub_account=plot.sub_account,
        )
        self.grant = grant_of(self.reservation)
        authority = paper_network().authorities[0]
        self.client = ClientBooks(self.terms, key_of("client ledger"))
        self.stages = [
            StageBooks(
                self.terms,
                index,
                key_of(f"stage {index} ledger"),
                check_grant(self.grant, self.reservation, authority, self.terms, index, NOW_MS),
            )
            for index in range(len(plot.spans))
        ]
        self.frames = tuple(plot.frames())
        self.progress = Progress(self.terms)
        self.vouchers: list[SignedEnvelope] = []

    def play(self) -> "PaperSession":
        """Send every frame and pay every chunk."""
        for frame in self.frames:
            receipts = self.traverse(frame)
            if frame[5]:
                self.pay(receipts, frame[0])
        return self

    def traverse(self, frame: Frame) -> list[SignedEnvelope]:
        """Send one frame through all stages; returns the receipts if it closes a chunk."""
        traversal, first_position, rows, _, sample, close_chunk, _ = frame
        sequence = (*self.plot.prompt_ids, *self.plot.drawn_ids)
        ids = sequence[first_position : first_position + rows]
        self.client.sent(traversal, first_position, ids)
        taken = self.progress.take(first_position, rows, sample=sample, close_chunk=close_chunk)
        payload, receipts = ids_payload(ids), []
        for index, books in enumerate(self.stages):
            payload = self.wire(index, traversal, payload)
            books.admit(taken)
            books.received(traversal, first_position, rows, payload)
            payload, sent_rows = self._computed(index, frame)
            books.sent(traversal, first_position, sent_rows, payload)
            if index == len(self.stages) - 1:
                books.drew_from(traversal, first_position, sent_rows, b"what was drawn from")
            if close_chunk:
                now_ms = NOW_MS + 10 * traversal
                receipts.append(books.close_chunk(traversal, taken.counts, now_ms))
        self.client.drawn(traversal, first_position, self._drawn(frame))
        return receipts

    def pay(self, receipts: Sequence[SignedEnvelope], traversal: int) -> SignedEnvelope:
        """Let the client check the receipts, and every stage take the voucher."""
        voucher = self.client.accept_receipts(receipts, traversal, NOW_MS + 10 * traversal + 5)
        for books in self.stages:
            books.accept_voucher(voucher)
        self.vouchers.append(voucher)
        return voucher

    def bundle_parts(self) -> BundleParts:
        """The evidence of the session, settled and logged."""
        evidence = self.settle()
        epoch = EpochParts(
            terms=self.terms,
            session_open=opening_of(self.terms),
            stage_certs=tuple(cert_of(f"stage {i}") for i in range(len(self.stages))),
            offers=tuple(offer_of(self.plot, i) for i in range(len(self.stages))),
            frames=self.frames,
            reservation=self.reservation,
            grant=self.grant,
            receipts=self.client.receipts,
            cut=None,
            voucher=self.vouchers[-1],
        )
        return BundleParts(
            network_id=NETWORK_ID,
            client_cert=cert_of("client"),
            manifest=self.plot.manifest,
            prompt_ids=self.plot.prompt_ids,
            token_ids=self.plot.drawn_ids,
            text="Hi “there” \u0007\n",
            finish_reason="stop" if self.plot.drawn_ids[-1] == END_ID else "length",
            epochs=(epoch,),
            entries=evidence.entries,
            proofs=evidence.proofs,
            checkpoint=evidence.checkpoint,
            sealed_ms=NOW_MS + 60_000,
        )

    def settle(self) -> Evidence:
        """Book the session in a fresh ledger, with some strangers' entries around it."""
        reservation = open_envelope(self.reservation, BudgetReservation)
        commands: list[Command] = []
        if self.plot.sub_account:
            commands.append(_open_sub_account(self.plot.sub_account))
        commands.append(Reserve(reservation, digest(self.reservation.payload)))
        commands += [settlement_of(books) for books in self.stages]
        return evidence_of(commands, self.terms.session_id, self.plot.escrow_percent)

    def _computed(self, index: int, frame: Frame) -> tuple[bytes, int]:
        if index == len(self.stages) - 1:
            drawn = self._drawn(frame)
            return ids_payload(drawn), len(drawn)
        activations = hashlib.sha256(b"%d %d" % (index, frame[0])).digest()
        return activations * frame[2], frame[2]

    def _drawn(self, frame: Frame) -> tuple[int, ...]:
        if not frame[4]:
            return ()
        draw = frame[1] + frame[2] - len(self.plot.prompt_ids)
        return self.plot.drawn_ids[draw : draw + 1]


def settlement_of(books: StageBooks) -> Settle:
    """A stage's request to be paid by its best voucher, as the ledger books it."""
    request, voucher = books.settlement(NOW_MS + 40_000, True), books.voucher
    assert request is not None and voucher is not None
    return Settle(
        voucher=open_envelope(voucher, SessionVoucher),
        voucher_digest=digest(voucher.payload),
        request=open_envelope(request, SettlementRequest),
        request_digest=digest(request.payload),
    )


def evidence_of(
    commands: Sequence[Command], session_id: SessionId, escrow_percent: int = 0
) -> Evidence:
    """Book a session's commands in a fresh ledger, with strangers' entries around them."""
    before: list[Command] = [_issue("client", 1), _issue("stranger", 2)]
    after: list[Command] = [_issue("stranger", 3)]
    if escrow_percent:
        exposed = AccountId(key_of("stage 0").peer_id)
        after += [Forfeit(session_id, exposed, digest(b"a judged exposure")), Expire()]
    escrow = EscrowTerms(escrow_percent, window_ms=0)
    entries = tuple(_book([*before, *commands, *after], escrow))
    tree = Tree(leaf_hash(entry.payload) for entry in entries)
    own = [entry for entry in entries if entry.session_id == session_id]
    log_key, origin = key_of("authority log"), paper_network().authorities[0].log_origin
    return Evidence(
        entries=tuple(entry.payload for entry in own),
        proofs=tuple((e.index, tuple(tree.inclusion_proof(e.index, tree.size))) for e in own),
        checkpoint=sign_checkpoint(log_key, origin, tree.size, tree.root()),
    )


def opening_of(terms: SessionTerms) -> SignedEnvelope:
    """The client's signed opening of an epoch."""
    sampling = Sampling(end_ids=(END_ID,))
    message = opening_to_message(terms, sampling, NOW_MS, NOW_MS + HOUR_MS)
    return seal(key_of("client ledger"), message)


def cert_of(name: str) -> SignedEnvelope:
    """The certificate by which a named peer delegates to its ledger key."""
    ledger_public = key_of(f"{name} ledger").public
    return make_key_cert(key_of(name), ledger_public, NETWORK_ID, NOW_MS - 1_000, 24 * HOUR_MS, 1)


def _issue(name: str, number: int) -> Issue:
    order = IssueOrder(
        network_id=NETWORK_ID,
        account=key_of(name).peer_id,
        amount=10**15,
        order_id=number.to_bytes(16, "big"),
        issued_ms=NOW_MS,
    )
    return Issue(order, Digest(digest(encode(order))))


def _open_sub_account(name: str) -> SetSubAccount:
    terms = terms_message(SubAccount(AccountId(key_of("client").peer_id), name, 1))
    order = SubAccountOrder(network_id=NETWORK_ID, terms=terms, issued_ms=NOW_MS)
    return SetSubAccount(order, Digest(digest(encode(order))))


def _book(commands: Sequence[Command], escrow: EscrowTerms) -> Iterator[Entry]:
    books = Books(NETWORK_ID, escrow)
    for command in commands:
        outcome = books.apply(command, NOW_MS + 40_000)
        assert isinstance(outcome, Accepted), outcome
        yield from outcome.entries
