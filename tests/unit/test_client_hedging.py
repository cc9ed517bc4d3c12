"""Hedged prompts: the budget, the race, and the two generations behind one answer."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.client.answer import Answer, RouteStep
from plait.client.driver import Deliver
from plait.client.hedged import Emit, HedgedGeneration
from plait.client.hedging import WINDOW_MS, HedgeBudget, Race, Side, late_after_s
from plait.errors import CapacityError, PlaitError
from plait.router.cost import Prediction
from plait.task_scope import TaskScope
from plait.types import PeerId

SIDES: list[Side] = ["first", "second"]


@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 500), st.booleans()), max_size=60),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_hedges_never_cost_more_than_their_share(
    requests: list[tuple[int, int, bool]], share: float
) -> None:
    budget, now_ms = HedgeBudget(), 0
    asked, again = list[tuple[int, int]](), list[tuple[int, int]]()
    for pause_ms, tokens, late in requests:
        now_ms += pause_ms
        budget.prompted(tokens, now_ms)
        asked.append((now_ms, tokens))
        if late and budget.take(tokens, share, now_ms):
            again.append((now_ms, tokens))
        spent, all_of_them = (
            sum(tokens for at_ms, tokens in notes if at_ms > now_ms - WINDOW_MS)
            for notes in (again, asked)
        )
        if late and again and again[-1][0] == now_ms:
            assert spent <= share * all_of_them


def test_a_first_token_is_late_after_twice_the_prediction() -> None:
    assert late_after_s(0.4) == 0.8
    assert late_after_s(0.0) > 0


Step = tuple[str, Side, bool]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["late", "came", "ended"]), st.sampled_from(SIDES), st.booleans()
        ),
        max_size=12,
    )
)
def test_one_side_answers_whatever_happens(steps: list[Step]) -> None:
    race, running = Race(), {"first"}
    delivered = set[Side]()
    outcomes = list[Side]()
    hedges = 0
    for kind, side, flag in steps:
        dropped: Side | None = None
        if kind == "late":
            if race.late(allowed=flag):
                running.add("second")
                hedges += 1
        elif side in running and kind == "came":
            dropped = race.came(side)
            if race.winner == side:
                delivered.add(side)
        elif side in running:
            running.discard(side)
            decides, dropped = race.ended(side, failed=flag)
            if decides:
                outcomes.append(side)
            else:
                assert flag
                assert running
        if dropped is not None:
            assert dropped in running
            running.discard(dropped)
    assert len(delivered) <= 1
    assert hedges <= 1
    assert len(outcomes) <= 1
    assert delivered <= {race.winner}
    assert running or outcomes


@pytest.mark.parametrize("failed", [True, False])
@pytest.mark.parametrize("winner", SIDES)
def test_a_cancelled_side_that_ends_leaves_the_other_alone(winner: Side, failed: bool) -> None:
    race = Race()
    assert race.late(allowed=True)
    loser = race.came(winner)
    assert loser == next(side for side in SIDES if side != winner)
    assert race.ended(loser, failed=failed) == (False, None)
    assert race.ended(winner, failed=False) == (True, None)


# The shell


def _made() -> Answer:
    """Only its identity counts."""
    return Answer.__new__(Answer)


class Scripted:
    """A generation that does what the test says, and remembers what became of it."""

    embedding: tuple[float, ...] = ()
    cost_microcredits = 0
    route: tuple[RouteStep, ...] = ()
    predicted: Prediction | None = None

    def __init__(self, avoid: frozenset[PeerId], emit: Emit) -> None:
        self.avoid, self._emit = avoid, emit
        self.peers = {PeerId("b")} if avoid else {PeerId("a")}
        self.started, self.go_on = asyncio.Event(), asyncio.Event()
        self.tokens: Sequence[int] = ()
        self.error: PlaitError | None = None
        self.answer = _made()
        self.cancelled = self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    def deliver(self, token: int) -> None:
        """A token, before the test lets the answer go on."""
        self._emit(Deliver(token, 0.0))

    async def run(self, decode: Callable[[Sequence[int]], str]) -> Answer:
        self.started.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            self.cost_microcredits += 20  # the cut
            raise
        for token in self.tokens:
            self.deliver(token)
        if self.error is not None:
            raise self.error
        return self.answer


async def outcome_of(subject: HedgedGeneration) -> Answer | PlaitError:
    try:
        return await subject.run(lambda ids: "")
    except PlaitError as error:
        return error


class Bench:
    """A hedged generation over two scripted ones."""

    def __init__(self, tasks: TaskScope, *, allowed: bool = True, late_s: float = 0.0) -> None:
        self.made: list[Scripted] = []
        self.second_made, self.came = asyncio.Event(), asyncio.Event()
        self.got: list[int] = []

        def make(avoid: frozenset[PeerId], emit: Emit) -> Scripted:
            self.made.append(Scripted(avoid, emit))
            if avoid:
                self.second_made.set()
            return self.made[-1]

        def take(token: Deliver) -> None:
            self.got.append(token.token_id)
            self.came.set()

        self.subject = HedgedGeneration(
            make,
            take,
            tasks.create_task,
            late_s=late_s,
            allowed=lambda peers: allowed,
        )
        self.work = tasks.create_task(outcome_of(self.subject))

    async def both(self) -> tuple[Scripted, Scripted]:
        await self.second_made.wait()
        first, second = self.made
        await second.started.wait()
        return first, second


@pytest.mark.parametrize("winner", [0, 1])
async def test_the_first_token_decides_and_the_other_is_cancelled(winner: int) -> None:
    async with TaskScope() as tasks:
        bench = Bench(tasks)
        pair = await bench.both()
        assert pair[1].avoid == {PeerId("a")}
        pair[winner].tokens = (7, 8)
        pair[winner].go_on.set()
        assert await bench.work is pair[winner].answer
        assert bench.got == [7, 8]
        assert pair[1 - winner].cancelled


async def test_a_side_that_fails_leaves_the_answer_to_the_other() -> None:
    async with TaskScope() as tasks:
        bench = Bench(tasks)
        first, second = await bench.both()
        first.error = CapacityError("full")
        first.go_on.set()
        second.tokens = (3,)
        second.go_on.set()
        assert await bench.work is second.answer
        assert bench.got == [3]


async def test_a_loser_that_fails_as_the_token_comes_does_not_end_the_winner() -> None:
    async with TaskScope() as tasks:
        bench = Bench(tasks)
        first, second = await bench.both()
        second.error = CapacityError("full")
        second.go_on.set()
        asyncio.get_running_loop().call_soon(first.deliver, 5)
        await bench.came.wait()
        first.go_on.set()
        assert await bench.work is first.answer
        assert bench.got == [5]
        assert not first.cancelled


async def test_without_leave_there_is_no_second() -> None:
    async with TaskScope() as tasks:
        bench = Bench(tasks, allowed=False)
        await bench.made[0].started.wait()
        bench.made[0].tokens = (1,)
        bench.made[0].go_on.set()
        assert await bench.work is bench.made[0].answer
        assert len(bench.made) == 1


async def test_cancelling_ends_both() -> None:
    async with TaskScope() as tasks:
        bench = Bench(tasks)
        first, second = await bench.both()
        first.cost_microcredits = 1
        bench.work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bench.work
        assert first.cancelled
        assert second.cancelled
        assert bench.subject.cost_microcredits == 41


async def test_one_that_is_not_late_is_not_hedged() -> None:
    async with TaskScope() as tasks:
        bench = Bench(tasks, late_s=3_600.0)
        await bench.made[0].started.wait()
        bench.made[0].error = CapacityError("full")
        bench.made[0].go_on.set()
        assert await bench.work is bench.made[0].error
        assert len(bench.made) == 1
