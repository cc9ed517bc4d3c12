"""Bundles: everything that proves one generation, as canonical JSON under the client's seal.

A bundle brings no trust anchor of its own: who may grant credit and sign checkpoints is
in the network file. All members are mandatory; optional evidence (the manifest, the
journal's entries, the checkpoint) is null or empty where it is missing.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import get_args

from plait.envelope import seal
from plait.errors import LocalProtocolError
from plait.identity import SigningKey
from plait.ledger.bundle_fields import (
    U32_MAX,
    read_base64,
    read_envelope,
    read_envelopes,
    read_flag,
    read_hex,
    read_ids,
    read_integer,
    read_items,
    read_members,
    read_optional_envelope,
    read_prices,
    read_text,
    write_base64,
    write_envelope,
    write_integer,
    write_optional_envelope,
    write_prices,
)
from plait.ledger.canonical import JsonValue, decode_canonical, encode_canonical
from plait.ledger.client_books import CutEvidence
from plait.ledger.terms import SessionTerms, StageTerms
from plait.types import Digest, Microcredits, PeerId, Qos, SessionId, Span, TokenCounts, WireDtype
from plait.v1.bundle_pb2 import BundleSeal
from plait.v1.identity_pb2 import SignedEnvelope

BUNDLE_FORMAT = "plait.bundle.v3"
BUNDLE_FORMATS_BEFORE = ("plait.bundle.v1", "plait.bundle.v2")
"""Written by earlier versions, whose receipts and terms were others."""
BUNDLE_BYTES_MAX = 64 * 2**20
EPOCHS_MAX = 1_000

Frame = tuple[int, int, int, tuple[int, ...], bool, bool, bool]
"""Traversal, first position, rows, drafted ids, sample, close_chunk, replay."""

InclusionProof = tuple[int, tuple[bytes, ...]]
"""Leaf index and the hashes of the audit path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochParts:
    """The evidence of one pipeline of a session.

    ``offers`` and ``stage_certs`` are in stage order, ``receipts`` in chunk then stage
    order; ``frames`` are those whose results were accepted, and the replays before them.
    ``reservation`` is None where no stage entered, ``voucher`` where nothing was accepted.
    """

    terms: SessionTerms
    session_open: SignedEnvelope
    stage_certs: tuple[SignedEnvelope, ...]
    offers: tuple[SignedEnvelope, ...]
    frames: tuple[Frame, ...]
    reservation: SignedEnvelope | None
    grant: SignedEnvelope | None
    receipts: tuple[SignedEnvelope, ...]
    cut: CutEvidence | None
    voucher: SignedEnvelope | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleParts:
    """The evidence of one generation.

    ``token_ids`` are all ids drawn, an end id included; ``epochs`` has the pipelines in
    their order; ``manifest`` is the serialized ModelManifest; ``entries`` are serialized
    JournalEntry messages, each with its proof in ``proofs``, all against ``checkpoint``.
    """

    network_id: str
    client_cert: SignedEnvelope
    manifest: bytes | None
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    epochs: tuple[EpochParts, ...]
    entries: tuple[bytes, ...] = ()
    proofs: tuple[InclusionProof, ...] = ()
    checkpoint: str | None = None
    sealed_ms: int

    @property
    def terms(self) -> SessionTerms:
        """The terms of the first epoch: what all epochs have in common is in them."""
        return self.epochs[0].terms


@dataclass(frozen=True, slots=True)
class SealedBundle:
    """A bundle as it was read: its parts, and the seal with what it must cover."""

    parts: BundleParts
    seal: SignedEnvelope = field(repr=False)
    body_digest: Digest


def build_bundle(parts: BundleParts, peer_key: SigningKey) -> bytes:
    """Write a bundle, sealed with the client's peer key.

    Raises ``LocalProtocolError`` if the key or the network is not the session's, and
    ``ValueError`` if a text cannot be written as UTF-8.
    """
    if peer_key.peer_id != parts.terms.client or parts.network_id != parts.terms.network_id:
        raise LocalProtocolError("a bundle is sealed by its client, for its network")
    members = _write_parts(parts)
    statement = BundleSeal(
        network_id=parts.network_id,
        session_id=parts.terms.session_id,
        sha256=hashlib.sha256(encode_canonical(members)).digest(),
        sealed_ms=parts.sealed_ms,
    )
    return encode_canonical({**members, "seal": write_envelope(seal(peer_key, statement))})


