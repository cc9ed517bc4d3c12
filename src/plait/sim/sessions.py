"""The whole network: clients, two hosts for every span, gossip, a ledger, and what goes wrong.

One seed in ten is calm; four see a single fault of a stage, mostly of one that serves, and
must all end with an answer; three see a second one soon after; the rest are storms of
everything at once.
"""

from functools import partial
from random import Random
from typing import Literal

from plait.client.driver import Accounting
from plait.client.epoch import Order
from plait.client.prefix import Reuse
from plait.router.request import RouteRequest
from plait.sim.client import ClientHost
from plait.sim.control import LedgerSide, witnessed_network
from plait.sim.engine import MS, Engine, S, Violation
from plait.sim.faults import Faults, Undo, Weather
from plait.sim.host import Host
from plait.sim.keys import peer_of
from plait.sim.model import MANIFEST, SHAPE, SPANS, Question
from plait.sim.network import Wires
from plait.sim.request import Request
from plait.sim.session_checks import check_answers, check_bundles, check_money, check_work
from plait.sim.stage import StageHost
from plait.testing.compute import VOCABULARY_SIZE
from plait.types import Sampling

REPLICAS = 2
BEGIN_US = 1_500 * MS
FAULTS_UNTIL_US = 8 * S
REST_US_MAX = 150 * S
"""Longer than any session, hold or idle time."""
SETTLED_AFTER_US = 2 * S

EVENTS_TO_OPEN = 12
"""About so many events come before the first token."""
EVENTS_BETWEEN_FAULTS_MAX = 14
HEDGED = 1 / 3
"""The share of requests that may be asked of a second pipeline."""
FAULT_DELAY_US_MAX = 60 * MS
LASTS_US = (200 * MS, 12 * S)

Mood = Literal["calm", "single", "double", "storm"]

STAGE_FAULTS = (
    ("crash", 8),
    ("hang", 4),
    ("partition", 5),
    ("drain", 3),
    ("slow", 2),
    ("spill", 1),
)
STORM = Weather(
    between_us=500 * MS,
    lasts_us=(100 * MS, 5 * S),
    kinds=(
        *STAGE_FAULTS,
        ("cut", 4),
        ("slow_line", 3),
        ("clock", 1),
        ("ledger_disk", 1),
        ("ledger_crash", 2),
        ("spool", 1),
        ("vanish", 1),
    ),
)


