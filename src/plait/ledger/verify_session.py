"""Claims about who took part, on which terms, and which tokens went through."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from plait.envelope import decode, digest, open_envelope
from plait.errors import BadProof, BadSignature
from plait.identity import public_key_of
from plait.ledger.blame import about
from plait.ledger.bundle import BundleParts, EpochParts, SealedBundle
from plait.ledger.certs import CLOCK_SKEW_MS_MAX, check_key_cert
from plait.ledger.opening import terms_from_message
from plait.ledger.report import Absent
from plait.ledger.terms import SessionTerms, StageTerms
from plait.network_file import NetworkFile
from plait.prices_wire import prices_from_message
from plait.types import ModelShape, PeerId, Sampling, Span
from plait.v1.bundle_pb2 import BundleSeal, ModelManifest
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SessionVoucher
from plait.v1.offer_pb2 import OFFER_STATE_READY, Offer
from plait.v1.session_pb2 import SessionOpen


def check_seal(bundle: SealedBundle) -> None:
    """The client's peer key signed exactly these contents."""
    parts = bundle.parts
    seal = open_envelope(bundle.seal, BundleSeal, signer=public_key_of(parts.terms.client))
    if seal.sha256 != bundle.body_digest:
        raise BadProof("the contents are not those that were sealed")
    stated = (seal.network_id, seal.session_id, seal.sealed_ms)
    if stated != (parts.network_id, parts.terms.session_id, parts.sealed_ms):
        raise BadProof("the seal is for another network, session or time")


def check_network(parts: BundleParts, network: NetworkFile) -> None:
    """The bundle is of the network whose file we trust, and its peers are admitted."""
    if parts.network_id != network.network_id:
        raise BadProof(f"the bundle is of {parts.network_id!r}, we trust {network.network_id!r}")
    if network.admission == "allowlist":
        stages = (stage.peer for epoch in parts.epochs for stage in epoch.terms.stages)
        for peer in (parts.terms.client, *stages):
            if not network.admits(peer):
                raise BadSignature(f"{peer} is not on the network's list")


def check_terms(epoch: EpochParts) -> tuple[Sampling, int]:
    """The client signed these terms; returns how tokens are drawn and when it opened."""
    terms = epoch.terms
    message = open_envelope(epoch.session_open, SessionOpen, signer=terms.client_ledger_key)
    classes = [stage.numeric_class for stage in terms.stages]
    keys = [stage.ledger_key for stage in terms.stages]
    signed, sampling = terms_from_message(message, terms.client_ledger_key, classes, keys)
    if signed != terms:
        raise BadProof(f"the signed opening has a different {_difference(signed, terms)}")
    return sampling, message.issued_ms


def check_succession(parts: BundleParts, openings: Sequence[tuple[Sampling, int]]) -> None:
    """Each epoch goes on with the session that the one before it left, on the same terms."""
    for (sampling, opened_ms), (next_sampling, next_ms) in pairwise(openings):
        if next_sampling != sampling:
            raise BadProof("an epoch draws in another way than the one before")
        if next_ms < opened_ms:
            raise BadProof("an epoch was opened before the one before it")
    if parts.terms.epoch != 1:
        raise BadProof("the first epoch is missing")
    promised: dict[PeerId, int] = {}
    before: SessionTerms | None = None
    for epoch in parts.epochs:
        terms = epoch.terms
        with about(f"epoch {terms.epoch}"):
            _check_same_session(parts.terms, terms)
            if before is not None and terms.epoch <= before.epoch:
                raise BadProof("epoch numbers do not rise")
            stays = {} if before is None else {stage.peer: stage for stage in before.stages}
            for index, stage in enumerate(terms.stages):
                with about(f"stage {index}"):
                    if terms.entered(index):
                        _check_carried(stage, promised)
                    else:
                        _check_stays(stage, stays)
        before = terms
        promised.update(promised_in(epoch))


def promised_in(epoch: EpochParts) -> dict[PeerId, int]:
    """What the epoch's last voucher promises each payee in the session; unchecked."""
    if epoch.voucher is None:
        return {}
    voucher = decode(epoch.voucher.payload, SessionVoucher)
    return {PeerId(item.payee): item.microcredits for item in voucher.amounts}


def check_client_cert(parts: BundleParts, opened_ms: int) -> None:
    """The client's peer key delegated to the ledger key that pays."""
    terms = parts.terms
    _, key = check_key_cert(parts.client_cert, parts.network_id, opened_ms, terms.client)
    if key != terms.client_ledger_key:
        raise BadSignature("the certificate names another ledger key")


def check_stage_certs(epoch: EpochParts, opened_ms: int) -> None:
    """Each stage's peer key delegated to the ledger key that signs its receipts."""
    terms = epoch.terms
    _one_each(epoch.stage_certs, terms.stages, "certificates")
    for index, (envelope, stage) in enumerate(zip(epoch.stage_certs, terms.stages, strict=True)):
        with about(f"stage {index}"):
            _, key = check_key_cert(envelope, terms.network_id, opened_ms, stage.peer)
            if key != stage.ledger_key:
                raise BadSignature("the certificate names another ledger key")


def check_offers(epoch: EpochParts, opened_ms: Mapping[int, int]) -> None:
    """Each stage had offered this span at these prices in this numeric class when it entered.

    ``opened_ms`` says when each epoch opened.
    """
    terms = epoch.terms
    _one_each(epoch.offers, terms.stages, "offers")
    for index, (envelope, stage) in enumerate(zip(epoch.offers, terms.stages, strict=True)):
        with about(f"offer of stage {index}"):
            _check_offer(envelope, stage, terms, opened_ms.get(stage.entered_epoch, 0))


