"""Reservations on their way to the ledger: signed, made durable, sent.

A lane whose last reservation was never answered first sends that one again; a reroute does
not wait for such a lane, it takes another.
"""

import asyncio
from collections.abc import Callable

from plait.client.account import Account, Lane
from plait.client.actions import Event, Granted, ReservationSigned, Reserve, ReserveFailed
from plait.envelope import decode
from plait.errors import ConfigError, LedgerError, NetworkError, PlaitError
from plait.ledger.opening import route_digest
from plait.ledger.reserve import make_reservation
from plait.ledger.service.committee import Ledger
from plait.logs import get_logger
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope

log = get_logger(__name__)

LEDGER_WAIT_S = 20.0
"""How long a session that is under way may go on without its ledger's answer."""
_RETRY_S = 0.5


class Reserving:
    """Carries out ``Reserve`` for one account, or one sub-account of it."""

    def __init__(
        self,
        account: Account,
        ledger: Ledger,
        client_cert: SignedEnvelope,
        clock_ms: Callable[[], int],
        sub_account: str = "",
    ) -> None:
        self._account = account
        self._ledger = ledger
        self._client_cert = client_cert
        self._clock_ms = clock_ms
        self._sub_account = sub_account

    async def reserve(self, action: Reserve, report: Callable[[Event], None]) -> None:
        """Report ``ReservationSigned``, then ``Granted`` or ``ReserveFailed``."""
        epoch = action.terms.epoch
        try:
            async with self._account.free_lane(idle=epoch > 1) as lane:
                sequence, pending = lane.load()
                if pending is not None:
                    sequence = await self._resend(lane, sequence, pending)
                reservation = make_reservation(
                    self._account.ledger_key,
                    action.terms,
                    lane.number,
                    sequence,
                    self._clock_ms(),
                    action.ttl_ms,
                    route_digest(action.terms),
                    sub_account=self._sub_account,
                )
                await lane.save_soon(sequence, reservation)
                report(ReservationSigned(epoch, reservation))
                grant = await self._ask(lane, sequence, reservation, patient=epoch > 1)
                report(Granted(epoch, grant))
                await _note_answered(lane, sequence)
        except PlaitError as error:
            report(ReserveFailed(epoch, error))

    async def _ask(
        self, lane: Lane, sequence: int, reservation: SignedEnvelope, *, patient: bool
    ) -> SignedEnvelope:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + (LEDGER_WAIT_S if patient else 0.0)
        while True:
            try:
                return await self._ledger.reserve(reservation, self._client_cert)
            except LedgerError:
                await lane.save_soon(sequence, None)
                raise
            except NetworkError as error:
                if loop.time() >= deadline_s:
                    raise
                log.info("the ledger does not answer yet", reason=str(error))
                await asyncio.sleep(_RETRY_S)

    async def _resend(self, lane: Lane, sequence: int, pending: SignedEnvelope) -> int:
        try:
            # It may have been signed before the ledger key was rotated.
            signer = self._account.with_key(pending.signer)
            network_id = decode(self._client_cert.payload, NodeKeyCert).network_id
            cert = signer.certificate(network_id, self._clock_ms())
            await self._ledger.reserve(pending, cert)
        except LedgerError as error:
            log.info("an earlier reservation was refused", lane=lane.number, reason=str(error))
            return sequence
        return sequence + 1


async def _note_answered(lane: Lane, sequence: int) -> None:
    """Free the lane of its reservation; if that is not on disk, the ledger is asked once more."""
    try:
        await lane.save_soon(sequence + 1, None)
    except ConfigError as error:
        log.warning("a reservation will be sent again", lane=lane.number, reason=str(error))
