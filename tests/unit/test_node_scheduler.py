"""The scheduler: batches, order within a session, pieces, bounds, and who comes first."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.node.scheduler import NARROW_ROWS_MAX, Part, Scheduler

Item = tuple[int, int, int]
"""Session, place in its order, rows."""

PIECE = 40


def scheduler(rows_max: int = 8, piece_rows: int | None = None) -> Scheduler[Item]:
    return Scheduler(
        key=lambda item: item[0],
        rows=lambda item: item[2],
        rows_max=rows_max,
        piece_rows=piece_rows,
    )


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), max_size=40))
def test_batches_keep_each_sessions_order_and_lose_nothing(queued: list[tuple[int, int]]) -> None:
    subject = scheduler()
    items = [(session, place, rows) for place, (session, rows) in enumerate(queued)]
    for item in items:
        subject.add(item)
    taken: list[Item] = []
    while batch := subject.take():
        sessions = [session for session, _, _ in batch]
        assert len(set(sessions)) == len(sessions)
        assert len(batch) == 1 or sum(rows for _, _, rows in batch) <= 8
        taken += batch
    assert sorted(taken) == sorted(items)
    for session in range(5):
        assert [place for s, place, _ in taken if s == session] == sorted(
            place for s, place, _ in items if s == session
        )


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 200)), max_size=30))
def test_long_frames_come_in_pieces_one_of_them_a_step(queued: list[tuple[int, int]]) -> None:
    subject = scheduler(rows_max=64, piece_rows=PIECE)
    items = [(session, place, rows) for place, (session, rows) in enumerate(queued)]
    for item in items:
        subject.add(item)
    pieces: dict[Item, list[Part[Item]]] = {item: [] for item in items}
    while parts := subject.take_parts():
        wide = [part for part in parts if part.item[2] > NARROW_ROWS_MAX]
        assert len(wide) <= 1
        assert len({part.item[0] for part in parts}) == len(parts)
        assert sum(part.rows for part in parts) - sum(part.rows for part in wide) <= 64
        for part in parts:
            pieces[part.item].append(part)
    assert len(subject) == 0
    for (_, _, rows), found in pieces.items():
        # Cut at the same places whatever else was queued.
        size = PIECE if rows > NARROW_ROWS_MAX else rows
        assert [part.start for part in found] == list(range(0, rows, size))
        assert all(one.start + one.rows == next_.start for one, next_ in pairwise(found))
        assert [part.last for part in found] == [False] * (len(found) - 1) + [True]
        assert found[-1].start + found[-1].rows == rows


def test_decoding_never_waits_for_more_than_a_piece() -> None:
    subject = scheduler(rows_max=64, piece_rows=PIECE)
    for session in range(3):
        subject.add((session, 0, 200))
    for turn in range(12):
        subject.add((9, turn, 1))
        parts = subject.take_parts()
        assert parts[0].item == (9, turn, 1)
        assert sum(part.rows for part in parts) <= 1 + PIECE


def test_the_rest_of_a_frame_that_failed_is_dropped() -> None:
    subject = scheduler(piece_rows=PIECE)
    subject.add((1, 0, 100))
    subject.add((1, 1, 1))
    (part,) = subject.take_parts()
    subject.abandon(part)
    assert [part.item for part in subject.take_parts()] == [(1, 1, 1)]
    subject.abandon(part)  # a second time changes nothing
    assert len(subject) == 0


Asked = tuple[str, int, int, int]
"""Client, priority, session, rows."""


def shared(rows_max: int = 1) -> Scheduler[Asked]:
    return Scheduler(
        key=lambda item: item[2],
        rows=lambda item: item[3],
        client=lambda item: item[0],
        priority=lambda item: item[1],
        rows_max=rows_max,
        piece_rows=PIECE,
    )


def served(subject: Scheduler[Asked], asked: list[Asked], steps: int) -> Counter[str]:
    """Rows computed of each client while all of them always have a frame queued."""
    rows: Counter[str] = Counter()
    for item in asked:
        subject.add(item)
    for _ in range(steps):
        for part in subject.take_parts():
            rows[part.item[0]] += part.rows
            if part.last:
                subject.add(part.item)
    return rows


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 5, 90, 256]))
def test_clients_get_the_same_however_many_sessions_they_have(
    of_one: int, of_other: int, rows: int
) -> None:
    asked = [("one", 0, session, rows) for session in range(of_one)]
    asked += [("other", 0, 100 + session, rows) for session in range(of_other)]
    got = served(shared(), asked, 400)
    assert abs(got["one"] - got["other"]) <= 2 * max(rows, PIECE)


def jain_index(shares: list[int]) -> float:
    """1 if all are equal, 1/n if one has everything (Jain, Chiu and Hawe, 1984)."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


