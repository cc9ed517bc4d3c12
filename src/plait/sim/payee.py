"""A node that does nothing but gossip and be paid: the simplest host of both cores."""

from collections.abc import Mapping, Sequence

from plait.envelope import digest, open_envelope, seal
from plait.network_file import NetworkFile
from plait.sim.engine import Engine, S
from plait.sim.gossip import GossipPeer, Swarming
from plait.sim.host import Reply
from plait.sim.keys import cert_of, key_of, peer_of
from plait.sim.network import Wires
from plait.sim.payer import Promise
from plait.sim.settler import SpoolDisk, SpooledSettler
from plait.testing.accounting import NETWORK_ID
from plait.testing.offers import paper_offer
from plait.types import PeerId, Span
from plait.v1.ledger_pb2 import SessionVoucher, SettlementRequest, SettleRequest


class PayeeHost(Swarming):
    """Offers, and settles every voucher it is handed."""

    def __init__(
        self,
        engine: Engine,
        wires: Wires,
        name: str,
        network: NetworkFile,
        neighbours: Sequence[str],
        addresses: Mapping[PeerId, str],
    ) -> None:
        super().__init__(engine, name)
        self.spool = SpoolDisk()
        self.refused: list[tuple[str, str]] = []
        self._wires, self._network = wires, network
        self._neighbours, self._addresses = neighbours, addresses
        self._best: dict[bytes, int] = {}
        """On disk: the highest number of each session's vouchers."""

    def on_start(self) -> None:
        """Join the swarm and go on settling."""
        self._settler = SpooledSettler(self, self._wires, self.spool, self.refused)
        self.gossip = GossipPeer(
            self,
            self._wires,
            self._network,
            key_of(self.name),
            neighbours=self._neighbours,
            addresses=self._addresses,
            publishes=True,
        )
        self.gossip.set_offer(paper_offer(self.name, Span(0, 1)), at_once=True)
        self.every(S, "", self.gossip.chores)

    def on_call(self, caller: str, method: str, request: object, reply: Reply) -> None:
        """Take a voucher."""
        assert isinstance(request, Promise)
        voucher = open_envelope(request.voucher, SessionVoucher)
        if voucher.sequence > self._best.get(voucher.session_id, 0) and not self.spool.failing:
            self._best[voucher.session_id] = voucher.sequence
            settlement = SettlementRequest(
                network_id=NETWORK_ID,
                session_id=voucher.session_id,
                payee=peer_of(self.name),
                voucher_digest=digest(request.voucher.payload),
                release=request.last,
                issued_ms=self.now_ms(),
            )
            self._settler.keep(
                SettleRequest(
                    request=seal(key_of(f"{self.name} ledger"), settlement),
                    payee_cert=cert_of(self.name),
                    voucher=request.voucher,
                )
            )
        reply(voucher)
