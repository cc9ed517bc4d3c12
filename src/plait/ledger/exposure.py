"""Judgements of exposures: what judges of the network file sign, and when a quorum has. Pure.

A ledger has no weights, so it computes nothing. A judge has: it computes the stage again from
the evidence of an audit, which anybody can do too, and signs what it found. As many of the
judges that the network file names as it asks for decide, each counted once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from plait.envelope import decode, digest, encode, open_envelope, seal
from plait.errors import BadProof, BadSignature
from plait.identity import SigningKey
from plait.ledger.blame import about
from plait.ledger.escrow import NO_ESCROW, EscrowTerms
from plait.ledger.journal_commands import Forfeit
from plait.network_file import NetworkFile
from plait.types import AccountId, SessionId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import ExposureJudgement, JudgedExposure

JUDGED_EXPOSURE_TYPE = "application/vnd.plait.judged-exposure.v1"


@dataclass(frozen=True, slots=True)
class Judging:
    """What a network file says of escrow: its terms, the judges' keys, how many must agree."""

    terms: EscrowTerms = NO_ESCROW
    keys: frozenset[bytes] = frozenset()
    quorum: int = 0


NO_JUDGES = Judging()


def judging_of(network: NetworkFile) -> Judging:
    """The rules of a network."""
    return Judging(
        EscrowTerms(network.escrow_percent, network.escrow_window_s * 1000),
        frozenset(judge.key for judge in network.judges),
        network.judge_quorum,
    )


def sign_judgement(key: SigningKey, judgement: ExposureJudgement) -> SignedEnvelope:
    """What a judge signs after it has computed the stage again, and found it exposed."""
    return seal(key, judgement)


def combine_judgements(judgements: Sequence[SignedEnvelope]) -> SignedEnvelope:
    """One envelope with the judgements of several, by their keys. Nothing is checked."""
    ordered = sorted(judgements, key=lambda one: one.signer)
    return SignedEnvelope(
        payload_type=JUDGED_EXPOSURE_TYPE, payload=encode(JudgedExposure(judgements=ordered))
    )


def check_judged(envelope: SignedEnvelope, network_id: str, judging: Judging) -> Forfeit:
    """What a quorum of judges decided.

    Raises ``BadProof`` for fewer than the quorum, for judgements that are not of one chunk of
    one stage, and for what is not a judged exposure; ``BadSignature`` for a stranger's.
    """
    with about("judged exposure"):
        if envelope.payload_type != JUDGED_EXPOSURE_TYPE or envelope.signer or envelope.signature:
            raise BadProof("it is none, or it is signed outside")
        signed = tuple(decode(envelope.payload, JudgedExposure).judgements)
        if not judging.quorum:
            raise BadProof("the network file names no judges")
        if any(one.signer not in judging.keys for one in signed):
            raise BadSignature("a judgement is not by a judge of the network")
        signers = [one.signer for one in signed]
        if signers != sorted(set(signers)):
            raise BadProof("a judge is counted twice, or they are not in order")
        if len(signed) < judging.quorum:
            raise BadProof(f"{len(signed)} judges signed, {judging.quorum} are needed")
        found = [open_envelope(one, ExposureJudgement) for one in signed]
        if any(one.network_id != network_id for one in found):
            raise BadProof("a judgement is of another network")
        subjects = {(one.session_id, one.payee, one.receipt_digest) for one in found}
        if len(subjects) != 1:
            raise BadProof("the judgements are not of one receipt")
        session_id, payee, receipt = subjects.pop()
        if len(session_id) != 16 or len(receipt) != 32:
            raise BadProof("its session or receipt is none")
        return Forfeit(SessionId(session_id), AccountId(payee), digest(envelope.payload))
