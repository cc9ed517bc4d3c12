"""The control plane and the ledger alone: gossip, payments and a log under faults."""

from collections.abc import Callable

from plait.ledger.balances import HOLD
from plait.network_file import NetworkFile, Witness
from plait.sim.authority import LEDGER, LedgerHost, WitnessHost
from plait.sim.engine import MS, Engine, S, Violation
from plait.sim.faults import Faults, Undo, Weather
from plait.sim.host import Host
from plait.sim.keys import key_of, peer_of
from plait.sim.ledger_checks import LogWatch
from plait.sim.network import Wires
from plait.sim.payee import PayeeHost
from plait.sim.payer import PayerHost
from plait.testing.accounting import paper_network
from plait.types import AccountId, SessionId

NODES = tuple(f"node {number}" for number in range(5))
PAYERS = ("payer 0", "payer 1")
WITNESSES = ("witness.example/0", "witness.example/1")
FAULTS_UNTIL_US = 20 * S
REST_US = 45 * S

WEATHER = Weather(
    between_us=700 * MS,
    lasts_us=(200 * MS, 6 * S),
    kinds=(
        ("crash", 5),
        ("hang", 3),
        ("cut", 4),
        ("partition", 3),
        ("slow_line", 3),
        ("clock", 2),
        ("ledger_disk", 2),
        ("ledger_crash", 3),
        ("witness_disk", 1),
    ),
)


def witnessed_network() -> NetworkFile:
    """The test network, with witnesses."""
    witnesses = tuple(Witness(name, key_of(name).public) for name in WITNESSES)
    return paper_network(witnesses=witnesses, witness_quorum=1)


class LedgerSide:
    """The ledger and its witnesses, with their faults and checks; shared by scenarios."""

    def __init__(self, engine: Engine, wires: Wires, network: NetworkFile) -> None:
        self._engine, self._wires = engine, wires
        self.watch = LogWatch(network)
        self.witnesses = [WitnessHost(engine, name, key_of(name), network) for name in WITNESSES]
        keys = (key_of("authority ledger"), key_of("authority log"))
        self.ledger = LedgerHost(
            engine,
            wires,
            network,
            keys,
            self.witnesses,
            self.watch.on_acknowledged,
            lambda note: self.watch.on_checkpoint(self.ledger.disk, note),
        )
        for host in (self.ledger, *self.witnesses):
            wires.add(host)

    def start(self) -> None:
        """Start all of it."""
        for host in (self.ledger, *self.witnesses):
            host.start()

    def faults(self) -> dict[str, Callable[[], Undo | None]]:
        """Kinds of faults that only this side has."""
        return {
            "ledger_disk": self._disk_fault,
            "ledger_crash": self._crash,
            "witness_disk": self._witness_disk,
        }

    def _disk_fault(self) -> Undo | None:
        """The next commit fails; only a restart helps."""
        if not self.ledger.up or self.ledger.disk.fault:
            return None
        chance = self._engine.random
        self.ledger.disk.fault = chance.choice(["I/O error", "no space left"])
        self.ledger.disk.torn = chance.random() < 0.5
        self._engine.note(f"FAULT the ledger's disk: {self.ledger.disk.fault}")

        def restart() -> None:
            self._engine.note("FAULT the ledger is started again")
            self._wires.crash(LEDGER)
            self.ledger.disk.reopen()
            self.ledger.start()

        return restart

    def _crash(self) -> Undo | None:
        if not self.ledger.up or self.ledger.disk.fault:
            return None
        self._engine.note("FAULT the ledger crashes")
        self._wires.crash(LEDGER)

        def restart() -> None:
            self._engine.note("FAULT the ledger starts again")
            self.ledger.start()

        return restart

    def _witness_disk(self) -> Undo:
        shelf = self._engine.random.choice(self.witnesses).shelf
        shelf.failing = True

        def mend() -> None:
            shelf.failing = False

        return mend

    def check(self) -> None:
        """What must hold at every moment."""
        if self.ledger.up:
            self.watch.check_books(self.ledger.disk, self.ledger.recorder.books)


class ControlWorld:
    """One run of the scenario."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        network = witnessed_network()
        self.wires = Wires(engine, delay_us=10 * MS, jitter_us=5 * MS)
        self.side = LedgerSide(engine, self.wires, network)
        addresses = {peer_of(name): name for name in NODES}
        self.nodes = [
            PayeeHost(engine, self.wires, name, network, NODES[:index], addresses)
            for index, name in enumerate(NODES)
        ]
        self.payers = [
            PayerHost(engine, self.wires, name, list(NODES), deals_wanted=6) for name in PAYERS
        ]
        hosts: list[Host] = [*self.nodes, *self.payers]
        for host in hosts:
            self.wires.add(host)
        self.faults = Faults(engine, self.wires, [h.name for h in hosts], self.side.faults())

    def run(self) -> None:
        """Faults for a while, then peace, then every check; raises ``Violation``."""
        self.side.start()
        for host in (*self.nodes, *self.payers):
            host.start()
        self.faults.schedule(WEATHER, 1 * S, FAULTS_UNTIL_US)
        while self.engine.now_us < FAULTS_UNTIL_US:
            self.engine.run(self.engine.now_us + 1 * S)
            self.side.check()
        self.faults.end_all()
        self.engine.run(FAULTS_UNTIL_US + REST_US)
        self.side.check()
        self._check_money()
        self._check_views()

    def _check_money(self) -> None:
        """Everybody was paid what was promised, and nothing is held any more."""
        books = self.side.ledger.recorder.books
        for payer in self.payers:
            if not payer.finished:
                raise Violation("liveness", f"{payer.name} has not finished")
            for deal in payer.disk.deals:
                for payee, promised in deal.promised.items():
                    paid = books.paid(SessionId(deal.session_id), AccountId(payee))
                    if paid != promised:
                        raise Violation("money", f"{payee} was paid {paid} of {promised}")
                if not books.settled(SessionId(deal.session_id)):
                    raise Violation("money", f"session {deal.session_id.hex()} is still held")
        held = [name for name in books.balances.all() if name.startswith(HOLD)]
        if held:
            raise Violation("money", f"{len(held)} holds are left")
        refused = [pair for node in self.nodes for pair in node.refused]
        if refused:
            raise Violation("money", f"a settlement was refused: {refused[0]}")

    def _check_views(self) -> None:
        """At rest everybody sees everybody."""
        for node in self.nodes:
            seen = len(node.gossip.view().offers)
            if seen != len(self.nodes):
                raise Violation("gossip", f"{node.name} sees {seen} of {len(self.nodes)} nodes")
