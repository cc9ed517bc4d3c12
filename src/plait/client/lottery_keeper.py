"""Holding the audit lottery without being asked: the sessions that are due, one by one.

Runs in the background of a client. A session is looked at some seconds after it ended, and
again until the ledger has paid every stage, or its stages may have forgotten it.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from plait.client.account import Account
from plait.client.audit_spool import (
    DUE_FILES_MAX,
    TRUST_AFTER_MS,
    AuditRecord,
    AuditSpool,
)
from plait.client.auditing import Audited
from plait.errors import PlaitError
from plait.ledger.exposures import make_report
from plait.ledger.lottery import Lot
from plait.ledger.notices import Told
from plait.logs import get_logger
from plait.types import PeerId
from plait.v1.stage_pb2 import AuditEvidence

log = get_logger(__name__)

PERIOD_S = 5.0
DUE_AFTER_MS = 3_000
GIVE_UP_AFTER_MS = TRUST_AFTER_MS
RETRY_MS = 30_000


class Audit(Protocol):
    """Asks for the audits of a bundle that the lottery drew, but for some lots."""

    async def __call__(self, bundle: bytes, *, skip: Collection[Lot]) -> Sequence[Audited]:
        """What became of each lot."""


def report_of(evidence: AuditEvidence, account: Account, network_id: str, now_ms: int) -> Told:
    """A notice of an exposure. The evidence stays here: a prompt can be guessed from it."""
    data = evidence.SerializeToString(deterministic=True)
    notice = make_report(
        account.ledger_key,
        account.certificate(network_id, now_ms),
        network_id=network_id,
        verdict=evidence.verdict,
        evidence_digest=hashlib.sha256(data).digest(),
        evidence_at="",
        now_ms=now_ms,
    )
    return Told(exposures=(notice,))


class LotteryKeeper:
    """Audits what is due in a spool, one bundle at a time; ``on_exposed`` is told of exposures."""

    def __init__(
        self,
        spool: AuditSpool,
        audit: Audit,
        clock_ms: Callable[[], int],
        on_exposed: Callable[[AuditEvidence], None] = lambda evidence: None,
    ) -> None:
        self._on_exposed = on_exposed
        self._spool = spool
        self._audit = audit
        self._clock_ms = clock_ms
        self._decided: OrderedDict[str, frozenset[Lot]] = OrderedDict()
        """By session, the lots that need not be looked at again."""

    async def run(self) -> None:
        """Look after what is due until cancelled."""
        while True:
            looked = await self.look_once()
            await asyncio.sleep(0.0 if looked else PERIOD_S)

    async def look_once(self) -> bool:
        """Look at the session that has been due longest; False if there is none."""
        due = self._spool.take(self._clock_ms(), DUE_AFTER_MS)
        if due is None:
            return False
        claimed, kept_ms, bundle = due
        session = claimed.stem.rpartition("-")[2]
        over = False
        try:
            decided = await self._look(session, bundle)
            over = decided or self._clock_ms() >= kept_ms + GIVE_UP_AFTER_MS
        except ValueError as error:
            over = True
            log.warning("a bundle on disk is none", file=claimed.name, reason=str(error))
        finally:
            if over:
                self._decided.pop(session, None)
                self._spool.done(claimed)
            else:
                # Rarer and rarer, and others have their turn meanwhile.
                now_ms = self._clock_ms()
                self._spool.give_back(claimed, now_ms + max(RETRY_MS, now_ms - kept_ms))
        return True

    async def _look(self, session: str, bundle: bytes) -> bool:
        """Audit what is not decided of a session; whether all of it is now."""
        known = self._decided.get(session, frozenset())
        try:
            found = await self._audit(bundle, skip=known)
        except PlaitError as error:
            log.info("an audit must wait", session=session, reason=str(error))
            return False
        self._spool.record([self._record(one, session) for one in found if one.auditor])
        decided = {one.lot for one in found if one.outcome != "unaudited"}
        self._decided[session] = known | decided
        if len(self._decided) > DUE_FILES_MAX:
            self._decided.popitem(last=False)
        return len(decided) == len(found)

    def _record(self, one: Audited, session: str) -> AuditRecord:
        lot, evidence = one.lot, ""
        if one.outcome != "consistent":
            log.warning("audit", peer=one.peer, outcome=one.outcome, reason=one.reason)
        if one.outcome != "consistent" and one.evidence is not None:
            name = f"{session}-epoch{lot.epoch}-stage{lot.stage_index}-chunk{lot.chunk}"
            data = one.evidence.SerializeToString(deterministic=True)
            evidence = self._spool.keep_evidence(name, data)
            if one.outcome == "exposed":
                self._on_exposed(one.evidence)
        return AuditRecord(
            at_ms=self._clock_ms(),
            session=session,
            epoch=lot.epoch,
            chunk=lot.chunk,
            stage=lot.stage_index,
            peer=one.peer,
            outcome=one.outcome,
            auditor=one.auditor or PeerId(""),
            reason=one.reason,
            evidence=evidence,
        )
