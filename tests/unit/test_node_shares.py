"""Shares of a step: all for who is alone, what is owed for who competes, little less in all."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.node.scheduler import ABSENT_STEPS, Scheduler
from plait.node.shares import LOSS_MAX, StepLine, level_of, rows_allowed


def line_of(fixed_us: float, row_us: float) -> StepLine:
    """A line that was fitted to what it says."""
    line = StepLine()
    for rows in (1, 9, 2, 8, 5) * 40:
        line.note(rows, fixed_us + row_us * rows)
    return line


def test_the_line_is_what_was_measured_and_forgets_what_was() -> None:
    line = line_of(5_000, 800)
    assert line.fixed_us == pytest.approx(5_000)
    assert line.row_us == pytest.approx(800)
    for rows in (1, 9, 2, 8, 5) * 100:
        line.note(rows, 1_000 + 3_000 * rows)
    assert line.fixed_us == pytest.approx(1_000, rel=0.05)
    assert line.row_us == pytest.approx(3_000, rel=0.01)


def test_steps_of_one_size_say_nothing_about_rows() -> None:
    line = StepLine()
    for _ in range(100):
        line.note(7, 9_000)
    assert line.row_us == 0.0
    assert line.fixed_us == pytest.approx(9_000)


def test_a_step_that_was_stopped_is_not_believed() -> None:
    line = line_of(5_000, 800)
    line.note(1, 5_000_000)
    assert line.cost_us(5) < 1.2 * (5_000 + 5 * 800)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 1e6)), max_size=60))
def test_a_line_never_falls_and_never_begins_below_zero(steps: list[tuple[int, float]]) -> None:
    line = StepLine()
    for rows, took_us in steps:
        line.note(rows, took_us)
        assert line.row_us >= 0.0
        assert line.fixed_us >= -1e-6 * (1 + line.cost_us(1))


WANTED = st.lists(st.integers(1, 48), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.floats(0, 1e5), st.floats(1, 1e4), WANTED)
def test_a_step_is_cut_only_for_somebody_and_never_wasteful(
    fixed_us: float, row_us: float, wanted: list[int]
) -> None:
    line, total = line_of(fixed_us, row_us), sum(wanted)
    rows = rows_allowed(line, wanted)
    assert 1 <= rows <= total
    if len(wanted) == 1:
        assert rows == total
    speed, most = rows / line.cost_us(rows), total / line.cost_us(total)
    assert speed >= (1 - LOSS_MAX) * most * (1 - 1e-6)
    if rows < total:  # one row more would slow somebody below what is owed
        owed_us = line.cost_us(min(wanted)) * len(wanted)
        assert line.cost_us(rows + 1) > owed_us * (1 - 1e-6)


@given(WANTED, st.integers(1, 600))
def test_the_level_spares_who_has_few(wanted: list[int], allowed: int) -> None:
    level = level_of(wanted, allowed)

    def together(each: int) -> int:
        return sum(min(rows, each) for rows in wanted)

    assert 1 <= level <= max(wanted)
    assert together(level) >= min(allowed, sum(wanted))
    assert level == 1 or together(level - 1) < allowed


def test_rows_that_cost_nothing_more_are_all_taken() -> None:
    assert rows_allowed(line_of(10_000, 0), [48, 1]) == 49


def test_where_every_row_costs_the_same_clients_get_the_same() -> None:
    assert rows_allowed(line_of(0, 1_000), [48, 1]) == 2
    assert rows_allowed(line_of(0, 1_000), [48, 3, 6]) == 9


@dataclass
class Stage:
    """A stage in virtual time: streams that send a row again some time after they were served."""

    fixed_us: float
    row_us: float
    away_us: float
    """Between a row's end and the stream's next: the other stages."""
    shares: bool = True
    """Whether steps may be cut."""
    tokens: Counter[str] = field(default_factory=Counter)
    waited_us: float = 0.0

    def run(self, streams: list[str], lasts_us: float, seed: int = 0) -> Counter[str]:
        """Tokens of each client, of streams that are always busy."""
        chance, now_us = random.Random(seed), 0.0
        queue: Scheduler[tuple[str, int]] = Scheduler(
            key=lambda item: item[1], rows=lambda item: 1, client=lambda item: item[0]
        )
        begin_us = lasts_us / 10  # sessions begin one by one: that shows what rows cost
        due = [(chance.uniform(0, begin_us), item) for item in enumerate(streams)]
        since: dict[int, float] = {}
        while now_us < lasts_us:
            for at_us, (number, client) in sorted(due):
                if at_us <= now_us:
                    since[number] = at_us
                    queue.add((client, number))
            due = [entry for entry in due if entry[0] > now_us]
            parts = queue.take_parts()
            if not parts:
                now_us = min(due)[0]
                continue
            took_us = self.fixed_us + self.row_us * len(parts)
            now_us += took_us
            if self.shares:
                queue.stepped(parts, took_us)
            for part in parts:
                client, number = part.item
                self.tokens[client] += 1
                self.waited_us = max(self.waited_us, now_us - since.pop(number))
                due.append((now_us + self.away_us, (number, client)))
        return self.tokens


STEPS = 100


def parts_of_alone(
    stage: Stage, counts: dict[str, int], seed: int = 0
) -> tuple[list[float], float]:
    """What each client gets of what it has alone, and all of them of what uncut steps give."""
    lasts_us = STEPS * (stage.fixed_us + stage.row_us * sum(counts.values()))
    alone = {
        client: replace(stage, tokens=Counter()).run([client] * count, lasts_us, seed)[client]
        for client, count in counts.items()
    }
    streams = [client for client in counts for _ in range(counts[client])]
    got = stage.run(streams, lasts_us, seed)
    uncut = replace(stage, tokens=Counter(), shares=False).run(streams, lasts_us, seed)
    return [got[client] / alone[client] for client in counts], got.total() / uncut.total()


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 16),
    st.integers(1, 6),
    st.floats(0, 10_000),
    st.floats(50, 2_000),
    st.floats(0, 5_000),
    st.integers(0, 99),
)
def test_everybody_gets_what_is_owed_or_all_together_give_up_a_tenth(
    many: int, few: int, fixed_us: float, row_us: float, away_us: float, seed: int
) -> None:
    rows = many + few
    stage = Stage(fixed_us, row_us, away_us)
    parts, total = parts_of_alone(stage, {"many": many, "few": few}, seed)
    full_us = fixed_us + row_us * rows
    # Nobody starves: a row waits for no more steps than there are streams, each of all rows.
    assert stage.waited_us <= (rows + 1) * full_us
    assert total >= (1 - LOSS_MAX) * 0.93
    line, wanted = line_of(fixed_us, row_us), [many, few]
    if rows_allowed(line, wanted) == rows_allowed(line, wanted, loss_max=1.0):
        # Half; but a row may come when a step has just begun, and then waits for that as well.
        assert min(parts) >= 0.24


@pytest.mark.slow
@pytest.mark.parametrize(("fixed_us", "part_min"), [(0, 0.45), (1_000, 0.2), (50_000, 0.45)])
def test_one_stream_beside_forty_eight(fixed_us: float, part_min: float) -> None:
    """Half of what it has alone, or as much as nine tenths of all rows leave it."""
    (_, one), _ = parts_of_alone(Stage(fixed_us, 1_000, 0), {"many": 48, "one": 1})
    assert one >= part_min


Item = tuple[str, int, int]
"""Client, class, session."""


def dear_rows() -> Scheduler[Item]:
    """A queue that has learnt that every row costs the same, which cuts most."""
    queue: Scheduler[Item] = Scheduler(
        key=lambda item: item[2],
        rows=lambda item: 1,
        client=lambda item: item[0],
        priority=lambda item: item[1],
    )
    for rows in (1, 9, 2, 8, 5) * 20:
        for session in range(rows):
            queue.add(("a", 0, session))
        queue.stepped(queue.take_parts(), 1_000.0 * rows)
    for _ in range(ABSENT_STEPS):
        queue.take_parts()
    return queue


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=40))
def test_every_client_is_served_in_every_class_in_every_step(
    queued: list[tuple[str, int]],
) -> None:
    """A replay is never put off for others' tokens, nor a batch: they only get no more."""
    queue = dear_rows()
    for session, (client, priority) in enumerate(queued):
        queue.add((client, priority, session))
    taken = {part.item[:2] for part in queue.take_parts()}
    assert taken == set(queued)


def test_sessions_of_a_client_that_is_cut_take_turns() -> None:
    queue, served = dear_rows(), Counter[int]()
    for session in range(6):
        queue.add(("a", 0, session))
    for _ in range(12):
        queue.add(("b", 0, 100))
        for part in queue.take_parts():
            served[part.item[2]] += 1
            if part.item[0] == "a":
                queue.add(part.item)
    assert served == {100: 12, **dict.fromkeys(range(6), 2)}


def test_who_went_away_is_spared_no_longer() -> None:
    queue = dear_rows()

    def step(clients: str) -> int:
        for number, client in enumerate(clients):
            queue.add((client, 0, number))
        taken = len(queue.take_parts())
        while queue.take_parts():
            pass
        return taken

    assert step("aaaaaab") == 2
    assert step("aaaaaa") < 6
    for _ in range(ABSENT_STEPS):
        step("a")
    assert step("aaaaaa") == 6
