"""Whether a stage takes a session, and why not. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from plait.envelope import open_envelope
from plait.errors import PlaitError, RemoteProtocolError
from plait.ledger.certs import check_key_cert
from plait.ledger.opening import terms_from_message
from plait.node.sessions import HOLD_MS, StageSession
from plait.router.view import Offer, View
from plait.types import Digest, ModelShape, PeerId
from plait.v1 import session_pb2
from plait.v1.identity_pb2 import SignedEnvelope

STAGES_MAX = 64


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


def examine(
    request: session_pb2.OpenRequest, caller: PeerId, me: StageIdentity, view: View, now_ms: int
) -> StageSession:
    """Check an opening; return the session to hold.

    Raises ``Refused`` for terms this stage does not take and ``RemoteProtocolError`` or
    ``BadSignature`` for a request that breaks the protocol.
    """
    if me.draining:
        raise Refused("draining", "this node is draining", retry_after_ms=60_000)
    message = _signed_opening(request.session_open, request.client_cert, caller, me, now_ms)
    stages = message.route.stages
    if len(stages) > STAGES_MAX:
        raise RemoteProtocolError(f"a route has at most {STAGES_MAX} stages")
    if request.stage_index >= len(stages):
        raise RemoteProtocolError("the stage index is outside the route")
    offer = me.offers.get(Digest(stages[request.stage_index].offer_digest))
    if offer is None:
        raise Refused("price", "the offer named is not a current one", retry_after_ms=1_000)
    numeric_classes = [offer.numeric_class] * len(stages)
    terms, sampling = terms_from_message(
        message, request.session_open.signer, numeric_classes, [b""] * len(stages)
    )
    session = StageSession(
        terms=terms,
        sampling=sampling,
        stage_index=request.stage_index,
        client_cert=request.client_cert,
        expires_ms=now_ms + HOLD_MS,
    )
    _check_own_stage(session, me, offer)
    _check_size(session, me)
    if not session.is_last and session.downstream not in view.offers:
        raise Refused("neighbour", f"the next stage {session.downstream} is unknown here", 1_000)
    return session


def _signed_opening(
    envelope: SignedEnvelope, cert: SignedEnvelope, caller: PeerId, me: StageIdentity, now_ms: int
) -> session_pb2.SessionOpen:
    _, ledger_key = check_key_cert(cert, me.network_id, now_ms, peer=caller)
    message = open_envelope(envelope, session_pb2.SessionOpen, signer=ledger_key)
    if message.network_id != me.network_id:
        raise RemoteProtocolError("the opening is for another network")
    if message.client_peer_id != caller:
        raise RemoteProtocolError("the opening names another client")
    if message.expires_ms <= now_ms:
        raise RemoteProtocolError("the opening has expired")
    return message


def _check_own_stage(session: StageSession, me: StageIdentity, offer: Offer) -> None:
    stage = session.terms.stages[session.stage_index]
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


def _check_size(session: StageSession, me: StageIdentity) -> None:
    if session.tokens_max > me.context_length:
        raise Refused("terms", f"the context ends at {me.context_length} tokens")


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