def _check_format(name: JsonValue) -> None:
    if name in BUNDLE_FORMATS_BEFORE:
        raise ValueError(
            f"{name} is the format of an earlier Plait; this one reads {BUNDLE_FORMAT}"
        )
    if name != BUNDLE_FORMAT:
        raise ValueError(f"the format is not {BUNDLE_FORMAT}")


def read_bundle(data: bytes) -> SealedBundle:
    """Read a bundle strictly, without checking any signature; raises ``ValueError``."""
    if len(data) > BUNDLE_BYTES_MAX:
        raise ValueError(f"a bundle is at most {BUNDLE_BYTES_MAX} bytes")
    members = read_members(decode_canonical(data), "the bundle", _MEMBERS)
    _check_format(members["format"])
    body = encode_canonical({name: members[name] for name in _MEMBERS if name != "seal"})
    return SealedBundle(
        parts=_read_parts(members),
        seal=read_envelope(members["seal"], "seal"),
        body_digest=Digest(hashlib.sha256(body).digest()),
    )


_MEMBERS = (
    "checkpoint",
    "client_cert",
    "entries",
    "epochs",
    "finish_reason",
    "format",
    "manifest",
    "network",
    "prompt_ids",
    "proofs",
    "seal",
    "sealed_ms",
    "text",
    "token_ids",
)

_EPOCH_MEMBERS = (
    "cut",
    "frames",
    "grant",
    "offers",
    "receipts",
    "reservation",
    "session_open",
    "stage_certs",
    "terms",
    "voucher",
)

_CUT_MEMBERS = ("draws", "receipts", "traversal")

_COUNTS_MEMBERS = ("cached_prompt", "output", "prompt", "rejected_draft")

_TERMS_MEMBERS = (
    "chunk_tokens",
    "client",
    "client_ledger_key",
    "epoch",
    "handoff_salt",
    "max_tokens",
    "model_digest",
    "prefill_chunk_tokens",
    "prompt_tokens",
    "qos",
    "resume_position",
    "session_id",
    "stages",
    "start",
)

_STAGE_MEMBERS = (
    "base",
    "carried",
    "end",
    "entered_epoch",
    "ledger_key",
    "numeric_class",
    "offer_digest",
    "peer",
    "priced_layers",
    "prices",
    "rebuilt",
    "replayed",
    "start",
)


def _write_parts(parts: BundleParts) -> dict[str, JsonValue]:
    return {
        "checkpoint": parts.checkpoint,
        "client_cert": write_envelope(parts.client_cert),
        "entries": [write_base64(entry) for entry in parts.entries],
        "epochs": [_write_epoch(epoch) for epoch in parts.epochs],
        "finish_reason": parts.finish_reason,
        "format": BUNDLE_FORMAT,
        "manifest": None if parts.manifest is None else write_base64(parts.manifest),
        "network": parts.network_id,
        "prompt_ids": parts.prompt_ids,
        "proofs": [
            {"hashes": [write_base64(item) for item in hashes], "index": write_integer(index)}
            for index, hashes in parts.proofs
        ],
        "sealed_ms": write_integer(parts.sealed_ms),
        "text": parts.text,
        "token_ids": parts.token_ids,
    }


def _read_parts(members: Mapping[str, JsonValue]) -> BundleParts:
    manifest, checkpoint = members["manifest"], members["checkpoint"]
    network_id = read_text(members["network"], "network")
    epochs = read_items(members["epochs"], "epochs")
    if not 0 < len(epochs) <= EPOCHS_MAX:
        raise ValueError(f"a bundle has 1 to {EPOCHS_MAX} epochs")
    return BundleParts(
        network_id=network_id,
        client_cert=read_envelope(members["client_cert"], "client_cert"),
        manifest=None if manifest is None else read_base64(manifest, "manifest"),
        prompt_ids=read_ids(members["prompt_ids"], "prompt_ids"),
        token_ids=read_ids(members["token_ids"], "token_ids"),
        text=read_text(members["text"], "text"),
        finish_reason=read_text(members["finish_reason"], "finish_reason"),
        epochs=tuple(_read_epoch(item, network_id) for item in epochs),
        entries=tuple(
            read_base64(item, "entries") for item in read_items(members["entries"], "entries")
        ),
        proofs=tuple(_read_proof(item) for item in read_items(members["proofs"], "proofs")),
        checkpoint=None if checkpoint is None else read_text(checkpoint, "checkpoint"),
        sealed_ms=read_integer(members["sealed_ms"], "sealed_ms"),
    )


