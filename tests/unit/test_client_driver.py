"""The driver core: frames, chunks and endings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.client.driver import Accounting, Deliver, Driver, Finish, SendFrame
from plait.errors import RemoteProtocolError

END = 2


def run(driver: Driver, draws: list[int]) -> tuple[list[int], str]:
    """Answer every frame from ``draws``; return what was delivered and how it ended."""
    delivered: list[int] = []
    actions, source = driver.start(), iter(draws)
    while True:
        sent = [action for action in actions if isinstance(action, SendFrame)]
        delivered += [action.token_id for action in actions if isinstance(action, Deliver)]
        ended = [action.reason for action in actions if isinstance(action, Finish)]
        if ended:
            return delivered, ended[0]
        ids = [next(source)] if sent[0].sample else []
        actions = driver.on_result(sent[0].traversal, ids, [0.0] * len(ids))


@given(
    prompt=st.integers(1, 40),
    max_tokens=st.integers(1, 40),
    end_after=st.integers(1, 60),
    chunk=st.integers(1, 8),
    prefill=st.integers(1, 16),
)
def test_every_position_is_fed_once_and_every_draw_is_accounted(
    prompt: int, max_tokens: int, end_after: int, chunk: int, prefill: int
) -> None:
    draws = [10 + i for i in range(end_after - 1)] + [END]
    draws += [99] * max_tokens
    driver = Driver(
        tuple(range(100, 100 + prompt)),
        max_tokens,
        frozenset({END}),
        Accounting(chunk, prefill),
        vocabulary_size=200,
    )
    delivered, reason = run(driver, draws)
    expected = draws[: min(max_tokens, end_after)]
    assert driver.drawn == expected
    assert delivered == [token for token in expected if token != END] == list(driver.token_ids)
    assert reason == ("stop" if END in expected else "length")
    fed = [token for frame in driver.frames for token in frame.ids]
    assert fed == [*driver.prompt_ids, *expected[:-1]]
    position = 0
    for traversal, frame in enumerate(driver.frames):
        assert (frame.traversal, frame.first_position) == (traversal, position)
        position += frame.rows
    assert driver.frames[-1].close_chunk
    unclosed = 0
    for frame in driver.frames:
        unclosed = 0 if frame.close_chunk else unclosed + 1
        assert unclosed < chunk


def test_a_repeated_result_is_dropped_and_a_wrong_one_is_the_peers_fault() -> None:
    driver = Driver((5, 6, 7), 4, frozenset({END}), Accounting(32, 2), 100)
    driver.start()
    driver.on_result(0, [], [])
    assert driver.on_result(0, [], []) == []
    with pytest.raises(RemoteProtocolError):
        driver.on_result(7, [1], [0.0])
    with pytest.raises(RemoteProtocolError):
        driver.on_result(1, [], [])


@pytest.mark.parametrize(
    ("token", "logprob"), [(100, -1.0), (7, float("nan")), (7, float("-inf")), (7, 0.5)]
)
def test_an_impossible_draw_is_not_delivered(token: int, logprob: float) -> None:
    driver = Driver((5,), 8, frozenset({END}), Accounting(), 100)
    driver.start()
    with pytest.raises(RemoteProtocolError):
        driver.on_result(0, [token], [logprob])
    assert driver.drawn == []


def test_the_closing_frame_has_no_rows() -> None:
    driver = Driver((5,), 8, frozenset({END}), Accounting(), 100)
    driver.start()
    driver.on_result(0, [11], [-0.1])
    [close] = driver.on_result(1, [END], [-0.1])
    assert close == SendFrame(2, 2, (), sample=False, close_chunk=True)
    assert driver.on_result(2, [], []) == [Finish("stop")]
