"""Presenting vouchers to the ledger. A voucher is in a file before it is sent.

The file survives the process, not a power cut: that costs a fsync per session, and the
client's own settlement of the same voucher pays all stages.

A settlement that the ledger did not acknowledge is tried again every few seconds, and
after a restart: settling twice pays once. One that it did acknowledge keeps its file, as
``.settled``, until the network's witnesses have seen it in the log (``ledger.witnessed``); if
the network file asks for no witnesses, the authority's word is enough.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path

from google.protobuf.message import DecodeError

from plait.errors import LedgerError, PlaitError, RemoteProtocolError
from plait.identity import SigningKey
from plait.ledger.policy import Policy
from plait.ledger.service.committee import Ledger
from plait.ledger.service.remote import voucher_in
from plait.ledger.settling import may_still_be_paid
from plait.ledger.witnessed import Awaiting, Claim, Patience, check_claim, claim_of
from plait.logs import get_logger
from plait.node.sessions import StageSession
from plait.task_scope import TaskScope
from plait.types import Microcredits
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SettlementRequest, SettleRequest

log = get_logger(__name__)

RETRY_S = 5.0
SETTLED = ".settled"
PATIENCE = Patience(credit_max=Microcredits(100_000), wait_ms=600_000)


class Settler:
    """One stage's side of settlement. ``cert`` is its NodeKeyCert, ``key`` its ledger key.

    ``policy`` names the witnesses that must have seen a settlement; None asks for none.
    """

    def __init__(
        self,
        *,
        key: SigningKey,
        cert: SignedEnvelope,
        ledger: Ledger,
        spool_dir: Path,
        clock_ms: Callable[[], int],
        tasks: TaskScope,
        policy: Policy | None = None,
        patience: Patience = PATIENCE,
    ) -> None:
        self.awaiting = Awaiting()
        """What the ledger acknowledged and the witnesses have not been seen to see."""
        self._policy = policy if policy is not None and policy.quorum is not None else None
        self._patience = patience
        self.key = key
        self.cert = cert
        self._certs = {key.public: cert}
        self._ledger = ledger
        self._spool_dir = spool_dir
        self._clock_ms = clock_ms
        self._tasks = tasks
        self._running: set[asyncio.Task[None]] = set()
        self._presenting: set[Path] = set()
        spool_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(spool_dir.glob(f"*{SETTLED}")):
            self._await_witnesses(path)

    async def settle(self, session: StageSession) -> bool:
        """Present the session's best voucher, or that there is none and nothing is owed, so that
        what was reserved goes back; True once the ledger has posted it."""
        made = self._made(session)
        return made is not None and await self._offer(*made)

    def renew(self, key: SigningKey, cert: SignedEnvelope) -> None:
        """Sign with another key from now on; sessions that have begun keep theirs."""
        self.key, self.cert = key, cert
        self._certs[key.public] = cert

    def settle_later(self, session: StageSession) -> None:
        """The same, without waiting."""
        made = self._made(session)
        if made is not None:
            task = self._tasks.create_task(self._quietly(made[0], self._offer(*made)))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def idle(self, timeout_s: float) -> None:
        """Wait for settlements under way; what is not done stays on disk."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)

    @property
    def waiting(self) -> int:
        """Settlements under way."""
        return len(self._running) + len(self._presenting)

    @property
    def refusal(self) -> str:
        """Why no new session should be taken: too much is unwitnessed; empty if not."""
        return self.awaiting.refusal(self._clock_ms(), self._patience)

    def _made(self, session: StageSession) -> tuple[Path, SettleRequest | None] | None:
        """The file of what to send, or what does not fit on the disk; None if there is nothing
        to say."""
        if session.books is None:
            return None
        request = session.books.settlement(self._clock_ms(), True)
        if request is None:
            return None
        message = SettleRequest(
            request=request,
            payee_cert=self._certs[request.signer],
            voucher=session.books.voucher,
        )
        path = self._spool_dir / f"{session.id.hex()}-{session.terms.epoch}"
        part = path.with_suffix(".part")
        try:
            part.write_bytes(message.SerializeToString())
            part.replace(path)
        except OSError as error:
            log.error("a settlement could not be kept on disk", reason=str(error))
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            return path, message
        return path, None

    async def _offer(self, path: Path, unkept: SettleRequest | None) -> bool:
        if unkept is None:
            return await self._present(path)
        message = unkept  # sent all the same, this once
        voucher = voucher_in(message)
        paid = await self._ledger.settle(message.request, message.payee_cert, voucher)
        log.info("settled", session=path.name, paid_microcredits=paid)
        return True

    async def _present(self, path: Path) -> bool:
        if path in self._presenting:
            return False
        self._presenting.add(path)
        try:
            return await self._present_alone(path)
        finally:
            self._presenting.discard(path)

    async def _present_alone(self, path: Path) -> bool:
        try:
            message = SettleRequest.FromString(path.read_bytes())
        except FileNotFoundError:
            return True  # settled meanwhile
        except DecodeError:
            log.error("a spooled settlement is damaged", file=str(path))
            path.replace(path.with_suffix(".refused"))
            return False
        voucher = voucher_in(message)
        try:
            paid = await self._ledger.settle(message.request, message.payee_cert, voucher)
        except LedgerError as error:
            if self._may_come(message, error):
                log.info("settlement waits for its reservation", session=path.name)
                return False
            log.warning("settlement refused", session=path.name, reason=str(error))
            path.replace(path.with_suffix(".refused"))
            return False
        with contextlib.suppress(FileNotFoundError):
            if self._policy is None or voucher is None:
                path.unlink()
            else:
                kept = path.with_suffix(SETTLED)
                path.replace(kept)
                self._await_witnesses(kept)
        log.info("settled", session=path.name, paid_microcredits=paid)
        return True

    def _await_witnesses(self, path: Path) -> None:
        try:
            self.awaiting.add(path.name, claim_of(SettleRequest.FromString(path.read_bytes())))
        except (OSError, DecodeError, RemoteProtocolError) as error:
            log.error("a settled voucher cannot be read", file=str(path), reason=str(error))
            with contextlib.suppress(OSError):
                path.replace(path.with_suffix(".refused"))

    async def confirm_forever(self) -> None:
        """Ask again and again whether the witnesses have seen what was settled."""
        while True:
            await self.confirm_once()
            await asyncio.sleep(RETRY_S)

    async def confirm_once(self) -> None:
        """Ask for a bounded number of settlements; forget the files of those proven."""
        for name, claim in self.awaiting.next():
            try:
                await self._confirm(claim)
            except PlaitError as error:
                log.info("a settlement waits for witnesses", session=name, reason=str(error))
            else:
                (self._spool_dir / name).unlink(missing_ok=True)
                self.awaiting.drop(name)

    async def _confirm(self, claim: Claim) -> None:
        """Raises ``PlaitError`` while the log is not seen to hold what was claimed."""
        told = await self._ledger.evidence(claim.session)
        if self._policy is not None:
            check_claim(claim, told.entries, told.proofs, told.checkpoint, self._policy)

    def _may_come(self, message: SettleRequest, error: LedgerError) -> bool:
        issued_ms = SettlementRequest.FromString(message.request.payload).issued_ms
        return may_still_be_paid(str(error), issued_ms, self._clock_ms())

    async def _quietly(self, path: Path, presenting: Coroutine[None, None, bool]) -> None:
        try:
            await presenting
        except (PlaitError, OSError) as error:
            log.info("settlement waits", session=path.name, reason=str(error))

    async def retry_forever(self) -> None:
        """Present again and again what the ledger has not acknowledged."""
        while True:
            await self.retry_once()
            await asyncio.sleep(RETRY_S)

    async def retry_once(self) -> None:
        """Present what is on disk, oldest name first."""
        for path in sorted(self._spool_dir.iterdir()):
            if not path.suffix:
                await self._quietly(path, self._present(path))