def _write_epoch(epoch: EpochParts) -> JsonValue:
    cut = epoch.cut
    return {
        "cut": None if cut is None else _write_cut(cut),
        "frames": [[write_integer(frame[0]), *frame[1:]] for frame in epoch.frames],
        "grant": write_optional_envelope(epoch.grant),
        "offers": [write_envelope(offer) for offer in epoch.offers],
        "receipts": [write_envelope(receipt) for receipt in epoch.receipts],
        "reservation": write_optional_envelope(epoch.reservation),
        "session_open": write_envelope(epoch.session_open),
        "stage_certs": [write_envelope(cert) for cert in epoch.stage_certs],
        "terms": _write_terms(epoch.terms),
        "voucher": write_optional_envelope(epoch.voucher),
    }


def _read_epoch(value: JsonValue, network_id: str) -> EpochParts:
    members = read_members(value, "epoch", _EPOCH_MEMBERS)
    cut = members["cut"]
    return EpochParts(
        terms=_read_terms(members["terms"], network_id),
        session_open=read_envelope(members["session_open"], "session_open"),
        stage_certs=read_envelopes(members["stage_certs"], "stage_certs"),
        offers=read_envelopes(members["offers"], "offers"),
        frames=tuple(_read_frame(item) for item in read_items(members["frames"], "frames")),
        reservation=read_optional_envelope(members["reservation"], "reservation"),
        grant=read_optional_envelope(members["grant"], "grant"),
        receipts=read_envelopes(members["receipts"], "receipts"),
        cut=None if cut is None else _read_cut(cut),
        voucher=read_optional_envelope(members["voucher"], "voucher"),
    )


def _write_cut(cut: CutEvidence) -> JsonValue:
    return {
        "draws": write_optional_envelope(cut.draws),
        "receipts": [write_optional_envelope(receipt) for receipt in cut.receipts],
        "traversal": write_integer(cut.traversal),
    }


def _read_cut(value: JsonValue) -> CutEvidence:
    members = read_members(value, "cut", _CUT_MEMBERS)
    return CutEvidence(
        traversal=read_integer(members["traversal"], "cut: traversal"),
        receipts=tuple(
            read_optional_envelope(item, "cut: receipts")
            for item in read_items(members["receipts"], "cut: receipts")
        ),
        draws=read_optional_envelope(members["draws"], "cut: draws"),
    )


def _write_terms(terms: SessionTerms) -> JsonValue:
    members: dict[str, JsonValue] = {
        "chunk_tokens": terms.chunk_tokens,
        "client": terms.client,
        "client_ledger_key": terms.client_ledger_key.hex(),
        "epoch": terms.epoch,
        "handoff_salt": terms.handoff_salt.hex(),
        "max_tokens": terms.max_tokens,
        "model_digest": terms.model_digest.hex(),
        "prefill_chunk_tokens": terms.prefill_chunk_tokens,
        "prompt_tokens": terms.prompt_tokens,
        "qos": terms.qos,
        "resume_position": terms.resume_position,
        "session_id": terms.session_id.hex(),
        "stages": [_write_stage(stage) for stage in terms.stages],
        "start": _write_counts(terms.start),
    }
    if terms.wire_dtype != "fp32":  # one way to write each
        members["wire_dtype"] = terms.wire_dtype
    return members


