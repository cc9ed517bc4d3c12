"""Offline verification of a bundle: ``verify_bundle(data, network)``.

For any bytes whatever it returns a report and raises nothing. Trust comes only from the
network file (its authorities' keys) and from peer ids, which are keys. Claims that do not
depend on a false one are still examined, so that a report names every fault.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from plait.ledger.bundle import BundleParts, EpochParts, SealedBundle, read_bundle
from plait.ledger.report import Claim, Findings, Outcome, Report
from plait.ledger.terms import StageTerms
from plait.ledger.verify_credit import (
    check_caps,
    check_journal,
    check_log,
    check_reservations,
    check_witnesses,
)
from plait.ledger.verify_frames import (
    EpochFrames,
    cached_positions,
    check_coverage,
    check_frames,
)
from plait.ledger.verify_receipts import (
    check_closed_ring,
    check_draws,
    check_handoffs,
    check_receipts_complete,
    check_stage_receipts,
    check_voucher,
)
from plait.ledger.verify_session import (
    check_answer,
    check_client_cert,
    check_manifest,
    check_network,
    check_offers,
    check_route,
    check_seal,
    check_stage_certs,
    check_succession,
    check_terms,
    promised_in,
)
from plait.network_file import NetworkFile
from plait.types import PeerId, Sampling
from plait.v1.bundle_pb2 import ModelManifest
from plait.v1.ledger_pb2 import SessionVoucher, StageReceipt

__all__ = ["Claim", "Outcome", "Report", "verify_bundle"]

_REPLAY = "replay"
_NOT_REPLAYED = (
    "the computation: that each stage ran its layers on what it received (an audit replays it)",
    "the text: that it is what the model's tokenizer makes of the ids",
    "the draw: that the ids follow from the logits, seed and temperature",
)
_REPLAYED = (
    "the stages one by one: the ids are right, whatever each stage sent on the way",
    "the text: that it is what the model's tokenizer makes of the ids",
)
_NEVER_CHECKED = (
    "the people: who operates these peers, and whether client and stages all collude",
    "the clocks: every date is the signer's own",
    "the revoked keys: no revocation is looked at, a certificate that its peer voided counts by "
    "its dates",
    "the publisher: the manifest is the model's by digest; who made the model is not proven",
)
_CACHED = (
    "the cache: that the stages had the first {} positions cached, from the same model and the "
    "same ids; each signed that it did, and no audit can look (computing the answer again can)"
)
_CREDIT_CLAIMS = "caps, journal and log"
_NOT_WITNESSED = (
    "the log's other readers: no witness has cosigned, so another history could be shown to them"
)
_WITNESSED = (
    "the log's other readers: another history could be shown to them if enough witnesses collude"
)


Replay = Callable[[BundleParts, Sequence[EpochFrames], Sampling], str]
"""Computes the answer again; returns what it found, and raises if the answer is another."""


def verify_bundle(data: bytes, network: NetworkFile, replay: Replay | None = None) -> Report:
    """Check every claim that a bundle makes against the keys of a network file.

    With ``replay``, the computation and the draws are claims too.
    """
    findings = Findings()
    bundle = findings.claim(
        "encoding", lambda: read_bundle(data), lambda _: f"canonical JSON, {len(data)} bytes"
    )
    if bundle is None:
        findings.blocked("everything else", "the encoding")
    else:
        _check_parts(findings, bundle, network)
        if replay is not None:
            _check_replay(findings, bundle.parts, replay)
    replayed = any(claim.name == _REPLAY and claim.ok for claim in findings.claims)
    if bundle is not None and not replayed and (cached := cached_positions(bundle.parts)):
        findings.unchecked.append(_CACHED.format(cached))
    findings.unchecked.extend(_REPLAYED if replayed else _NOT_REPLAYED)
    findings.unchecked.extend(_NEVER_CHECKED)
    findings.unchecked.append(_WITNESSED if network.witness_quorum else _NOT_WITNESSED)
    return findings.report()


def _check_parts(findings: Findings, bundle: SealedBundle, network: NetworkFile) -> None:
    parts = bundle.parts
    findings.claim(
        "seal", lambda: check_seal(bundle), lambda _: f"by the client {parts.terms.client}"
    )
    findings.claim("network", lambda: check_network(parts, network), lambda _: network.network_id)
    opened_ms = _check_session(findings, parts)
    frames = findings.claim(
        "frames",
        lambda: check_frames(parts),
        lambda found: _frames_shown(parts, found),
    )
    if frames is None:
        findings.blocked("receipts, hand-offs, ring and voucher", "the frames")
        _check_credit(findings, parts, network, opened_ms, paid_for=False)
        return
    promised: dict[PeerId, int] = {}
    paid_for = True
    for epoch, found in zip(parts.epochs, frames, strict=True):
        if _check_epoch(findings, parts, epoch, found, promised):
            promised.update(promised_in(epoch))
        else:
            paid_for = False
    findings.claim(
        "coverage",
        lambda: check_coverage(parts, frames),
        lambda _: "each layer is signed for at each position that the answer rests on",
    )
    _check_credit(findings, parts, network, opened_ms, paid_for=paid_for)


def _check_replay(findings: Findings, parts: BundleParts, replay: Replay) -> None:
    def replayed() -> str:
        sampling, _ = check_terms(parts.epochs[0])
        return replay(parts, check_frames(parts), sampling)

    findings.claim(_REPLAY, replayed, lambda shown: shown)


def _check_session(findings: Findings, parts: BundleParts) -> list[int]:
    """Check who took part on which terms; returns when each epoch opened."""
    openings = [
        findings.claim(
            _name(parts, epoch, "session terms"),
            partial(check_terms, epoch),
            lambda _: f"session {parts.terms.session_id.hex()}, signed by the client",
        )
        for epoch in parts.epochs
    ]
    known = [opening for opening in openings if opening is not None]
    if len(known) < len(openings):
        findings.blocked("succession", "the session terms")
    else:
        findings.claim(
            "succession",
            lambda: check_succession(parts, known),
            lambda _: _epochs_shown(len(parts.epochs)),
        )
    opened_ms = [parts.sealed_ms if one is None else one[1] for one in openings]
    findings.claim(
        "client certificate",
        lambda: check_client_cert(parts, opened_ms[0]),
        lambda _: "the client delegated to its ledger key",
    )
    manifest = findings.claim(
        "manifest", lambda: check_manifest(parts), lambda m: f"{m.name}, {m.layers} layers"
    )
    numbers = [epoch.terms.epoch for epoch in parts.epochs]
    for epoch, at_ms in zip(parts.epochs, opened_ms, strict=True):
        times = dict(zip(numbers, opened_ms, strict=True))
        _check_stages(findings, parts, epoch, manifest, at_ms, times)
    findings.claim(
        "answer",
        lambda: check_answer(parts, known[0][0] if known else None, manifest),
        lambda _: f"{len(parts.token_ids)} ids drawn, ended by {parts.finish_reason}",
    )
    return opened_ms


def _check_stages(
    findings: Findings,
    parts: BundleParts,
    epoch: EpochParts,
    manifest: ModelManifest | None,
    at_ms: int,
    opened_ms: Mapping[int, int],
) -> None:
    stages = len(epoch.terms.stages)
    findings.claim(
        _name(parts, epoch, "stage certificates"),
        lambda: check_stage_certs(epoch, at_ms),
        lambda _: f"{stages} stages delegated to their ledger keys",
    )
    findings.claim(
        _name(parts, epoch, "offers"),
        lambda: check_offers(epoch, opened_ms),
        lambda _: f"{stages} signed offers: span, prices and numeric class as in the route",
    )
    findings.claim(
        _name(parts, epoch, "route"),
        lambda: check_route(epoch, manifest),
        lambda _: "layers " + " → ".join(str(stage.span) for stage in epoch.terms.stages),
    )


def _check_epoch(
    findings: Findings,
    parts: BundleParts,
    epoch: EpochParts,
    frames: EpochFrames,
    promised: Mapping[PeerId, int],
) -> bool:
    """Check what an epoch's stages and client signed; returns whether its voucher holds."""
    _check_receipts(findings, parts, epoch, frames)
    name = _name(parts, epoch, "voucher")
    findings.claim(name, lambda: check_voucher(epoch, frames, promised), _voucher_shown)
    return findings.claims[-1].ok is True


