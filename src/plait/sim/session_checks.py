"""What must hold once the network is at rest: answers, money, work, evidence."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from plait.client.actions import Finished
from plait.client.epoch import Epoch
from plait.errors import PlaitError
from plait.ledger.balances import HOLD, entry_from_payload
from plait.ledger.bundle import BundleParts, EpochParts, build_bundle
from plait.ledger.journal import Accepted, Books, Expire
from plait.ledger.report import Claim
from plait.ledger.verify import verify_bundle
from plait.sim.authority import LedgerHost
from plait.sim.engine import S, Violation
from plait.sim.keys import cert_of, key_of, peer_of
from plait.sim.request import Request
from plait.sim.stage import StageHost
from plait.testing.accounting import NETWORK_ID
from plait.types import AccountId, SessionId
from plait.v1.ledger_pb2 import (
    GetEvidenceRequest,
    GetEvidenceResponse,
)

if TYPE_CHECKING:
    from plait.sim.sessions import NetworkWorld

EPOCHS_PER_FAULT_MAX = 2
FAR_FUTURE_MS = 10**12


def check_answers(world: "NetworkWorld", requests: Sequence[Request]) -> None:
    """Every request ended with the whole answer, or with one clear error.

    With one fault at a time every request is answered; with two, whatever has begun: the
    faults are shorter than a session waits for a replica. Each fault costs few epochs.
    """
    for request in requests:
        if request.vanished:
            continue
        assert request.outcome is not None
        if isinstance(request.outcome, Finished):
            came, due = tuple(request.delivered), request.reference
            if came != due:
                raise Violation("tokens", f"{len(came)} of {len(due)} came")
        else:
            error = request.outcome.error
            if not isinstance(error, PlaitError) or not str(error):
                raise Violation("errors", f"a session ended with {error!r}")
            begun = world.mood == "double" and request.delivered
            if begun or world.mood in ("calm", "single"):
                raise Violation("liveness", f"no answer although a replica was left: {error!r}")
        epochs = len(request.core.epochs) if request.core is not None else 0
        if world.mood != "storm" and epochs > 1 + EPOCHS_PER_FAULT_MAX * world.faults.count:
            raise Violation("liveness", f"{epochs} epochs for {world.faults.count} faults")


def check_money(
    requests: Sequence[Request], stages: Sequence[StageHost], ledger: LedgerHost
) -> None:
    """Nobody is charged beyond what was signed; whoever was promised something has it."""
    books = ledger.recorder.books
    for core in (core for request in requests for core in request.cores):
        if not core.epochs:
            continue
        session_id = core.epochs[0].terms.session_id
        paid_sum = 0
        for stage in stages:
            peer = peer_of(stage.name)
            promised = core.books.promised(peer) if core.books is not None else 0
            paid = books.paid(session_id, AccountId(peer))
            paid_sum += paid
            if paid > promised:
                raise Violation("money", f"{stage.name} was paid {paid}, promised {promised}")
        if core.books is not None and paid_sum > core.books.cost:
            raise Violation("money", f"{paid_sum} were paid of a cost of {core.books.cost}")
    for stage in stages:
        if stage.refused:
            raise Violation("money", f"a settlement was refused: {stage.refused[0]}")
        for session, account in stage.accounts.items():
            paid = books.paid(session, AccountId(peer_of(stage.name)))
            if paid < account.promised and not stage.spool.lost:
                raise Violation(
                    "money", f"{stage.name} was paid {paid}, its voucher says {account.promised}"
                )
    _check_expiry(ledger)


def _check_expiry(ledger: LedgerHost) -> None:
    """What is still held goes back once its time is over."""
    books = Books(NETWORK_ID)
    for stored in ledger.disk.journal:
        entry = entry_from_payload(stored.payload)
        books.post(entry, ledger.recorder.cause_of(entry))
    outcome = books.apply(Expire(), FAR_FUTURE_MS * 1_000)
    if not isinstance(outcome, Accepted):
        raise Violation("money", f"expiry was refused: {outcome}")
    if held := [name for name in books.balances.all() if name.startswith(HOLD)]:
        raise Violation("money", f"held for ever: {held}")


def check_work(stages: Sequence[StageHost]) -> None:
    """An honest node works at most one chunk beyond what it was promised."""
    for stage in stages:
        for session, account in stage.accounts.items():
            prompt_tokens, paid = account.prompt_tokens, account.paid_for
            prompt, outputs = _counts(account.fed_end, prompt_tokens)
            base_prompt, base_outputs = _counts(account.base_end, prompt_tokens)
            unpaid_prompt = prompt - max(paid.prompt + paid.cached_prompt, base_prompt)
            unpaid_outputs = outputs - max(paid.output, base_outputs)
            if unpaid_prompt > account.prefill_chunk_tokens or (
                unpaid_outputs > account.chunk_tokens
            ):
                raise Violation(
                    "work",
                    f"{stage.name} computed {unpaid_prompt} prompt and {unpaid_outputs} output "
                    f"tokens of session {session.hex()[:8]} that nobody pays for",
                )


def _counts(end: int, prompt_tokens: int) -> tuple[int, int]:
    """Prompt and output tokens once the rows before ``end`` are computed."""
    return min(end, prompt_tokens), max(0, end - prompt_tokens + 1)


def check_bundles(world: "NetworkWorld", requests: Sequence[Request]) -> None:
    """The evidence of every finished session verifies offline."""
    if world.engine.seed % BUNDLES_EVERY:
        return
    for request in requests:
        if isinstance(request.outcome, Finished) and not request.vanished:
            _check_bundle(world, request)


BUNDLES_EVERY = 4
"""Verifying is dear: one seed of so many."""


def _check_bundle(world: "NetworkWorld", request: Request) -> None:
    core = request.core
    assert core is not None
    assert isinstance(request.outcome, Finished)
    evidence = _evidence(world, core.epochs[0].terms.session_id)
    client = next(host for host in world.clients if request in host.requests)
    parts = BundleParts(
        network_id=NETWORK_ID,
        client_cert=cert_of(client.name),
        manifest=request.order.manifest,
        prompt_ids=request.question.prompt_ids,
        token_ids=tuple(core.driver.drawn),
        text="simulated",
        finish_reason=request.outcome.reason,
        epochs=tuple(_epoch_parts(epoch, request) for epoch in core.epochs),
        entries=tuple(evidence.entries),
        proofs=tuple((proof.leaf_index, tuple(proof.hashes)) for proof in evidence.proofs),
        checkpoint=evidence.checkpoint,
        sealed_ms=client.now_ms(),
    )
    report = verify_bundle(build_bundle(parts, key_of(client.name)), world.network)
    false = [claim for claim in report.claims if claim.ok is False and not _unpaid(claim, parts)]
    if false:
        raise Violation("bundle", f"it does not verify: {false}")
    missing = [claim for claim in report.claims if claim.ok is None]
    if missing and world.mood == "calm":
        raise Violation("bundle", f"it is incomplete: {missing}")


def _unpaid(claim: Claim, parts: BundleParts) -> bool:
    """Whether it says that a stage was paid less than promised, after a failure.

    One that was lost or replaced may never have had the voucher that paid for its cut chunk.
    """
    return claim.name == "journal" and " was paid " in claim.detail and len(parts.epochs) > 1


def _epoch_parts(epoch: Epoch, request: Request) -> EpochParts:
    evidence = epoch.evidence
    return EpochParts(
        terms=epoch.terms,
        session_open=epoch.opening,
        stage_certs=epoch.certs,
        offers=tuple(request.envelopes[offer.digest] for offer in epoch.offers),
        frames=tuple(
            (
                frame.traversal,
                frame.first_position,
                frame.rows,
                frame.draft_ids,
                frame.sample,
                frame.close_chunk,
                frame.replay,
            )
            for frame in epoch.frames
        ),
        reservation=epoch.reservation,
        grant=epoch.grant,
        receipts=evidence.receipts if evidence else (),
        cut=evidence.cut if evidence else None,
        voucher=evidence.voucher if evidence else None,
    )


def _evidence(world: "NetworkWorld", session_id: SessionId) -> GetEvidenceResponse:
    answers: list[object] = []
    ledger = world.side.ledger
    ledger.on_call(
        "checker", "GetEvidence", GetEvidenceRequest(session_id=session_id), answers.append
    )
    until_us = world.engine.now_us + 5 * S
    world.engine.run(until_us, lambda: bool(answers))
    (answer,) = answers
    if not isinstance(answer, GetEvidenceResponse):
        raise Violation("bundle", f"the ledger gives no evidence: {answer}")
    return answer
