"""What a client may still ask: its retry budget, and stages that said they are full."""

from hypothesis import given, settings
from hypothesis import strategies as st

from plait.client.demand import (
    ASKING_MS,
    BACKOFF_MS_MAX,
    BUSY_MS_MAX,
    BUSY_MS_MIN,
    RETRIES_FREE,
    RETRY_SHARE,
    WINDOW_MS,
    Demand,
)
from plait.types import PeerId, Qos

A, B = PeerId("a"), PeerId("b")
QOS: Qos = "standard"


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 8)), max_size=150))
def test_a_retry_storm_stays_within_the_budget(requests: list[tuple[int, int]]) -> None:
    """Whatever fails, and however often each request would try again."""
    demand, now_ms = Demand(), 0
    begun, retried = list[int](), list[int]()
    for pause_ms, wishes in requests:
        now_ms += pause_ms
        demand.request(now_ms)
        begun.append(now_ms)
        retried += [now_ms for _ in range(wishes) if demand.may_retry(now_ms)]
        in_window = [sum(now_ms - at < WINDOW_MS for at in times) for times in (begun, retried)]
        assert in_window[1] <= RETRIES_FREE + RETRY_SHARE * in_window[0]


def test_many_requests_that_all_fail_cost_a_tenth_more() -> None:
    demand = Demand()
    for number in range(1_000):
        demand.request(number)
    assert sum(demand.may_retry(1_000) for _ in range(5_000)) == RETRIES_FREE + 100


def test_the_budget_comes_back() -> None:
    demand = Demand()
    assert sum(demand.may_retry(0) for _ in range(50)) == RETRIES_FREE
    assert not demand.may_retry(WINDOW_MS - 1)
    assert demand.may_retry(WINDOW_MS)


def test_who_is_full_is_left_alone_until_the_time_it_named() -> None:
    demand = Demand()
    demand.refused(A, QOS, 1_500, 0)
    assert demand.busy(QOS, 0) == {A: 1_500}
    assert demand.busy("interactive", 0) == {}
    assert demand.busy(QOS, 1_499) == {A: 1}
    assert demand.busy(QOS, 1_500) == {}


def test_one_opening_asks_for_all() -> None:
    demand = Demand()
    demand.refused(A, QOS, 500, 0)
    demand.asking([A, B], QOS, 500)
    assert demand.busy(QOS, 500) == {A: ASKING_MS}
    demand.taken([A, B], QOS)
    assert demand.busy(QOS, 501) == {}


def test_an_opening_that_failed_elsewhere_leaves_the_question_open() -> None:
    demand = Demand()
    demand.refused(A, QOS, 500, 0)
    demand.asking([A], QOS, 500)
    demand.let_go([A], QOS)
    assert demand.busy(QOS, 501) == {}


def test_a_session_that_ends_makes_room_for_one() -> None:
    demand = Demand()
    demand.refused(A, QOS, 1_000, 0)
    demand.ended([A, B], QOS)
    assert demand.busy(QOS, 10) == {}
    demand.asking([A], QOS, 10)
    assert demand.busy(QOS, 10) == {A: 990}
    demand.taken([A], QOS)  # it took the place that was left: the others still wait
    assert demand.busy(QOS, 11) == {A: 989}


def test_who_refuses_again_and_again_is_asked_less_often() -> None:
    demand, now_ms = Demand(), 0
    waits = []
    for _ in range(8):
        demand.refused(A, QOS, 0, now_ms)
        waits.append(demand.busy(QOS, now_ms)[A])
        now_ms += waits[-1]
        demand.asking([A], QOS, now_ms)
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (2 * BUSY_MS_MIN, BACKOFF_MS_MAX)


def test_a_stage_cannot_keep_clients_away_for_ever() -> None:
    demand = Demand()
    demand.refused(A, QOS, 10**9, 0)
    assert demand.busy(QOS, 0) == {A: BUSY_MS_MAX}


def test_who_took_a_session_meanwhile_does_not_go_on_refusing() -> None:
    demand = Demand()
    for now_ms in (0, 10, 20):
        demand.refused(A, QOS, 0, now_ms)
    demand.ended([A], QOS)
    demand.asking([A], QOS, 30)
    demand.taken([A], QOS)
    demand.refused(A, QOS, 0, 40)
    assert demand.busy(QOS, 40) == {A: 2 * BUSY_MS_MIN}