def _check_receipts(
    findings: Findings, parts: BundleParts, epoch: EpochParts, frames: EpochFrames
) -> None:
    complete = findings.claim(
        _name(parts, epoch, "receipts complete"),
        lambda: check_receipts_complete(epoch, frames),
        lambda count: f"{count}: one per stage and chunk",
    )
    if complete is None:
        findings.blocked("receipts, hand-offs and ring", "missing receipts")
        return
    by_stage = [
        findings.claim(
            _name(parts, epoch, f"receipts of stage {index}"),
            partial(check_stage_receipts, epoch, index, frames),
            partial(_receipts_shown, stage),
        )
        for index, stage in enumerate(epoch.terms.stages)
    ]
    valid = [receipts for receipts in by_stage if receipts is not None]
    if len(valid) != len(by_stage):
        findings.blocked("hand-offs and ring", "a receipt")
        return
    rows = tuple(zip(*valid, strict=True))
    findings.claim(
        _name(parts, epoch, "hand-offs"),
        lambda: check_handoffs(rows),
        lambda _: "each stage received what the one before it sent",
    )
    findings.claim(
        _name(parts, epoch, "ring"),
        lambda: check_closed_ring(parts, epoch, frames, rows),
        lambda _: "what was fed to stage 0 is the prompt and what the last stage drew",
    )
    if epoch.cut is not None:
        findings.claim(
            _name(parts, epoch, "draws of the cut"),
            lambda: check_draws(parts, epoch, frames),
            lambda how: f"the last stage signed for them {how}",
        )


