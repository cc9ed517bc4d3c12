"""Offers and link reports to and from signed messages.

Decoding checks every field; a bad one raises ``RemoteProtocolError`` with the peer's id.
"""

from plait.envelope import digest, encode, open_envelope, seal
from plait.errors import RemoteProtocolError
from plait.identity import SigningKey, peer_id_of, public_key_of
from plait.prices_wire import prices_from_message, prices_to_message
from plait.router.view import Evidence, LinkReport, MeasuredLink, Offer, OfferState
from plait.types import Digest, PeerId, Span
from plait.v1 import offer_pb2
from plait.v1.identity_pb2 import SignedEnvelope

LINKS_MAX = 16
LAYERS_MAX = 4096
MULTIADDRS_MAX = 8
TEXT_MAX = 255

_STATES: dict[OfferState, offer_pb2.OfferState] = {
    "ready": offer_pb2.OFFER_STATE_READY,
    "draining": offer_pb2.OFFER_STATE_DRAINING,
    "withdrawn": offer_pb2.OFFER_STATE_WITHDRAWN,
}
_EVIDENCE: dict[Evidence, offer_pb2.EvidenceLevel] = {
    "stage-receipts": offer_pb2.EVIDENCE_LEVEL_STAGE_RECEIPTS,
    "fronting-node": offer_pb2.EVIDENCE_LEVEL_FRONTING_NODE,
}
_STATE_NAMES = {number: name for name, number in _STATES.items()}
_EVIDENCE_NAMES = {number: name for name, number in _EVIDENCE.items()}


def offer_to_message(offer: Offer, network_id: str) -> offer_pb2.Offer:
    """The message to seal. The peer and the digest are not in it: the envelope gives them."""
    message = offer_pb2.Offer(
        network_id=network_id,
        model_digest=offer.model_digest,
        start_layer=offer.span.start,
        end_layer=offer.span.end,
        incarnation=offer.incarnation,
        sequence=offer.sequence,
        issued_ms=offer.issued_ms,
        expires_ms=offer.expires_ms,
        state=_STATES[offer.state],
        evidence=_EVIDENCE[offer.evidence],
        prices=prices_to_message(offer.prices),
        numeric_class=offer.numeric_class,
        region=offer.region,
        kv_tokens_total=offer.kv_tokens_total,
        kv_tokens_free=offer.kv_tokens_free,
        sessions_active=offer.sessions_active,
        decode_us=offer.decode_us,
        prefill_us_per_token=offer.prefill_us_per_token,
        public_address=offer.public_address,
        peer_address=offer.peer_address,
        certificate=offer.certificate,
        multiaddrs=offer.multiaddrs,
    )
    if offer.millijoules_per_token_layer or offer.grams_co2_per_kwh:
        message.energy.millijoules_per_token_layer = offer.millijoules_per_token_layer
        message.energy.grams_co2_per_kwh = offer.grams_co2_per_kwh
    return message


def offer_digest(offer: Offer, network_id: str) -> Digest:
    """SHA-256 of the payload that ``seal_offer`` signs."""
    return digest(encode(offer_to_message(offer, network_id)))


def seal_offer(key: SigningKey, offer: Offer, network_id: str) -> SignedEnvelope:
    """Sign an offer with the peer key."""
    return seal(key, offer_to_message(offer, network_id))


def offer_from_envelope(envelope: SignedEnvelope, *, network_id: str | None = None) -> Offer:
    """Verify and decode an offer.

    Raises ``BadSignature`` or ``RemoteProtocolError``; the latter also for an offer of
    another network when ``network_id`` is given.
    """
    return offer_from_message(open_envelope(envelope, offer_pb2.Offer), envelope, network_id)


def offer_from_message(
    message: offer_pb2.Offer, envelope: SignedEnvelope, network_id: str | None
) -> Offer:
    """Decode an offer whose envelope was verified; raises ``RemoteProtocolError``."""
    peer = peer_id_of(envelope.signer)
    _check_network(message.network_id, network_id, peer)
    _check_offer(message, peer)
    return Offer(
        peer=peer,
        model_digest=Digest(message.model_digest),
        span=Span(message.start_layer, message.end_layer),
        incarnation=message.incarnation,
        sequence=message.sequence,
        issued_ms=message.issued_ms,
        expires_ms=message.expires_ms,
        state=_STATE_NAMES[message.state],
        evidence=_EVIDENCE_NAMES[message.evidence],
        prices=prices_from_message(message.prices),
        numeric_class=message.numeric_class,
        region=message.region,
        kv_tokens_total=message.kv_tokens_total,
        kv_tokens_free=message.kv_tokens_free,
        sessions_active=message.sessions_active,
        decode_us=message.decode_us,
        prefill_us_per_token=message.prefill_us_per_token,
        public_address=message.public_address,
        peer_address=message.peer_address,
        certificate=message.certificate,
        multiaddrs=tuple(message.multiaddrs),
        digest=digest(envelope.payload),
        millijoules_per_token_layer=message.energy.millijoules_per_token_layer,
        grams_co2_per_kwh=message.energy.grams_co2_per_kwh,
    )


