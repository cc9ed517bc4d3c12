"""Whether a stage takes a session, and why not: its terms, its credit. Pure.

A session that is unknown here is opened with all its terms checked against a current offer.
One that is known may only be opened again in a higher epoch, by its client, with the same
terms for this stage: then its cache and its books go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from google.protobuf.message import DecodeError

from plait.envelope import open_envelope
from plait.errors import PlaitError, RemoteProtocolError
from plait.ledger.certs import NOTHING_REVOKED, check_key_cert
from plait.ledger.committee import check_grants
from plait.ledger.opening import qos_from_message, terms_from_message
from plait.ledger.reserve import check_supplement
from plait.ledger.terms import SessionTerms
from plait.network_file import Authority
from plait.node.sessions import HOLD_MS, StageSession
from plait.node.wire import takes_width
from plait.router.view import Offer, View
from plait.types import Digest, Microcredits, ModelShape, PeerId, Qos, Sampling, SessionId
from plait.v1 import session_pb2
from plait.v1.identity_pb2 import SignedEnvelope

STAGES_MAX = 64
DRAINING_RETRY_MS = 60_000
UNWITNESSED_RETRY_MS = 30_000


class Refused(Exception):
    """An expected refusal: a stable word, a reason for a person, when to retry."""

    def __init__(self, code: str, reason: str, retry_after_ms: int = 0) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.retry_after_ms = retry_after_ms


@dataclass(frozen=True, slots=True)
class StageIdentity:
    """What a stage checks an opening against. ``offers`` are its own recent ones by digest."""

    network_id: str
    peer: PeerId
    shape: ModelShape
    context_length: int
    offers: Mapping[Digest, Offer]
    draining: bool
    revoked: Mapping[PeerId, int] = field(default_factory=lambda: NOTHING_REVOKED)
    """The least serial that still counts, of peers that revoked keys."""
    unwitnessed: str = ""
    """Why no new session is taken while the ledger's witnesses are behind; empty: they are."""


