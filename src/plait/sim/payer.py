"""A client that only pays: it reserves, promises and lets payees settle.

It exercises the ledger under faults without any computing. Its lane is durable, as a
client's must be: one reservation at a time, on disk before it is sent, sent until answered.
"""

from dataclasses import dataclass, field

from plait.envelope import digest, seal
from plait.errors import LedgerError, PlaitError
from plait.identity import SigningKey
from plait.sim.authority import LEDGER
from plait.sim.engine import MS, Engine, S, Violation
from plait.sim.host import START_MS, Host
from plait.sim.keys import cert_of, key_of, peer_of
from plait.sim.network import Wires
from plait.testing.accounting import NETWORK_ID
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    IssueRequest,
    PayeeAmount,
    ReserveRequest,
    ReserveResponse,
    SessionVoucher,
)

DEADLINE_US = 5 * S
RETRY_US = 300 * MS
CREDIT = 10**9


@dataclass(frozen=True, slots=True)
class Promise:
    """A voucher as it is handed over; ``last`` lets the payee release its hold."""

    voucher: SignedEnvelope
    last: bool


@dataclass(slots=True)
class Deal:
    """One reservation and what was promised of it."""

    session_id: bytes
    caps: dict[PeerId, int]
    reservation: SignedEnvelope
    granted: bool = False
    promised: dict[PeerId, int] = field(default_factory=dict)


@dataclass(slots=True)
class PayerDisk:
    """What survives a crash of the payer."""

    issued: bool = False
    next_sequence: int = 1
    pending: Deal | None = None
    deals: list[Deal] = field(default_factory=list)


class PayerHost(Host):
    """Makes ``deals_wanted`` deals, one after the other, with payees by name."""

    def __init__(
        self, engine: Engine, wires: Wires, name: str, payees: list[str], deals_wanted: int
    ) -> None:
        super().__init__(engine, name)
        self.disk = PayerDisk()
        self._wires = wires
        self._payees = payees
        self._deals_wanted = deals_wanted
        self._key: SigningKey = key_of(f"{name} ledger")

    @property
    def peer(self) -> PeerId:
        """Its account."""
        return peer_of(self.name)

    @property
    def finished(self) -> bool:
        """Whether every deal was promised to everybody."""
        return self.disk.pending is None and len(self.disk.deals) == self._deals_wanted

    def on_start(self) -> None:
        """Go on where the disk says."""
        self.after(self.engine.random.randrange(S), "", self._next)

    def _next(self) -> None:
        disk = self.disk
        if not disk.issued:
            self._call("Issue", self._order())
        elif disk.pending is not None:
            request = ReserveRequest(
                reservation=disk.pending.reservation, account_cert=cert_of(self.name)
            )
            self._call("Reserve", request)
        elif len(disk.deals) < self._deals_wanted:
            disk.pending = self._new_deal()
            self._next()

    def _call(self, method: str, request: object) -> None:
        ledger = self._wires.hosts[LEDGER]
        self._wires.call(self, ledger, method, request, DEADLINE_US, self._answered)

    def _answered(self, answer: object) -> None:
        disk = self.disk
        if isinstance(answer, LedgerError):
            raise Violation("ledger", f"{self.name} was refused: {answer}")
        if isinstance(answer, PlaitError):
            self.after(RETRY_US, "", self._next)
            return
        if isinstance(answer, ReserveResponse):
            deal, disk.pending = disk.pending, None
            assert deal is not None
            deal.granted = True
            disk.next_sequence += 1
            disk.deals.append(deal)
            self._promise(deal)
        else:
            disk.issued = True
        self.after(self.engine.random.randrange(S), "", self._next)

    def _order(self) -> IssueRequest:
        order = IssueOrder(
            network_id=NETWORK_ID,
            account=self.peer,
            amount=CREDIT,
            order_id=digest(self.name.encode())[:16],
            issued_ms=START_MS,
        )
        return IssueRequest(order=seal(key_of("issuer"), order))

    def _new_deal(self) -> Deal:
        chance, disk = self.engine.random, self.disk
        session_id = chance.randbytes(16)
        names = chance.sample(self._payees, k=min(3, len(self._payees)))
        caps = {peer_of(name): chance.randrange(1, 1_000) for name in names}
        reservation = BudgetReservation(
            network_id=NETWORK_ID,
            account=self.peer,
            lane=1,
            sequence=disk.next_sequence,
            session_id=session_id,
            epoch=1,
            amount=sum(caps.values()),
            caps=_amounts(caps),
            issued_ms=self.now_ms(),
            expires_ms=self.now_ms() + 3_600_000,
        )
        return Deal(session_id, caps, seal(self._key, reservation))

    def _promise(self, deal: Deal) -> None:
        """Sign vouchers that rise, and hand each to some payees; the last one to all."""
        chance = self.engine.random
        rounds = chance.randrange(1, 4)
        for number in range(1, rounds + 1):
            deal.promised = {
                payee: cap if number == rounds else min(cap, deal.promised.get(payee, 0) + 7)
                for payee, cap in deal.caps.items()
            }
            voucher = SessionVoucher(
                network_id=NETWORK_ID,
                session_id=deal.session_id,
                epoch=1,
                sequence=number,
                account=self.peer,
                amounts=_amounts(deal.promised),
                issued_ms=self.now_ms(),
            )
            envelope = seal(self._key, voucher)
            for name in self._payees:
                if peer_of(name) in deal.caps:
                    self._hand(name, Promise(envelope, last=number == rounds))

    def _hand(self, name: str, promise: Promise) -> None:
        """Give a payee a voucher, again and again until it has it."""

        def again(answer: object) -> None:
            if isinstance(answer, PlaitError):
                self.after(RETRY_US, "", lambda: self._hand(name, promise))

        self._wires.call(self, self._wires.hosts[name], "Pay", promise, DEADLINE_US, again)


def _amounts(amounts: dict[PeerId, int]) -> list[PayeeAmount]:
    return [PayeeAmount(payee=payee, microcredits=amount) for payee, amount in amounts.items()]
