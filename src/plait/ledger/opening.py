"""A session's terms on the wire: SessionOpen from and to values."""

from collections.abc import Sequence

from plait.envelope import digest, encode
from plait.errors import RemoteProtocolError
from plait.ledger.terms import SessionTerms, StageTerms
from plait.prices_wire import prices_from_message, prices_to_message
from plait.types import Digest, PeerId, Sampling, SessionId, Span
from plait.v1 import session_pb2

_DIGEST_BYTES = 32


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
        )
        for stage in terms.stages
    ]
    return session_pb2.RoutePlan(model_digest=terms.model_digest, stages=stages)


def route_digest(terms: SessionTerms) -> Digest:
    """SHA-256 of the route: what a reservation commits to."""
    return digest(encode(route_to_message(terms)))


def opening_to_message(
    terms: SessionTerms, sampling: Sampling, issued_ms: int, expires_ms: int
) -> session_pb2.SessionOpen:
    """What the client signs to open a pipeline."""
    return session_pb2.SessionOpen(
        network_id=terms.network_id,
        session_id=terms.session_id,
        epoch=terms.epoch,
        client_peer_id=terms.client,
        route=route_to_message(terms),
        sampling=session_pb2.Sampling(
            temperature_micros=sampling.temperature_micros,
            top_p_micros=sampling.top_p_micros,
            top_k=sampling.top_k,
            seed=sampling.seed,
            end_ids=sampling.end_ids,
        ),
        prompt_tokens=terms.prompt_tokens,
        max_tokens=terms.max_tokens,
        chunk_tokens=terms.chunk_tokens,
        prefill_chunk_tokens=terms.prefill_chunk_tokens,
        wire_dtype=session_pb2.WIRE_DTYPE_F32,
        handoff_salt=terms.handoff_salt,
        issued_ms=issued_ms,
        expires_ms=expires_ms,
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
        sampling = Sampling(
            temperature_micros=message.sampling.temperature_micros,
            top_p_micros=message.sampling.top_p_micros,
            top_k=message.sampling.top_k,
            seed=message.sampling.seed,
            end_ids=tuple(message.sampling.end_ids),
        )
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
    )


def _check_route(message: session_pb2.SessionOpen) -> None:
    if len(message.route.model_digest) != _DIGEST_BYTES:
        raise ValueError("a model digest is 32 bytes")
    if message.wire_dtype != session_pb2.WIRE_DTYPE_F32:
        raise ValueError("only fp32 is on the wire so far")
    layer = 0
    for stage in message.route.stages:
        if stage.start_layer != layer:
            raise ValueError("the stages do not abut from layer 0")
        layer = stage.end_layer
