"""Reports of exposures: what is one, how few are kept, and that they travel and decide nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from plait.envelope import seal
from plait.errors import RemoteProtocolError, VerificationError
from plait.ledger.certs import make_key_cert
from plait.ledger.exposures import (
    REPORTS_MAX,
    REPORTS_PER_REPORTER_MAX,
    Exposures,
    Reported,
    check_report,
    make_report,
)
from plait.ledger.notices import TOLD_BYTES_MAX, NoticeBoard, Told
from plait.testing.accounting import NOW_MS, cert_of, key_of, paper_network
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.log_pb2 import ExposureNotice
from plait.v1.stage_pb2 import (
    AUDIT_OUTCOME_CONSISTENT,
    AUDIT_OUTCOME_EXPOSED,
    AuditVerdict,
)

NETWORK = paper_network()
STAGE, AUDITOR = key_of("stage 1").peer_id, key_of("auditor").peer_id


def verdict(**changes: Any) -> SignedEnvelope:
    fields: dict[str, Any] = {
        "network_id": NETWORK.network_id,
        "session_id": b"s" * 16,
        "epoch": 1,
        "chunk": 3,
        "stage_index": 1,
        "peer_id": STAGE,
        "auditor_peer_id": AUDITOR,
        "outcome": AUDIT_OUTCOME_EXPOSED,
        "reason": "activations are 0.2 off",
    }
    return seal(key_of("auditor ledger"), AuditVerdict(**{**fields, **changes}))


def report(name: str = "client", now_ms: int = NOW_MS, **changes: Any) -> ExposureNotice:
    fields: dict[str, Any] = {
        "network_id": NETWORK.network_id,
        "verdict": verdict(),
        "evidence_digest": bytes(32),
        "evidence_at": "https://client.example/evidence",
    }
    key = key_of(f"{name} ledger")
    return make_report(key, cert_of(name), now_ms=now_ms, **{**fields, **changes})


def test_a_report_says_who_says_what_of_whom() -> None:
    reported = check_report(report(), NETWORK.network_id)
    assert (reported.reporter, reported.peer) == (key_of("client").peer_id, STAGE)
    assert (reported.auditor, reported.chunk, reported.stage) == (AUDITOR, 3, 1)
    assert reported.evidence_at == "https://client.example/evidence"


def stolen() -> ExposureNotice:
    other = report()
    other.reporter_cert.CopyFrom(cert_of("stage 0"))
    return other


def flipped() -> ExposureNotice:
    signed = report()
    signed.report.signature = signed.report.signature[:-1] + bytes(
        [signed.report.signature[-1] ^ 1]
    )
    return signed


NONE_AT_ALL: list[Callable[[], ExposureNotice]] = [
    stolen,
    flipped,
    ExposureNotice,
    lambda: report(network_id="x"),
    lambda: report(verdict=verdict(network_id="x")),
    lambda: report(verdict=verdict(outcome=AUDIT_OUTCOME_CONSISTENT)),
    lambda: report(verdict=verdict(peer_id="nobody")),
    lambda: report(verdict=verdict(auditor_peer_id="nobody")),
    lambda: report(verdict=verdict(session_id=b"short")),
    lambda: report(verdict=cert_of("auditor")),
    lambda: report(evidence_digest=b"short"),
    lambda: report(evidence_at="x" * 201),
    lambda: report(evidence_at="two\nlines"),
    lambda: report(verdict=verdict(reason="x" * 5_000)),
]


@pytest.mark.parametrize("notice", NONE_AT_ALL)
def test_what_is_no_report_is_not_kept(notice: Callable[[], ExposureNotice]) -> None:
    with pytest.raises((VerificationError, RemoteProtocolError)):
        check_report(notice(), NETWORK.network_id)
    board = NoticeBoard(NETWORK)
    assert board.handle(Told(exposures=(notice(),))) == []
    assert board.exposures.all() == ()


def test_reports_travel_once_and_freeze_nobody() -> None:
    first, second = NoticeBoard(NETWORK), NoticeBoard(NETWORK)
    [action] = first.handle(Told(exposures=(report(),)))
    assert isinstance(action, Reported)
    assert second.handle(first.tell()) == [action]
    assert second.handle(first.tell()) == []
    assert second.frozen == {}
    third = NoticeBoard(NETWORK)
    third.restore(second.stored())
    assert third.exposures.all() == first.exposures.all()


def test_a_newer_report_takes_the_place_of_an_older() -> None:
    kept = Exposures(NETWORK.network_id)
    assert kept.handle(report()) is not None
    newer = report(now_ms=NOW_MS + 1, evidence_at="")
    assert kept.handle(newer) is None  # nobody new is exposed
    assert kept.handle(report()) is None
    assert [one.evidence_at for one in kept.all()] == [""]


def test_who_floods_displaces_its_own_reports() -> None:
    board = NoticeBoard(NETWORK)
    board.handle_exposure(report())
    for number in range(3 * REPORTS_PER_REPORTER_MAX):
        peer = key_of(f"slandered {number}").peer_id
        board.handle_exposure(report("flooder", verdict=verdict(peer_id=peer)))
    reporters = [one.reporter for one in board.exposures.all()]
    assert reporters.count(key_of("client").peer_id) == 1
    assert len(reporters) == 1 + REPORTS_PER_REPORTER_MAX
    told = board.tell()
    assert sum(one.ByteSize() for one in told.exposures) <= TOLD_BYTES_MAX


def test_many_reporters_are_bounded_too() -> None:
    kept = Exposures(NETWORK.network_id)
    for number in range(REPORTS_MAX + 5):
        name = f"reporter {number}"
        cert = make_key_cert(
            key_of(name), key_of(f"{name} ledger").public, NETWORK.network_id, NOW_MS, 10**6, 1
        )
        kept.handle(
            make_report(
                key_of(f"{name} ledger"),
                cert,
                network_id=NETWORK.network_id,
                verdict=verdict(),
                evidence_digest=bytes(32),
                evidence_at="",
                now_ms=NOW_MS,
            )
        )
    assert len(kept.all()) == REPORTS_MAX
