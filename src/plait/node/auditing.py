"""Both sides of an audit, without IO: what a stage opens, and what an auditor makes of it."""

from collections.abc import Iterable, Iterator, Sequence

from plait.envelope import seal
from plait.errors import BadProof, CapacityError
from plait.identity import SigningKey
from plait.ledger.audit_rules import (
    Finding,
    Step,
    Verdict,
    check_opening,
    judge,
    tolerance_of,
)
from plait.ledger.audit_wire import Challenge, opened_epochs, opening_parts
from plait.node.tape import Tape
from plait.types import U64_MAX, PeerId, Sampling
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.stage_pb2 import (
    AUDIT_OUTCOME_CONSISTENT,
    AUDIT_OUTCOME_EXPOSED,
    AUDIT_OUTCOME_UNRESPONSIVE,
    AuditOpening,
    AuditOutcome,
    AuditVerdict,
)

_OUTCOMES: dict[Verdict, AuditOutcome] = {
    "consistent": AUDIT_OUTCOME_CONSISTENT,
    "exposed": AUDIT_OUTCOME_EXPOSED,
    "unresponsive": AUDIT_OUTCOME_UNRESPONSIVE,
}


def open_tape(tape: Tape | None, challenge: Challenge, me: PeerId) -> Iterator[AuditOpening]:
    """Open what a checked challenge asks for; raises ``BadProof`` or ``CapacityError``.

    A client can commit only once: the commitment that counts is the one of the opening.
    """
    if tape is None:
        raise CapacityError("this stage keeps nothing for audits")
    if challenge.stage.peer != me:
        raise BadProof("the challenge is for another stage")
    session = challenge.terms.session_id
    if tape.commitment(session) != challenge.commitment:
        raise BadProof("the session was opened with another commitment")
    for epoch in challenge.epochs:
        until, number = epoch.receipt.traversal, epoch.terms.epoch
        is_challenged = epoch is challenge.epochs[-1]
        after = epoch.previous.traversal if epoch.previous is not None else -1
        sent_from = after + 1 if is_challenged else until + 1
        received = tape.crossings(session, number, "input", until, opened_from=0)
        sent = tape.crossings(session, number, "output", until, opened_from=sent_from)
        states = tape.crossings(session, number, "state", until, opened_from=sent_from)
        yield from opening_parts(number, received, sent, states)


def steps_of(challenge: Challenge, openings: Iterable[AuditOpening]) -> tuple[Step, ...]:
    """What an auditor has to replay; raises ``BadProof`` if it is not what was committed to.

    Draws with penalties or a grammar depend on ids that the auditor is not given: then only
    what they were drawn from is judged.
    """
    return check_opening(
        opened_epochs(challenge, openings),
        challenge.lot.stage_index,
        judge_draws=not challenge.sampling.needs_history,
    )


def replay_sampling(challenge: Challenge) -> Sampling:
    """The sampling that an auditor replays with."""
    return Sampling() if challenge.sampling.needs_history else challenge.sampling


def verdict_on(challenge: Challenge, findings: Sequence[Finding]) -> tuple[Verdict, Finding, str]:
    """The verdict of a replay, the worst that was found, and a reason to read."""
    terms = challenge.terms
    last = challenge.lot.stage_index == len(terms.stages) - 1
    # A last stage commits to what it draws from, in fp32.
    tolerance = tolerance_of(challenge.numeric_class, "fp32" if last else terms.wire_dtype)
    off = judge(findings, tolerance)
    worst = Finding(
        off.first_position if off is not None else 0,
        max(one.distance for one in findings),
        max(one.margin for one in findings),
    )
    if off is None:
        return "consistent", worst, ""
    what = (
        f"activations are {off.distance:.3g} off"
        if not off.distance <= tolerance.distance
        else f"an id, or what it was drawn from, is {off.margin:.3g} logits off"
    )
    return "exposed", worst, f"at position {off.first_position} {what}"


def sign_verdict(
    key: SigningKey,
    auditor: PeerId,
    challenge: Challenge,
    verdict: Verdict,
    worst: Finding,
    reason: str,
    now_ms: int,
) -> SignedEnvelope:
    """The auditor's signed word; anybody who has the layers can check it again."""
    lot, terms = challenge.lot, challenge.terms
    message = AuditVerdict(
        network_id=terms.network_id,
        session_id=terms.session_id,
        epoch=lot.epoch,
        chunk=lot.chunk,
        stage_index=lot.stage_index,
        peer_id=challenge.stage.peer,
        auditor_peer_id=auditor,
        outcome=_OUTCOMES[verdict],
        receipt_digest=challenge.receipt_digest,
        numeric_class=challenge.numeric_class,
        distance_ppb=_scaled(worst.distance, 10**9),
        margin_micros=_scaled(worst.margin, 10**6),
        position=worst.first_position,
        reason=reason[:400],
        issued_ms=now_ms,
    )
    return seal(key, message)


def _scaled(value: float, unit: int) -> int:
    """A measure as an integer; what is infinite or no number is the largest one."""
    return min(round(value * unit), U64_MAX) if value <= U64_MAX / unit else U64_MAX