@dataclass(frozen=True, slots=True)
class Opening:
    """An opening whose signature and certificate hold."""

    message: session_pb2.SessionOpen
    stage_index: int
    client_ledger_key: bytes
    client_cert: SignedEnvelope

    @property
    def session_id(self) -> SessionId:
        """Which session it is for."""
        return SessionId(self.message.session_id)

    @property
    def enters(self) -> bool:
        """Whether this stage begins a new stint, so that nothing of an earlier one counts."""
        own = self.message.route.stages[self.stage_index]
        return own.entered_epoch == self.message.epoch

    def is_above(self, known: StageSession) -> bool:
        """Whether it is its client's opening of a higher epoch of a session known here."""
        return (
            self.message.client_peer_id == known.terms.client
            and self.message.epoch > known.terms.epoch
        )


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What an opening asks for, of which nothing was checked: good enough to say no."""

    session_id: SessionId
    tokens: int
    qos: Qos
    resumes: bool


def glimpse(request: session_pb2.OpenRequest) -> Glimpse | None:
    """Read what a refusal for want of room takes; None if it cannot be read."""
    message = session_pb2.SessionOpen()
    try:
        message.ParseFromString(request.session_open.payload)
        qos = qos_from_message(message.qos)
    except (DecodeError, ValueError):
        return None
    tokens = message.prompt_tokens + message.max_tokens
    return Glimpse(SessionId(message.session_id), tokens, qos, resumes=message.epoch > 1)


def read_opening(
    request: session_pb2.OpenRequest, caller: PeerId, me: StageIdentity, now_ms: int
) -> Opening:
    """Check who signed an opening, for whom, and that its stage is ours.

    Raises ``Refused`` while draining and ``RemoteProtocolError`` or ``BadSignature`` for a
    request that breaks the protocol.
    """
    if me.draining:
        raise Refused("draining", "this node is draining", DRAINING_RETRY_MS)
    message = _signed_opening(request.session_open, request.client_cert, caller, me, now_ms)
    stages = message.route.stages
    if len(stages) > STAGES_MAX:
        raise RemoteProtocolError(f"a route has at most {STAGES_MAX} stages")
    if request.stage_index >= len(stages):
        raise RemoteProtocolError("the stage index is outside the route")
    return Opening(message, request.stage_index, request.session_open.signer, request.client_cert)


def examine(opening: Opening, me: StageIdentity, view: View, now_ms: int) -> StageSession:
    """Check a session that is new here; return it, to be held.

    Raises ``Refused`` for terms this stage does not take and ``RemoteProtocolError`` for
    those that no session has.
    """
    if me.unwitnessed:
        raise Refused("unwitnessed", me.unwitnessed, UNWITNESSED_RETRY_MS)
    own = opening.message.route.stages[opening.stage_index]
    if opening.message.epoch > 1 and own.entered_epoch != opening.message.epoch:
        raise Refused("terms", "this stage does not know the session any more")
    offer = me.offers.get(Digest(own.offer_digest))
    if offer is None:
        raise Refused("price", "the offer named is not a current one", retry_after_ms=1_000)
    terms, sampling = _terms(opening, offer.numeric_class)
    session = StageSession(
        terms=terms,
        sampling=sampling,
        stage_index=opening.stage_index,
        client_cert=opening.client_cert,
        expires_ms=now_ms + HOLD_MS,
        audit_commit=opening.message.audit_commit,
    )
    _check_own_stage(session, me, offer)
    if not takes_width(me.shape.bytes_per_row // 4, terms.wire_dtype):
        raise Refused("terms", f"activations of this model do not go in {terms.wire_dtype}")
    if session.tokens_max > me.context_length:
        raise Refused("terms", f"the context ends at {me.context_length} tokens")
    _check_downstream(terms, opening.stage_index, view)
    return session


def examine_next(opening: Opening, known: StageSession, view: View) -> SessionTerms:
    """Check a higher epoch of a session that is known here; return its terms.

    Raises as ``examine``; nothing has changed then.
    """
    if opening.message.epoch <= known.terms.epoch:
        raise RemoteProtocolError("this session is open already")
    if known.closed is None and known.received:
        raise RemoteProtocolError(f"epoch {known.terms.epoch} must be closed first")
    before = known.stage
    terms, sampling = _terms(opening, before.numeric_class)
    if terms.client != known.terms.client or sampling != known.sampling:
        raise RemoteProtocolError("a session keeps its client and its sampling")
    if opening.message.audit_commit != known.audit_commit:
        raise RemoteProtocolError("a session keeps what its client committed to for audits")
    sizes, earlier = _sizes(terms), _sizes(known.terms)
    if sizes != earlier:
        raise RemoteProtocolError("a session keeps its model and its sizes")
    stage = terms.stages[opening.stage_index]
    if replace(stage, rebuilt=before.rebuilt) != before:
        raise Refused("terms", "a stage that stays keeps its span, its prices and its base")
    if not stage.rebuilt and known.positions < terms.resume_position:
        raise Refused(
            "terms", f"{known.positions} positions are computed, not {terms.resume_position}"
        )
    _check_downstream(terms, opening.stage_index, view)
    return terms


def _sizes(terms: SessionTerms) -> tuple[object, ...]:
    return (
        terms.model_digest,
        terms.client_ledger_key,
        terms.prompt_tokens,
        terms.max_tokens,
        terms.chunk_tokens,
        terms.prefill_chunk_tokens,
        terms.qos,
        terms.wire_dtype,
    )


def _terms(opening: Opening, numeric_class: str) -> tuple[SessionTerms, Sampling]:
    stages = len(opening.message.route.stages)
    return terms_from_message(
        opening.message, opening.client_ledger_key, [numeric_class] * stages, [b""] * stages
    )


def _signed_opening(
    envelope: SignedEnvelope, cert: SignedEnvelope, caller: PeerId, me: StageIdentity, now_ms: int
) -> session_pb2.SessionOpen:
    _, ledger_key = check_key_cert(cert, me.network_id, now_ms, caller, me.revoked)
    message = open_envelope(envelope, session_pb2.SessionOpen, signer=ledger_key)
    if message.network_id != me.network_id:
        raise RemoteProtocolError("the opening is for another network")
    if message.client_peer_id != caller:
        raise RemoteProtocolError("the opening names another client")
    if message.expires_ms <= now_ms:
        raise RemoteProtocolError("the opening has expired")
    return message


def _check_own_stage(session: StageSession, me: StageIdentity, offer: Offer) -> None:
    stage = session.stage
    if stage.peer != me.peer:
        raise RemoteProtocolError("the stage index names another peer")
    if session.terms.model_digest != me.shape.digest:
        raise Refused("model", "another model is served here")
    if session.terms.stages[-1].span.end != me.shape.layers:
        raise RemoteProtocolError("the route does not end at the last layer")
    if not offer.span.contains(stage.span):
        raise Refused("span", f"layers {stage.span} are not served here, {offer.span} are")
    if stage.prices != offer.prices or stage.priced_layers != me.shape.priced_layers(stage.span):
        raise Refused("price", "the route's price is not the one offered")


def _check_downstream(terms: SessionTerms, stage_index: int, view: View) -> None:
    if stage_index + 1 < len(terms.stages):
        peer = terms.stages[stage_index + 1].peer
        if peer not in view.offers:
            raise Refused("neighbour", f"the next stage {peer} is unknown here", 1_000)


@dataclass(frozen=True, slots=True)
class Credit:
    """What a confirmation shows: a cap, once the ledger has granted it."""

    cap: Microcredits | None
    """None: none is shown yet (bounded credit), or none is needed (the stage stays)."""


def credit_of(
    request: session_pb2.ConfirmRequest,
    session: StageSession,
    authorities: Sequence[Authority],
    trusted: Sequence[Authority],
    now_ms: int,
) -> Credit:
    """Check the credit behind a confirmation.

    A stage that stays needs none; one that entered by a reroute may start on the client's
    reservation alone, which is kept until the grant for it comes; any other needs the
    ledger's grant. ``authorities`` are all of the network file, ``trusted`` those not caught
    lying. Raises ``VerificationError`` or ``RemoteProtocolError``.
    """
    entered = session.entry_terms
    index = next(
        index for index, stage in enumerate(entered.stages) if stage.peer == session.stage.peer
    )
    if request.HasField("grant"):
        cap = check_grants(
            request.grant,
            session.reservation or request.reservation,
            authorities,
            entered,
            index,
            now_ms,
            trusted=trusted,
        )
        return Credit(cap)
    if session.stays and session.books is not None:
        return Credit(None)
    if session.terms.epoch == 1:
        raise RemoteProtocolError("a session starts with the ledger's grant")
    check_supplement(request.reservation, entered, index, now_ms)
    session.reservation = request.reservation
    return Credit(None)


def refusal(error: Refused | PlaitError) -> session_pb2.Refusal:
    """A refusal or a capacity error as its message."""
    if isinstance(error, Refused):
        return session_pb2.Refusal(
            code=error.code, reason=error.reason, retry_after_ms=error.retry_after_ms
        )
    retry_after_s = getattr(error, "retry_after_s", 0.0)
    return session_pb2.Refusal(
        code=error.code, reason=str(error), retry_after_ms=int(retry_after_s * 1000)
    )
