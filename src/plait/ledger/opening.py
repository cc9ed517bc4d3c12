"""A session's terms on the wire: SessionOpen from and to values."""

from collections.abc import Sequence

from plait.envelope import digest, encode
from plait.errors import RemoteProtocolError
from plait.ledger.sampling_wire import sampling_from_message, sampling_to_message
from plait.ledger.terms import SessionTerms, StageTerms
from plait.prices_wire import prices_from_message, prices_to_message
from plait.types import (
    Digest,
    Microcredits,
    PeerId,
    Qos,
    Sampling,
    SessionId,
    Span,
    TokenCounts,
    WireDtype,
)
from plait.v1 import session_pb2

_DIGEST_BYTES = 32
_QOS_TO_MESSAGE: dict[Qos, session_pb2.Qos] = {
    "interactive": session_pb2.QOS_INTERACTIVE,
    "standard": session_pb2.QOS_STANDARD,
    "batch": session_pb2.QOS_BATCH,
}

_WIRE_TO_MESSAGE: dict[WireDtype, session_pb2.WireDtype] = {
    "fp32": session_pb2.WIRE_DTYPE_F32,
    "bf16": session_pb2.WIRE_DTYPE_BF16,
    "int8": session_pb2.WIRE_DTYPE_INT8,
}


def route_to_message(terms: SessionTerms) -> session_pb2.RoutePlan:
    """The route of a session as its protobuf message."""
    stages = [
        session_pb2.RouteStage(
            peer_id=stage.peer,
            start_layer=stage.span.start,
            end_layer=stage.span.end,
            offer_digest=stage.offer_digest,
            priced_layers=stage.priced_layers,
            prices=prices_to_message(stage.prices),
            entered_epoch=stage.entered_epoch,
            base=_counts_to_message(stage.base),
            carried_microcredits=stage.carried,
            replayed_tokens=stage.replayed,
            rebuilt=stage.rebuilt,
        )
        for stage in terms.stages
    ]
    return session_pb2.RoutePlan(model_digest=terms.model_digest, stages=stages)


def route_digest(terms: SessionTerms) -> Digest:
    """SHA-256 of the route: what a reservation commits to."""
    return digest(encode(route_to_message(terms)))


def opening_to_message(
    terms: SessionTerms,
    sampling: Sampling,
    issued_ms: int,
    expires_ms: int,
    audit_commit: bytes = b"",
) -> session_pb2.SessionOpen:
    """What the client signs to open a pipeline.

    ``audit_commit`` commits to the nonce that it reveals for audits (``lottery``).
    """
    return session_pb2.SessionOpen(
        network_id=terms.network_id,
        session_id=terms.session_id,
        epoch=terms.epoch,
        client_peer_id=terms.client,
        route=route_to_message(terms),
        sampling=sampling_to_message(sampling),
        prompt_tokens=terms.prompt_tokens,
        max_tokens=terms.max_tokens,
        chunk_tokens=terms.chunk_tokens,
        prefill_chunk_tokens=terms.prefill_chunk_tokens,
        wire_dtype=wire_to_message(terms.wire_dtype),
        handoff_salt=terms.handoff_salt,
        issued_ms=issued_ms,
        expires_ms=expires_ms,
        resume_position=terms.resume_position,
        qos=_QOS_TO_MESSAGE[terms.qos],
        start=_counts_to_message(terms.start),
        audit_commit=audit_commit,
    )


def terms_from_message(
    message: session_pb2.SessionOpen,
    client_ledger_key: bytes,
    numeric_classes: Sequence[str],
    ledger_keys: Sequence[bytes],
) -> tuple[SessionTerms, Sampling]:
    """Read a session's terms; raises ``RemoteProtocolError`` for anything out of range.

    ``numeric_classes`` and ``ledger_keys`` are per stage, ``""`` and ``b""`` where the
    reader does not know them.
    """
    try:
        sampling = sampling_from_message(message.sampling)
        stages = tuple(
            _stage_terms(stage, numeric_class, ledger_key)
            for stage, numeric_class, ledger_key in zip(
                message.route.stages, numeric_classes, ledger_keys, strict=True
            )
        )
        _check_route(message)
        terms = SessionTerms(
            network_id=message.network_id,
            session_id=SessionId(message.session_id),
            epoch=message.epoch,
            client=PeerId(message.client_peer_id),
            client_ledger_key=client_ledger_key,
            model_digest=Digest(message.route.model_digest),
            stages=stages,
            prompt_tokens=message.prompt_tokens,
            max_tokens=message.max_tokens,
            chunk_tokens=message.chunk_tokens,
            prefill_chunk_tokens=message.prefill_chunk_tokens,
            handoff_salt=message.handoff_salt,
            resume_position=message.resume_position,
            start=_counts_from_message(message.start),
            qos=qos_from_message(message.qos),
            wire_dtype=_wire_from_message(message.wire_dtype),
        )
    except ValueError as error:
        raise RemoteProtocolError(f"a session cannot have these terms: {error}") from error
    return terms, sampling


def _stage_terms(
    stage: session_pb2.RouteStage, numeric_class: str, ledger_key: bytes
) -> StageTerms:
    if len(stage.offer_digest) != _DIGEST_BYTES:
        raise ValueError("an offer digest is 32 bytes")
    return StageTerms(
        peer=PeerId(stage.peer_id),
        ledger_key=ledger_key,
        span=Span(stage.start_layer, stage.end_layer),
        priced_layers=stage.priced_layers,
        prices=prices_from_message(stage.prices),
        numeric_class=numeric_class,
        offer_digest=Digest(stage.offer_digest),
        entered_epoch=stage.entered_epoch,
        base=_counts_from_message(stage.base),
        carried=Microcredits(stage.carried_microcredits),
        replayed=stage.replayed_tokens,
        rebuilt=stage.rebuilt,
    )


def _counts_to_message(counts: TokenCounts) -> session_pb2.Counts:
    return session_pb2.Counts(
        prompt=counts.prompt,
        output=counts.output,
        cached_prompt=counts.cached_prompt,
        rejected_draft=counts.rejected_draft,
    )


def _counts_from_message(message: session_pb2.Counts) -> TokenCounts:
    return TokenCounts(
        prompt=message.prompt,
        output=message.output,
        cached_prompt=message.cached_prompt,
        rejected_draft=message.rejected_draft,
    )


def qos_from_message(value: session_pb2.Qos) -> Qos:
    """A protobuf number's class of service; raises ``ValueError``."""
    for qos, number in _QOS_TO_MESSAGE.items():
        if number == value:
            return qos
    raise ValueError("an unknown class of service")


def wire_to_message(wire_dtype: WireDtype) -> session_pb2.WireDtype:
    """A wire dtype as its protobuf number."""
    return _WIRE_TO_MESSAGE[wire_dtype]


def _wire_from_message(value: session_pb2.WireDtype) -> WireDtype:
    for wire_dtype, number in _WIRE_TO_MESSAGE.items():
        if number == value:
            return wire_dtype
    raise ValueError("an unknown wire dtype")


def _check_route(message: session_pb2.SessionOpen) -> None:
    if len(message.route.model_digest) != _DIGEST_BYTES:
        raise ValueError("a model digest is 32 bytes")
    layer = 0
    for stage in message.route.stages:
        if stage.start_layer != layer:
            raise ValueError("the stages do not abut from layer 0")
        layer = stage.end_layer
