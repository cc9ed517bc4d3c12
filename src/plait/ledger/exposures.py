"""Exposures as notices: who says that an audit exposed whom, and where that can be judged. Pure.

A report is its reporter's word: it proves that somebody said so, and nothing about the stage.
So it harms nobody by itself. Who has the layers computes the evidence again; others count the
reporters that they trust, or nobody. Bounded: one report per reporter and peer, the newest;
few per reporter, so that who floods displaces its own.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass

from plait.envelope import decode, open_envelope, seal
from plait.errors import BadProof, BadSignature
from plait.identity import SigningKey, public_key_of
from plait.ledger.certs import check_key_cert
from plait.types import PeerId
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.log_pb2 import ExposureNotice, ExposureReport
from plait.v1.stage_pb2 import AUDIT_OUTCOME_EXPOSED, AuditVerdict

REPORTS_MAX = 512
REPORTS_PER_REPORTER_MAX = 8
NOTICE_BYTES_MAX = 4_096
EVIDENCE_AT_MAX = 200


@dataclass(frozen=True, slots=True)
class Reported:
    """What a checked report says."""

    reporter: PeerId
    peer: PeerId
    auditor: PeerId
    session_id: bytes
    epoch: int
    chunk: int
    stage: int
    reason: str
    evidence_digest: bytes
    evidence_at: str
    issued_ms: int


def make_report(
    key: SigningKey,
    cert: SignedEnvelope,
    *,
    network_id: str,
    verdict: SignedEnvelope,
    evidence_digest: bytes,
    evidence_at: str,
    now_ms: int,
) -> ExposureNotice:
    """Report a verdict with the reporter's ledger key.

    ``evidence_at`` says where the evidence can be had; empty: from the reporter, who decides.
    It holds what crossed the stage, from which a prompt can be guessed.
    """
    report = ExposureReport(
        network_id=network_id,
        verdict=verdict,
        evidence_digest=evidence_digest,
        evidence_at=evidence_at,
        issued_ms=now_ms,
    )
    return ExposureNotice(report=seal(key, report), reporter_cert=cert)


def check_report(notice: ExposureNotice, network_id: str) -> Reported:
    """Open a report; raises ``VerificationError`` or ``RemoteProtocolError`` if it is none."""
    if notice.ByteSize() > NOTICE_BYTES_MAX:
        raise BadProof(f"a report is at most {NOTICE_BYTES_MAX} bytes")
    report = open_envelope(notice.report, ExposureReport)
    # Valid when it began, as for fork proofs: old reports are still reports.
    begin_ms = decode(notice.reporter_cert.payload, NodeKeyCert).not_before_ms
    reporter, key = check_key_cert(notice.reporter_cert, network_id, begin_ms)
    if notice.report.signer != key:
        raise BadSignature("the report is not signed by the key that its certificate names")
    verdict = open_envelope(report.verdict, AuditVerdict)
    if not network_id == report.network_id == verdict.network_id:
        raise BadProof("the report is of another network")
    if verdict.outcome != AUDIT_OUTCOME_EXPOSED or len(verdict.session_id) != 16:
        raise BadProof("the verdict exposes nobody")
    try:
        public_key_of(verdict.peer_id)
        public_key_of(verdict.auditor_peer_id)
    except ValueError as error:
        raise BadProof(f"the verdict names no peer: {error}") from error
    shown = report.evidence_at
    if len(report.evidence_digest) != 32 or len(shown) > EVIDENCE_AT_MAX or not shown.isprintable():
        raise BadProof("the report names no evidence")
    return Reported(
        reporter,
        PeerId(verdict.peer_id),
        PeerId(verdict.auditor_peer_id),
        verdict.session_id,
        verdict.epoch,
        verdict.chunk,
        verdict.stage_index,
        verdict.reason,
        report.evidence_digest,
        shown,
        report.issued_ms,
    )


class Exposures:
    """The reports that one party holds, oldest first."""

    def __init__(self, network_id: str) -> None:
        self._network_id = network_id
        self._kept: OrderedDict[tuple[PeerId, PeerId], tuple[Reported, ExposureNotice]] = (
            OrderedDict()
        )

    def all(self) -> tuple[Reported, ...]:
        """What is reported."""
        return tuple(reported for reported, _ in self._kept.values())

    def notices(self) -> list[ExposureNotice]:
        """The same, as signed."""
        return [notice for _, notice in self._kept.values()]

    def handle(self, notice: ExposureNotice) -> Reported | None:
        """Take a report, if it says anything new; raises what ``check_report`` raises."""
        said = notice.report.signer, notice.report.payload
        if any((one.report.signer, one.report.payload) == said for one in self.notices()):
            return None
        reported = check_report(notice, self._network_id)
        key = reported.reporter, reported.peer
        known = self._kept.pop(key, None)
        if known is not None and known[0].issued_ms >= reported.issued_ms:
            self._kept[key] = known
            return None
        self._kept[key] = reported, notice
        self._make_room(reported.reporter)
        return reported if known is None else None

    def _make_room(self, reporter: PeerId) -> None:
        counts = Counter(one for one, _ in self._kept)
        if counts[reporter] > REPORTS_PER_REPORTER_MAX:
            self._forget_oldest_of(reporter)
        elif len(self._kept) > REPORTS_MAX:
            self._forget_oldest_of(counts.most_common(1)[0][0])

    def _forget_oldest_of(self, reporter: PeerId) -> None:
        del self._kept[next(key for key in self._kept if key[0] == reporter)]
