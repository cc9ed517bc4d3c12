"""A node's settlements: kept on its disk before they are sent, presented until answered.

The same rules as ``plait.node.settlement``, on a modelled disk and wire.
"""

from dataclasses import dataclass, field

from plait.envelope import open_envelope
from plait.errors import LedgerError, PlaitError
from plait.ledger.settling import may_still_be_paid
from plait.ledger.stage_books import StageBooks
from plait.sim.authority import LEDGER
from plait.sim.engine import S
from plait.sim.host import Host
from plait.sim.network import Wires
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SettlementRequest, SettleRequest, SettleResponse

RETRY_US = 5 * S
DEADLINE_US = 5 * S
RESERVATION_WAIT_MS = 20_000
"""As the node's, but within a run."""


@dataclass(slots=True)
class SpoolDisk:
    """Files that survive a crash."""

    files: dict[str, SettleRequest] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)
    """Names of those for which the ledger's grant was seen."""
    failing: bool = False
    lost: int = 0
    """Settlements that the disk did not take."""


class SpooledSettler:
    """One life of a node's settlements."""

    def __init__(
        self, host: Host, wires: Wires, disk: SpoolDisk, refused: list[tuple[str, str]]
    ) -> None:
        self._host, self._wires, self._disk = host, wires, disk
        self._refused = refused
        self._presenting: set[str] = set()
        host.every(RETRY_US, "", self._retry)

    def settle(self, books: StageBooks, cert: SignedEnvelope) -> None:
        """Keep the best voucher on disk, or that nothing is owed, and present it."""
        request = books.settlement(self._host.now_ms(), True)
        if request is not None:
            message = SettleRequest(request=request, payee_cert=cert, voucher=books.voucher)
            self.keep(message, granted=books.granted)

    def keep(self, message: SettleRequest, *, granted: bool = True) -> None:
        """Write a settlement down, then present it.

        Without a grant, on bounded credit, it may be refused: that is the risk that was taken.
        """
        settlement = open_envelope(message.request, SettlementRequest)
        name = f"{settlement.session_id.hex()}-{settlement.epoch}"
        if self._disk.failing:
            self._disk.lost += 1
            return
        self._disk.files[name] = message
        if granted:
            self._disk.granted.add(name)
        self._present(name)

    def _retry(self) -> None:
        for name in sorted(self._disk.files):
            self._present(name)

    def _present(self, name: str) -> None:
        if name in self._presenting:
            return
        self._presenting.add(name)
        message = self._disk.files[name]
        self._wires.call(
            self._host,
            self._wires.hosts[LEDGER],
            "Settle",
            message,
            DEADLINE_US,
            lambda answer: self._answered(name, message, answer),
        )

    def _answered(self, name: str, message: SettleRequest, answer: object) -> None:
        self._presenting.discard(name)
        if isinstance(answer, LedgerError):
            issued_ms = SettlementRequest.FromString(message.request.payload).issued_ms
            now_ms = self._host.now_ms()
            if name in self._disk.granted:
                if may_still_be_paid(str(answer), issued_ms, now_ms, RESERVATION_WAIT_MS):
                    return
                self._refused.append((self._host.name, str(answer)))
        elif isinstance(answer, PlaitError):
            return
        else:
            assert isinstance(answer, SettleResponse)
        if self._disk.files.get(name) is message:
            del self._disk.files[name]
        elif name in self._disk.files:
            self._present(name)