def link_report_to_message(report: LinkReport, network_id: str) -> offer_pb2.LinkReport:
    """The message to seal."""
    return offer_pb2.LinkReport(
        network_id=network_id,
        incarnation=report.incarnation,
        sequence=report.sequence,
        issued_ms=report.issued_ms,
        expires_ms=report.expires_ms,
        links=[
            offer_pb2.MeasuredLink(peer_id=link.peer, rtt_us=link.rtt_us, bandwidth=link.bandwidth)
            for link in report.links
        ],
    )


def seal_link_report(key: SigningKey, report: LinkReport, network_id: str) -> SignedEnvelope:
    """Sign a link report with the peer key."""
    return seal(key, link_report_to_message(report, network_id))


def links_from_envelope(envelope: SignedEnvelope, *, network_id: str | None = None) -> LinkReport:
    """Verify and decode a link report; raises as ``offer_from_envelope``."""
    return links_from_message(open_envelope(envelope, offer_pb2.LinkReport), envelope, network_id)


def links_from_message(
    message: offer_pb2.LinkReport, envelope: SignedEnvelope, network_id: str | None
) -> LinkReport:
    """Decode a report whose envelope was verified; raises ``RemoteProtocolError``."""
    peer = peer_id_of(envelope.signer)
    _check_network(message.network_id, network_id, peer)
    _check_lifetime(message, peer)
    _check(len(message.links) <= LINKS_MAX, peer, f"reports more than {LINKS_MAX} links")
    for link in message.links:
        _check(link.rtt_us > 0, peer, "reports a round trip of zero")
        _check(link.peer_id != peer and _is_peer_id(link.peer_id), peer, "reports a bad peer id")
    links = tuple(
        MeasuredLink(PeerId(link.peer_id), link.rtt_us, link.bandwidth) for link in message.links
    )
    _check(len({link.peer for link in links}) == len(links), peer, "reports a link twice")
    return LinkReport(
        peer=peer,
        incarnation=message.incarnation,
        sequence=message.sequence,
        issued_ms=message.issued_ms,
        expires_ms=message.expires_ms,
        links=links,
    )


def _check(holds: bool, peer: PeerId, complaint: str) -> None:
    if not holds:
        raise RemoteProtocolError(complaint, peer=peer)


def _check_network(found: str, expected: str | None, peer: PeerId) -> None:
    _check(expected is None or found == expected, peer, "speaks for another network")


def _check_lifetime(message: offer_pb2.Offer | offer_pb2.LinkReport, peer: PeerId) -> None:
    _check(message.incarnation > 0, peer, "names no incarnation")
    _check(message.issued_ms < message.expires_ms, peer, "expires before it was issued")


def _check_offer(message: offer_pb2.Offer, peer: PeerId) -> None:
    _check_lifetime(message, peer)
    _check(len(message.model_digest) == 32, peer, "names no model digest")
    span_is_good = message.start_layer < message.end_layer <= LAYERS_MAX
    _check(span_is_good, peer, "offers an impossible span")
    _check(message.state in _STATE_NAMES, peer, "offers an unknown state")
    _check(message.evidence in _EVIDENCE_NAMES, peer, "offers an unknown evidence level")
    _check(message.kv_tokens_free <= message.kv_tokens_total, peer, "has more free than all")
    _check(len(message.multiaddrs) <= MULTIADDRS_MAX, peer, "lists too many multiaddrs")
    texts = (message.numeric_class, message.region, message.public_address, message.peer_address)
    for text in (*texts, *message.multiaddrs):
        # Offers are printed in terminals: no control characters.
        _check(len(text) <= TEXT_MAX and text.isprintable(), peer, "holds an unprintable text")


def _is_peer_id(text: str) -> bool:
    try:
        public_key_of(text)
    except ValueError:
        return False
    return True
