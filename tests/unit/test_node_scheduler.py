"""The scheduler: batches, order within a session, bounds."""

from hypothesis import given
from hypothesis import strategies as st

from plait.node.scheduler import Scheduler

Item = tuple[int, int, int]
"""Session, place in its order, rows."""


def scheduler(rows_max: int = 8) -> Scheduler[Item]:
    return Scheduler(
        key=lambda item: item[0],
        rows=lambda item: item[2],
        rows_max=rows_max,
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
