"""One stage's admission and one client's restraint under an open loop, in virtual time.

The stage serves all its sessions step by step; a step costs more the more there are. What counts
is an answer within five times what it takes alone, as in ``benchmarks/overload.py``.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random
from statistics import mean

import pytest

from plait.client.demand import Demand
from plait.node.overload import CostLine, Limits, Load, too_much
from plait.types import PeerId, Qos

STAGE = PeerId("stage")
LASTS_MS, WARM_UP_MS = 60_000.0, 5_000.0
STEP_MS, MORE_MS = 22.0, 8.0
"""A step costs so much, and so much more for each session."""
STEPS = 21
"""Of an answer: a prompt worth five, and sixteen tokens."""
OPEN_MS, CONFIRM_MS, REST_MS = 30.0, 120.0, 100.0
SLO_MS = 5 * (OPEN_MS + CONFIRM_MS + STEPS * (STEP_MS + MORE_MS))
ROOM = 10**6


@dataclass(slots=True)
class Session:
    """What is left of an answer, and whose request it is."""

    began_ms: float
    again: Callable[[], None]
    client: int
    steps_left: int = STEPS


@dataclass
class World:
    """A stage, its clients, and what came of their requests."""

    seed: int
    qos: Qos
    good: Counter[int] = field(default_factory=Counter)
    """By client."""
    answered: int = 0
    refused: int = 0
    now_ms: float = 0.0
    demands: dict[int, Demand] = field(default_factory=lambda: defaultdict(Demand))
    line: CostLine = field(default_factory=lambda: CostLine.guess((STEP_MS + MORE_MS) * 1000))
    held: Counter[int] = field(default_factory=Counter)
    live: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = Random(self.seed)
        self._numbers, self._heap = count(), list[tuple[float, int, Callable[[], None]]]()

    def after(self, delay_ms: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now_ms + delay_ms, next(self._numbers), act))

    def run(self) -> float:
        """Goodput, answers per second."""
        self.step()
        while self.now_ms < LASTS_MS:
            self.now_ms, _, act = heapq.heappop(self._heap)
            act()
        return self.good.total() / (LASTS_MS - WARM_UP_MS) * 1000

    def open_loop(self, *rates: float) -> float:
        """Arrivals that wait for nothing, at a rate for each client."""

        def arrive(client: int) -> None:
            self.after(self.chance.expovariate(rates[client]) * 1000, lambda: arrive(client))
            self.ask(lambda: None, client)

        for client in range(len(rates)):
            arrive(client)
        return self.run()

    def closed_loop(self, workers: int) -> float:
        """Workers who ask again once they are answered."""

        def work() -> None:
            self.ask(lambda: self.after(REST_MS, work))

        for number in range(workers):
            self.after(number * REST_MS, work)
        return self.run()

    def ask(self, again: Callable[[], None], client: int = 0) -> None:
        now_ms, demand = int(self.now_ms), self.demands[client]
        demand.request(now_ms)
        if demand.busy(self.qos, now_ms):
            self.refused += 1
            again()
            return
        demand.asking([STAGE], self.qos, now_ms)
        session = Session(self.now_ms, again, client)
        self.after(OPEN_MS, lambda: self.open(session))

    def open(self, session: Session) -> None:
        demand = self.demands[session.client]
        of_clients = self.held + Counter(one.client for one in self.live)
        sessions = of_clients.total()
        token_us = self.line.cost_us(sessions + 1)
        soonest = min((one.steps_left for one in self.live), default=0)
        load = Load(
            kv_tokens_total=ROOM,
            kv_tokens_free=ROOM,
            wait_ms=0,
            sessions=sessions,
            sessions_of_client=of_clients[session.client],
            clients=len(of_clients | Counter([session.client])),
            soonest_free_ms=round(soonest * token_us) // 1000,
            token_us=token_us,
            token_alone_us=self.line.one_us,
        )
        refusal = too_much(load, Limits(), self.qos, STEPS)
        if refusal is None:
            self.held[session.client] += 1
            demand.taken([STAGE], self.qos)
            self.after(CONFIRM_MS, lambda: self.begin(session))
            return
        self.refused += 1
        demand.refused(STAGE, self.qos, refusal.retry_after_ms, int(self.now_ms))
        demand.let_go([STAGE], self.qos)
        session.again()

    def begin(self, session: Session) -> None:
        self.held[session.client] -= 1
        self.live.append(session)

    def step(self) -> None:
        """One token for everybody; sometimes it takes far longer."""
        if not self.live:
            self.after(5.0, self.step)
            return
        slow = 1 + 2 * self.chance.random() ** 4
        took_ms = (STEP_MS + MORE_MS * len(self.live)) * slow
        served = self.held.total() + len(self.live)
        for session in tuple(self.live):
            self.line.note(served, took_ms * 1000)
            session.steps_left -= 1
            if not session.steps_left:
                self.live.remove(session)
                self.after(took_ms, lambda session=session: self.end(session))  # type: ignore[misc]
        self.after(took_ms, self.step)

    def end(self, session: Session) -> None:
        self.demands[session.client].ended([STAGE], self.qos)
        if self.now_ms >= WARM_UP_MS:
            self.answered += 1
            self.good[session.client] += self.now_ms - session.began_ms <= SLO_MS
        session.again()


def peak(seed: int) -> float:
    """What the stage can do at best for who does not overload it."""
    return max(World(seed, "interactive").closed_loop(workers) for workers in (4, 8, 12, 16))


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "share"), [(2, 0.95), (4, 0.9), (8, 0.9)])
def test_an_overloaded_stage_keeps_its_goodput(factor: int, share: float) -> None:
    shares = []
    for seed in range(8):
        world, best = World(seed, "interactive"), peak(seed)
        shares.append(world.open_loop(factor * best) / best)
        assert world.refused > world.answered * (factor - 1.5)
    assert mean(shares) >= share


@pytest.mark.slow
def test_a_stage_that_takes_everybody_keeps_nothing() -> None:
    """The class that does not mind slow tokens is no measure of quick ones: the bar can fail."""
    best = peak(0)
    assert World(0, "batch").open_loop(4 * best) < 0.3 * best


@pytest.mark.slow
@pytest.mark.parametrize("often", [2, 6])
def test_who_asks_more_often_shuts_nobody_out(often: int) -> None:
    """Two clients who each want more than half: answers come to equal parts, and no fewer."""
    shares, parts = [], []
    for seed in range(8):
        world, best = World(seed, "interactive"), peak(seed)
        shares.append(world.open_loop(often * best, 0.8 * best) / best)
        parts.append(world.good[1] / world.good.total())
    assert mean(shares) >= 0.9
    assert 0.37 <= mean(parts) <= 0.55