@pytest.mark.parametrize("rows_max", [1, 4, 8])
def test_a_greedy_client_does_not_starve_a_modest_one(rows_max: int) -> None:
    """Eight streams beside one: what the modest one can use of its half, it gets."""
    greedy = [("greedy", 0, session, 1) for session in range(8)]
    got = served(shared(rows_max), [*greedy, ("modest", 0, 100, 1)], 1_000)
    # One stream is one row a step: with more rows in a step the others are the greedy one's.
    assert got["modest"] >= 1_000 / (2 if rows_max == 1 else 1) - 1
    if rows_max == 1:
        assert jain_index([got["greedy"], got["modest"]]) > 0.999


def test_a_more_urgent_class_gets_four_times_as_much_and_nobody_nothing() -> None:
    asked = [(name, priority, priority, 1) for priority, name in enumerate("abc")]
    got = served(shared(), asked, 2100)
    assert 3.8 < got["a"] / got["b"] < 4.2
    assert 3.8 < got["b"] / got["c"] < 4.2


def test_who_was_away_has_saved_up_nothing() -> None:
    subject = shared()
    served(subject, [("busy", 0, 1, 1), ("other", 0, 2, 1)], 500)
    order = []
    subject.add(("back", 0, 3, 1))
    for _ in range(9):
        (part,) = subject.take_parts()
        order.append(part.item[0])
        subject.add(part.item)
    assert Counter(order) == {"busy": 3, "other": 3, "back": 3}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 99)), max_size=40))
def test_everything_queued_is_computed(queued: list[tuple[int, int, int]]) -> None:
    subject = shared()
    total = 0
    for session, (client, priority, rows) in enumerate(queued):
        subject.add((str(client), priority, session, rows))
        total += rows
    taken = 0
    while parts := subject.take_parts():
        taken += sum(part.rows for part in parts)
    assert (taken, len(subject)) == (total, 0)


class _Unhurried(Scheduler[tuple[int, int, int]]):
    """Does all the sums also for a frame that is alone."""

    def _taken_alone(self) -> None:
        return None


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 60)), max_size=3),
        max_size=30,
    )
)
def test_a_frame_that_is_alone_is_taken_as_all_the_sums_would_have_it(
    arrivals: list[list[tuple[int, int, int]]],
) -> None:
    def made(kind: type[Scheduler[tuple[int, int, int]]]) -> Scheduler[tuple[int, int, int]]:
        return kind(
            key=lambda item: item[:2],
            rows=lambda item: item[2],
            client=lambda item: item[0],
            piece_rows=PIECE,
        )

    quick, slow = made(Scheduler), made(_Unhurried)
    for now in arrivals:
        taken = []
        for scheduler in (quick, slow):
            for item in now:
                scheduler.add(item)
            parts = scheduler.take_parts()
            scheduler.stepped(parts, 100.0 + 10 * sum(part.rows for part in parts))
            taken.append([(part.item, part.start, part.rows, part.last) for part in parts])
        assert taken[0] == taken[1]
        assert quick._decoding == slow._decoding