class NetworkWorld:
    """One run."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        chance = engine.random
        self.mood: Mood = chance.choices(("calm", "single", "double", "storm"), (1, 4, 3, 2))[0]
        self.network = witnessed_network()
        delay_us = chance.choice([500, 5 * MS, 20 * MS])
        self.wires = Wires(engine, delay_us=delay_us, jitter_us=delay_us // 4)
        self.side = LedgerSide(engine, self.wires, self.network)
        # Chance of its own, so that a seed without hedges is the run that it always was.
        self._hedging = Random(f"hedges of {engine.seed}")
        self.stages: list[StageHost] = []
        self.clients: list[ClientHost] = []
        self._add_hosts()
        self._followed = chance.choice(self.clients[0].requests)
        """The request that faults are aimed at."""
        stages = [host.name for host in self.stages]
        special = {
            **self.side.faults(),
            "drain": self._drain,
            "slow": self._slow,
            "spill": self._spill,
            "spool": self._spool,
            "vanish": self._vanish,
        }
        self.faults = Faults(engine, self.wires, stages, special)
        self.faults.preferred = self._serving
        self._due: list[int] = []

    def _add_hosts(self) -> None:
        names = [f"stage {span}/{copy}" for span in SPANS for copy in range(REPLICAS)]
        clients = [f"client {number}" for number in range(self.engine.random.choice([1, 1, 2]))]
        addresses = {peer_of(name): name for name in (*names, *clients)}
        for index, name in enumerate(names):
            self.stages.append(
                StageHost(
                    self.engine,
                    self.wires,
                    name,
                    self.network,
                    SPANS[index // REPLICAS],
                    neighbours=[names[at] for at in {index - 1, index - 3} if at >= 0],
                    addresses=addresses,
                )
            )
        for name in clients:
            client = ClientHost(
                self.engine,
                self.wires,
                name,
                self.network,
                watches=self.engine.random.sample(names, k=3),
                addresses=addresses,
            )
            client.requests = [self._request()]
            if self.engine.random.random() < 0.6:
                client.requests.append(self._request(client.requests[0]))
            self.clients.append(client)
        for host in self._hosts:
            self.wires.add(host)

    @property
    def _hosts(self) -> list[Host]:
        return [*self.stages, *self.clients]

    def _request(self, earlier: Request | None = None) -> Request:
        """A question; after an earlier one, mostly the next turn of the same conversation."""
        chance = self.engine.random
        temperature = chance.choice([0, 0, 700_000])
        known: tuple[int, ...] = ()
        if earlier is not None and chance.random() < 0.8:
            known = (*earlier.question.prompt_ids, *earlier.reference)
        length = chance.randrange(1, 24 if earlier is None else 60)
        new_ids = chance.choices(range(VOCABULARY_SIZE), k=length)
        question = Question(
            prompt_ids=(*known[: chance.randrange(len(known) + 1)], *new_ids)
            if chance.random() < 0.3
            else (*known, *new_ids),
            max_tokens=chance.choice([1, 4, 9, 13, 16, 20]),
            sampling=Sampling(
                temperature_micros=temperature,
                seed=chance.randrange(2**32) if temperature else 0,
                end_ids=tuple(chance.sample(range(VOCABULARY_SIZE), k=4)),
            ),
        )
        order = Order(
            model=SHAPE,
            prompt_ids=question.prompt_ids,
            sampling=question.sampling,
            route=RouteRequest(
                prompt_tokens=len(question.prompt_ids), max_tokens=question.max_tokens
            ),
            vocabulary_size=VOCABULARY_SIZE,
            manifest=MANIFEST,
            want_bundle=True,
            reuse=Reuse() if chance.random() < 0.9 else None,
            accounting=Accounting(
                chunk_tokens=chance.choice([1, 3, 4, 32]),
                prefill_chunk_tokens=chance.choice([4, 9, 256]),
            ),
        )
        share = 1.0 if self._hedging.random() < HEDGED else 0.0
        return Request(question, order, question.reference(), hedge_share=share)

    # The course of a run ----------------------------------------------------------------

    def run(self) -> None:
        """Start, let it storm, wait for peace, check; raises ``Violation``."""
        self.engine.note(f"the network is {self.mood}")
        self.side.start()
        for host in self.stages:
            host.start()
        for client in self.clients:
            self.engine.at(BEGIN_US, "", client.start)
        self._schedule_faults()
        while self.engine.now_us < FAULTS_UNTIL_US and not self._at_peace():
            self.engine.run(self.engine.now_us + S)
            self.side.check()
        self.faults.end_all()
        self._wait_for_peace()
        self.side.check()
        requests = [request for client in self.clients for request in client.requests]
        check_answers(self, requests)
        check_money(requests, self.stages, self.side.ledger)
        check_work(self.stages)
        check_bundles(self, requests)

    def _schedule_faults(self) -> None:
        """At times in a storm; otherwise where a session has come to a certain event."""
        chance = self.engine.random
        if self.mood == "storm":
            self.faults.schedule(STORM, BEGIN_US + S, FAULTS_UNTIL_US)
        elif self.mood != "calm":
            first = chance.randrange(EVENTS_TO_OPEN + len(self._followed.reference))
            self._due = [first]
            if self.mood == "double":
                self._due.append(first + chance.randrange(EVENTS_BETWEEN_FAULTS_MAX))
        for client in self.clients:
            client.on_event = self._on_event

    def _on_event(self, request: Request) -> None:
        if self._due and request is self._followed and request.events >= self._due[0]:
            del self._due[0]
            chance = self.engine.random
            kinds, weights = zip(*STAGE_FAULTS, strict=True)
            kind = chance.choices(kinds, weights)[0]
            lasts_us = chance.randrange(*LASTS_US)
            begin = partial(self.faults.begin, kind, lasts_us)
            self.engine.after(chance.randrange(FAULT_DELAY_US_MAX), "", begin)

    def _serving(self) -> list[str]:
        """The stages of the sessions under way."""
        names = []
        for client in self.clients:
            for core in client.asking.cores if client.asking is not None else ():
                if core.epochs:
                    peers = [stage.peer for stage in core.epochs[-1].terms.stages]
                    names += [client.name_of(peer) for peer in peers]
        return names

    def _at_peace(self) -> bool:
        return (
            all(client.up and client.done for client in self.clients)
            and not self.faults.pending
            and all(stage.up and stage.idle for stage in self.stages)
        )

    def _wait_for_peace(self) -> None:
        until_us = self.engine.now_us + REST_US_MAX
        while not self._at_peace() and self.engine.now_us < until_us:
            self.engine.run(self.engine.now_us + S)
        for client in self.clients:
            for number, request in enumerate(client.requests):
                if not request.over:
                    raise Violation("liveness", f"{client.name}: request {number} never ended")
        for stage in self.stages:
            if leaks := stage.leaks():
                raise Violation("leak", f"{stage.name} still holds {', '.join(leaks)}")
        self.engine.run(self.engine.now_us + SETTLED_AFTER_US)

    # Faults of stages and clients -----------------------------------------------------------

    def _victim(self) -> StageHost | None:
        name = self.faults.victim()
        return next((stage for stage in self.stages if stage.name == name), None)

    def _drain(self) -> Undo | None:
        stage = self._victim()
        if stage is None:
            return None
        self.engine.note(f"FAULT {stage.name} drains")
        stage.drain()

        def restart() -> None:
            self.engine.note(f"FAULT {stage.name} ends after draining, and starts again")
            self.faults.recovered(stage.name)
            stage.core.end_all("the node is stopping")
            stage.gossip.withdraw()
            self.wires.crash(stage.name)
            stage.start()

        return restart

    def _slow(self) -> Undo | None:
        stage = self._victim()
        if stage is None:
            return None
        stage.slow = self.engine.random.choice([5, 40, 400])
        self.engine.note(f"FAULT {stage.name} is {stage.slow} times slower")

        def mend() -> None:
            self.faults.recovered(stage.name)
            stage.slow = 1

        return mend

    def _spill(self) -> Undo | None:
        stage = self._victim()
        if stage is None:
            return None
        stage.spill.broken = True
        self.engine.note(f"FAULT {stage.name}: its spill disk is full")

        def mend() -> None:
            self.faults.recovered(stage.name)
            stage.spill.broken = False

        return mend

    def _spool(self) -> Undo | None:
        stage = self._victim()
        if stage is None:
            return None
        stage.spool.failing = True
        self.engine.note(f"FAULT {stage.name}: its spool disk is full")

        def mend() -> None:
            self.faults.recovered(stage.name)
            stage.spool.failing = False

        return mend

    def _vanish(self) -> Undo | None:
        client = self.engine.random.choice(self.clients)
        if not client.up:
            return None
        self.engine.note(f"FAULT {client.name} vanishes")
        self.wires.crash(client.name)
        return client.start