def check_manifest(parts: BundleParts) -> ModelManifest:
    """The manifest is the one whose digest names the model."""
    if parts.manifest is None:
        raise Absent("the bundle has no manifest, so the number of layers is unknown")
    if digest(parts.manifest) != parts.terms.model_digest:
        raise BadProof("the manifest's digest is not the model's")
    return decode(parts.manifest, ModelManifest)


def check_route(epoch: EpochParts, manifest: ModelManifest | None) -> None:
    """The spans cover every layer once, in order, and are priced as the manifest says."""
    terms = epoch.terms
    position = 0
    for index, stage in enumerate(terms.stages):
        if stage.span.start != position:
            raise BadProof(f"stage {index} starts at layer {stage.span.start}, not {position}")
        position = stage.span.end
    if manifest is None:
        return
    if position != manifest.layers:
        raise BadProof(f"the route ends at layer {position}, the model has {manifest.layers}")
    shape = ModelShape(
        name=manifest.name,
        digest=terms.model_digest,
        layers=manifest.layers,
        embedding_cost_layers=manifest.embedding_cost_layers,
        head_cost_layers=manifest.head_cost_layers,
    )
    for index, stage in enumerate(terms.stages):
        if stage.priced_layers != shape.priced_layers(stage.span):
            raise BadProof(f"stage {index} is paid for {stage.priced_layers} layers")


def check_answer(
    parts: BundleParts, sampling: Sampling | None, manifest: ModelManifest | None
) -> None:
    """The ids are of the vocabulary, and the answer ended as it says."""
    if manifest is not None:
        for token in (*parts.prompt_ids, *parts.token_ids):
            if token >= manifest.vocabulary_size:
                raise BadProof(f"token id {token} is not in the vocabulary")
    if parts.finish_reason not in ("stop", "length", "ended"):
        raise BadProof(f"unknown finish reason {parts.finish_reason!r}")
    full = len(parts.token_ids) == parts.terms.max_tokens
    if parts.finish_reason == "length" and not full:
        raise BadProof("it claims to have reached the limit, but is shorter")
    if sampling is None:
        return
    end_ids = set(sampling.end_ids)
    if end_ids.intersection(parts.token_ids[:-1]):
        raise BadProof("the answer goes on after an end id")
    if parts.finish_reason == "length" and parts.token_ids[-1] in end_ids:
        raise BadProof("it ended with an end id, not by length")


def _check_offer(
    envelope: SignedEnvelope, stage: StageTerms, terms: SessionTerms, opened_ms: int
) -> None:
    offer = open_envelope(envelope, Offer, signer=public_key_of(stage.peer))
    if digest(envelope.payload) != stage.offer_digest:
        raise BadProof("it is not the one that the route names")
    if (offer.network_id, offer.model_digest) != (terms.network_id, terms.model_digest):
        raise BadProof("it is for another network or model")
    if not Span(offer.start_layer, offer.end_layer).contains(stage.span):
        raise BadProof(f"it does not hold layers {stage.span}")
    if prices_from_message(offer.prices) != stage.prices:
        raise BadProof("its prices are not those of the route")
    if offer.numeric_class != stage.numeric_class:
        raise BadProof("its numeric class is another")
    if offer.state != OFFER_STATE_READY:
        raise BadProof("its peer was not ready")
    early, late = offer.issued_ms - CLOCK_SKEW_MS_MAX, offer.expires_ms + CLOCK_SKEW_MS_MAX
    if not early <= opened_ms <= late:
        raise BadProof("it was not valid when the session opened")


def _check_same_session(first: SessionTerms, terms: SessionTerms) -> None:
    """An epoch may change the route and what follows from it, nothing else."""
    same = replace(
        terms,
        epoch=first.epoch,
        stages=first.stages,
        handoff_salt=first.handoff_salt,
        resume_position=first.resume_position,
        start=first.start,
    )
    if same != first:
        raise BadProof(f"its {_difference(same, first)} is not the session's")


def _check_carried(stage: StageTerms, promised: Mapping[PeerId, int]) -> None:
    """A stage that enters carries what it was promised before, whatever it did then."""
    due = promised.get(stage.peer, 0)
    if stage.carried != due:
        raise BadProof(f"it carries {stage.carried} microcredits, {due} were promised before")


def _check_stays(stage: StageTerms, before: Mapping[PeerId, StageTerms]) -> None:
    """A stage that did not enter was in the epoch before, on the same terms."""
    old = before.get(stage.peer)
    if old is None:
        raise BadProof(
            f"it entered in epoch {stage.entered_epoch}, but was not there in the one before"
        )
    if replace(old, rebuilt=stage.rebuilt) != stage:
        raise BadProof("it has other terms than in the epoch before")


def _one_each(
    evidence: tuple[SignedEnvelope, ...], stages: tuple[StageTerms, ...], what: str
) -> None:
    if len(evidence) != len(stages):
        raise BadProof(f"{len(evidence)} {what} for {len(stages)} stages")


def _difference(signed: SessionTerms, stated: SessionTerms) -> str:
    for name in SessionTerms.__dataclass_fields__:
        if getattr(signed, name) != getattr(stated, name):
            return name
    raise AssertionError("the terms are equal")
