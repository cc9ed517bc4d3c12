"""A client's reservation lanes on its disk, and reservations on their way to the ledger.

The rules of ``plait.client.reserving``: signed, made durable, sent, and sent again until it
is answered; a reroute takes a lane that waits for nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from plait.client.actions import Event, Granted, ReservationSigned, Reserve, ReserveFailed
from plait.errors import LedgerError, NetworkError, PlaitError
from plait.identity import SigningKey
from plait.ledger.opening import route_digest
from plait.ledger.reserve import make_reservation
from plait.sim.authority import LEDGER
from plait.sim.engine import MS, S
from plait.sim.host import Host
from plait.sim.keys import cert_of
from plait.sim.network import Wires
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import ReserveRequest, ReserveResponse

LEDGER_WAIT_US = 20 * S
RETRY_US = 500 * MS
DEADLINE_US = 5 * S

Report = Callable[[Event], None]


@dataclass(slots=True)
class Lane:
    """One lane: what is durable, and whether somebody uses it."""

    number: int
    next_sequence: int = 1
    pending: SignedEnvelope | None = None
    locked: bool = False


@dataclass(slots=True)
class LaneDisk:
    """All lanes; survives a crash."""

    lanes: list[Lane] = field(default_factory=list)

    def take(self, *, idle: bool) -> Lane:
        """Lock a lane; an idle one has no reservation that waits for its answer."""
        for lane in self.lanes:
            if not lane.locked and not (idle and lane.pending is not None):
                break
        else:
            lane = Lane(len(self.lanes))
            self.lanes.append(lane)
        lane.locked = True
        return lane

    def unlock_all(self) -> None:
        """The process that locked them died."""
        for lane in self.lanes:
            lane.locked = False


class Reserving:
    """Carries out ``Reserve`` for one client."""

    def __init__(self, host: Host, wires: Wires, disk: LaneDisk, key: SigningKey) -> None:
        self._host, self._wires, self._disk, self._key = host, wires, disk, key

    def reserve(self, action: Reserve, report: Report) -> None:
        """Report ``ReservationSigned``, then ``Granted`` or ``ReserveFailed``."""
        lane = self._disk.take(idle=action.terms.epoch > 1)
        if lane.pending is None:
            self._begin(action, lane, report)
            return

        def resent(answer: object) -> None:
            if isinstance(answer, ReserveResponse | LedgerError):
                lane.next_sequence += isinstance(answer, ReserveResponse)
                lane.pending = None
                self._begin(action, lane, report)
                return
            assert isinstance(answer, PlaitError)
            lane.locked = False
            report(ReserveFailed(action.terms.epoch, answer))

        self._ask(lane.pending, resent)

    def _begin(self, action: Reserve, lane: Lane, report: Report) -> None:
        epoch = action.terms.epoch
        reservation = make_reservation(
            self._key,
            action.terms,
            lane.number,
            lane.next_sequence,
            self._host.now_ms(),
            action.ttl_ms,
            route_digest(action.terms),
        )
        lane.pending = reservation
        report(ReservationSigned(epoch, reservation))
        until_us = self._host.engine.now_us + (LEDGER_WAIT_US if epoch > 1 else 0)

        def answered(answer: object) -> None:
            if isinstance(answer, NetworkError) and self._host.engine.now_us < until_us:
                self._host.after(RETRY_US, "", lambda: self._ask(reservation, answered))
                return
            lane.locked = False
            if isinstance(answer, ReserveResponse):
                lane.pending = None
                lane.next_sequence += 1
                report(Granted(epoch, answer.grant))
                return
            assert isinstance(answer, PlaitError)
            if isinstance(answer, LedgerError):
                lane.pending = None
            report(ReserveFailed(epoch, answer))

        self._ask(reservation, answered)

    def _ask(self, reservation: SignedEnvelope, answered: Callable[[object], None]) -> None:
        request = ReserveRequest(reservation=reservation, account_cert=cert_of(self._host.name))
        ledger = self._wires.hosts[LEDGER]
        self._wires.call(self._host, ledger, "Reserve", request, DEADLINE_US, answered)