def _check_credit(
    findings: Findings,
    parts: BundleParts,
    network: NetworkFile,
    opened_ms: Sequence[int],
    *,
    paid_for: bool,
) -> None:
    authority = findings.claim(
        "reservation and grant",
        lambda: check_reservations(parts, network, opened_ms),
        lambda a: f"granted by the ledger authority {a.peer}",
    )
    if not paid_for or authority is None:
        claims = "caps, journal, log and witnesses" if network.witness_quorum else _CREDIT_CLAIMS
        findings.blocked(claims, "the voucher or the grant")
        return
    findings.claim("caps", lambda: check_caps(parts), lambda _: "no stage is above its cap")
    findings.claim(
        "journal",
        lambda: check_journal(parts),
        lambda _: "entries balance, and each payee was paid what the voucher says",
    )
    findings.claim(
        "log",
        lambda: check_log(parts, authority),
        lambda c: f"{len(parts.entries)} entries in {c.origin} at size {c.size}",
    )
    if network.witness_quorum:
        findings.claim(
            "witnesses",
            lambda: check_witnesses(parts, network, authority),
            lambda count: (
                f"{count} of {len(network.witnesses)} witnesses saw this log only grow, "
                f"{network.witness_quorum} are needed"
            ),
        )


def _name(parts: BundleParts, epoch: EpochParts, claim: str) -> str:
    """How a claim about one epoch is named: with its number if there are several."""
    return claim if len(parts.epochs) == 1 else f"epoch {epoch.terms.epoch}: {claim}"


def _epochs_shown(count: int) -> str:
    if count == 1:
        return "one epoch, from the beginning to the end"
    return f"{count} epochs, each going on where the one before was cut"


def _frames_shown(parts: BundleParts, found: Sequence[EpochFrames]) -> str:
    frames = sum(len(epoch.frames) for epoch in parts.epochs)
    chunks = sum(len(one.closes) + (one.cut is not None) for one in found)
    return f"{frames} frames cover every position in order, in {chunks} chunks"


def _receipts_shown(stage: StageTerms, receipts: Sequence[StageReceipt | None]) -> str:
    signed = sum(receipt is not None for receipt in receipts)
    return f"{signed} chunks by {stage.peer}, layers {stage.span}"


def _voucher_shown(voucher: SessionVoucher | None) -> str:
    if voucher is None:
        return "none, and none is due"
    return (
        f"{sum(item.microcredits for item in voucher.amounts)} microcredits for "
        f"{voucher.prompt_tokens} prompt and {voucher.output_tokens} output tokens, as offered"
    )