def _read_terms(value: JsonValue, network_id: str) -> SessionTerms:
    wire_dtype, names = _read_wire(value)
    members = read_members(value, "terms", names)
    qos = next((one for one in get_args(Qos) if one == members["qos"]), None)
    if qos is None:
        raise ValueError("terms: an unknown class of service")

    def number(name: str) -> int:
        return read_integer(members[name], f"terms: {name}", U32_MAX)

    return SessionTerms(
        network_id=network_id,
        session_id=SessionId(read_hex(members["session_id"], "terms: session_id", 16)),
        epoch=number("epoch"),
        client=PeerId(read_text(members["client"], "terms: client")),
        client_ledger_key=read_hex(members["client_ledger_key"], "terms: client_ledger_key", 32),
        model_digest=Digest(read_hex(members["model_digest"], "terms: model_digest", 32)),
        stages=tuple(_read_stage(item) for item in read_items(members["stages"], "terms: stages")),
        prompt_tokens=number("prompt_tokens"),
        max_tokens=number("max_tokens"),
        chunk_tokens=number("chunk_tokens"),
        prefill_chunk_tokens=number("prefill_chunk_tokens"),
        handoff_salt=read_hex(members["handoff_salt"], "terms: handoff_salt", 32),
        resume_position=number("resume_position"),
        start=_read_counts(members["start"], "terms: start"),
        qos=qos,
        wire_dtype=wire_dtype,
    )


def _read_wire(value: JsonValue) -> tuple[WireDtype, Collection[str]]:
    """What is on the wire, and the members that such terms have."""
    if not isinstance(value, dict) or "wire_dtype" not in value:
        return "fp32", _TERMS_MEMBERS
    for one in get_args(WireDtype):
        if one == value["wire_dtype"] != "fp32":
            return one, (*_TERMS_MEMBERS, "wire_dtype")
    raise ValueError("terms: an unknown wire dtype")


def _write_stage(stage: StageTerms) -> JsonValue:
    return {
        "base": _write_counts(stage.base),
        "carried": write_integer(stage.carried),
        "end": stage.span.end,
        "entered_epoch": stage.entered_epoch,
        "ledger_key": stage.ledger_key.hex(),
        "numeric_class": stage.numeric_class,
        "offer_digest": stage.offer_digest.hex(),
        "peer": stage.peer,
        "priced_layers": stage.priced_layers,
        "prices": write_prices(stage.prices),
        "rebuilt": stage.rebuilt,
        "replayed": stage.replayed,
        "start": stage.span.start,
    }


def _read_stage(value: JsonValue) -> StageTerms:
    members = read_members(value, "stage", _STAGE_MEMBERS)
    start, end, priced_layers, entered_epoch, replayed = (
        read_integer(members[name], f"stage: {name}", U32_MAX)
        for name in ("start", "end", "priced_layers", "entered_epoch", "replayed")
    )
    return StageTerms(
        peer=PeerId(read_text(members["peer"], "stage: peer")),
        ledger_key=read_hex(members["ledger_key"], "stage: ledger_key", 32),
        span=Span(start, end),
        priced_layers=priced_layers,
        prices=read_prices(members["prices"], "stage: prices"),
        numeric_class=read_text(members["numeric_class"], "stage: numeric_class"),
        offer_digest=Digest(read_hex(members["offer_digest"], "stage: offer_digest", 32)),
        entered_epoch=entered_epoch,
        base=_read_counts(members["base"], "stage: base"),
        carried=Microcredits(read_integer(members["carried"], "stage: carried")),
        replayed=replayed,
        rebuilt=read_flag(members["rebuilt"], "stage: rebuilt"),
    )


def _write_counts(counts: TokenCounts) -> JsonValue:
    return {name: write_integer(getattr(counts, name)) for name in _COUNTS_MEMBERS}


def _read_counts(value: JsonValue, what: str) -> TokenCounts:
    members = read_members(value, what, _COUNTS_MEMBERS)
    return TokenCounts(
        **{name: read_integer(members[name], f"{what}: {name}") for name in _COUNTS_MEMBERS}
    )


def _read_frame(value: JsonValue) -> Frame:
    items = read_items(value, "frame")
    if len(items) != 7:
        raise ValueError("a frame has seven items")
    return (
        read_integer(items[0], "frame: traversal"),
        read_integer(items[1], "frame: first position", U32_MAX),
        read_integer(items[2], "frame: rows", U32_MAX),
        read_ids(items[3], "frame: drafts"),
        read_flag(items[4], "frame: sample"),
        read_flag(items[5], "frame: close_chunk"),
        read_flag(items[6], "frame: replay"),
    )


def _read_proof(value: JsonValue) -> InclusionProof:
    members = read_members(value, "proof", ("hashes", "index"))
    hashes = read_items(members["hashes"], "proof: hashes")
    index = read_integer(members["index"], "proof: index")
    return index, tuple(read_base64(item, "proof: hashes") for item in hashes)
