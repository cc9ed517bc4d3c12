"""Offline verification of a bundle: ``verify_bundle(data, network)``.

For any bytes whatever it returns a report and raises nothing. Trust comes only from the
network file (its authorities' keys) and from peer ids, which are keys. Claims that do not
depend on a false one are still examined, so that a report names every fault.
"""

from collections.abc import Sequence
from functools import partial

from plait.ledger.bundle import BundleParts, SealedBundle, read_bundle
from plait.ledger.receipt import ChunkClose
from plait.ledger.report import Claim, Findings, Outcome, Report
from plait.ledger.terms import StageTerms
from plait.ledger.verify_credit import (
    check_caps,
    check_journal,
    check_log,
    check_reservation,
    check_witnesses,
)
from plait.ledger.verify_receipts import (
    check_closed_ring,
    check_handoffs,
    check_receipts_complete,
    check_stage_receipts,
    check_voucher,
)
from plait.ledger.verify_session import (
    check_answer,
    check_client_cert,
    check_frames,
    check_manifest,
    check_network,
    check_offers,
    check_route,
    check_seal,
    check_stage_certs,
    check_terms,
)
from plait.network_file import NetworkFile
from plait.v1.ledger_pb2 import SessionVoucher, StageReceipt

__all__ = ["Claim", "Outcome", "Report", "verify_bundle"]

_NEVER_CHECKED = (
    "the computation: that each stage ran its layers on what it received (an audit replays it)",
    "the text: that it is what the model's tokenizer makes of the ids",
    "the draw: that the ids follow from the logits, seed and temperature",
    "the people: who operates these peers, and whether client and stages all collude",
    "the clocks: every date is the signer's own",
    "the publisher: the manifest is the model's by digest; who made the model is not proven",
)
_CREDIT_CLAIMS = "caps, journal and log"
_NOT_WITNESSED = (
    "the log's other readers: no witness has cosigned, so another history could be shown to them"
)
_WITNESSED = (
    "the log's other readers: another history could be shown to them if enough witnesses collude"
)


def verify_bundle(data: bytes, network: NetworkFile) -> Report:
    """Check every claim that a bundle makes against the keys of a network file."""
    findings = Findings()
    bundle = findings.claim(
        "encoding", lambda: read_bundle(data), lambda _: f"canonical JSON, {len(data)} bytes"
    )
    if bundle is None:
        findings.blocked("everything else", "the encoding")
    else:
        _check_parts(findings, bundle, network)
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
    closes = findings.claim(
        "frames",
        lambda: check_frames(parts),
        lambda c: f"{len(parts.frames)} frames cover every position once, in {len(c)} chunks",
    )
    voucher = None
    if closes is None:
        findings.blocked("receipts, hand-offs, ring and voucher", "the frames")
    else:
        _check_receipts(findings, parts, closes)
        voucher = findings.claim(
            "voucher",
            lambda: check_voucher(parts, closes),
            lambda v: (
                f"{sum(item.microcredits for item in v.amounts)} microcredits for "
                f"{v.prompt_tokens} prompt and {v.output_tokens} output tokens, as offered"
            ),
        )
    _check_credit(findings, parts, network, opened_ms, voucher)


def _check_session(findings: Findings, parts: BundleParts) -> int:
    """Check who took part on which terms; returns when the session opened."""
    stages = len(parts.terms.stages)
    opening = findings.claim(
        "session terms",
        lambda: check_terms(parts),
        lambda _: f"session {parts.terms.session_id.hex()}, signed by the client",
    )
    sampling, opened_ms = opening if opening is not None else (None, parts.sealed_ms)
    findings.claim(
        "client certificate",
        lambda: check_client_cert(parts, opened_ms),
        lambda _: "the client delegated to its ledger key",
    )
    findings.claim(
        "stage certificates",
        lambda: check_stage_certs(parts, opened_ms),
        lambda _: f"{stages} stages delegated to their ledger keys",
    )
    findings.claim(
        "offers",
        lambda: check_offers(parts, opened_ms),
        lambda _: f"{stages} signed offers: span, prices and numeric class as in the route",
    )
    manifest = findings.claim(
        "manifest", lambda: check_manifest(parts), lambda m: f"{m.name}, {m.layers} layers"
    )
    findings.claim(
        "route",
        lambda: check_route(parts, manifest),
        lambda _: "layers " + " → ".join(str(stage.span) for stage in parts.terms.stages),
    )
    findings.claim(
        "answer",
        lambda: check_answer(parts, sampling, manifest),
        lambda _: f"{len(parts.token_ids)} ids drawn, ended by {parts.finish_reason}",
    )
    return opened_ms


def _check_receipts(findings: Findings, parts: BundleParts, closes: tuple[ChunkClose, ...]) -> None:
    complete = findings.claim(
        "receipts complete",
        lambda: check_receipts_complete(parts, closes),
        lambda count: f"{count}: one per stage and chunk",
    )
    if complete is None:
        findings.blocked("receipts, hand-offs and ring", "missing receipts")
        return
    by_stage = [
        findings.claim(
            f"receipts of stage {index}",
            partial(check_stage_receipts, parts, index, closes),
            partial(_receipts_shown, stage),
        )
        for index, stage in enumerate(parts.terms.stages)
    ]
    valid = [receipts for receipts in by_stage if receipts is not None]
    if len(valid) != len(by_stage):
        findings.blocked("hand-offs and ring", "a receipt")
        return
    receipts = tuple(zip(*valid, strict=True))
    findings.claim(
        "hand-offs",
        lambda: check_handoffs(receipts),
        lambda _: "each stage received what the one before it sent",
    )
    findings.claim(
        "ring",
        lambda: check_closed_ring(parts, receipts, closes),
        lambda _: "what was fed to stage 0 is the prompt and what the last stage drew",
    )


def _receipts_shown(stage: StageTerms, receipts: Sequence[StageReceipt]) -> str:
    return f"{len(receipts)} chunks by {stage.peer}, layers {stage.span}"


def _check_credit(
    findings: Findings,
    parts: BundleParts,
    network: NetworkFile,
    opened_ms: int,
    voucher: SessionVoucher | None,
) -> None:
    authority = findings.claim(
        "reservation and grant",
        lambda: check_reservation(parts, network, opened_ms),
        lambda a: f"granted by the ledger authority {a.peer}",
    )
    if voucher is None or authority is None:
        claims = "caps, journal, log and witnesses" if network.witness_quorum else _CREDIT_CLAIMS
        findings.blocked(claims, "the voucher or the grant")
        return
    findings.claim(
        "caps", lambda: check_caps(parts, voucher), lambda _: "no stage is above its cap"
    )
    findings.claim(
        "journal",
        lambda: check_journal(parts, voucher),
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
