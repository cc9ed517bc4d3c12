"""The driver core: frames, chunks and endings."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.client.driver import (
    Accounting,
    Deliver,
    Driver,
    Embedded,
    EndDrawn,
    Extras,
    Finish,
    PromptScored,
    SendFrame,
)
from plait.compute.drafts import Took
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
    [_, close] = driver.on_result(1, [END], [-0.1])
    assert close == SendFrame(2, 2, (), sample=False, close_chunk=True)
    assert driver.on_result(2, [], []) == [Finish("stop")]


class Echo:
    """Proposes what it is told to, and remembers what became of it."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.learnt: list[int] = []
        self.observed: list[tuple[int, int]] = []

    def extend(self, ids: Sequence[int]) -> None:
        self.learnt += ids

    def propose(self, most: int) -> tuple[int, ...]:
        start = len(self.learnt)
        return tuple(self.script[start : start + most])

    def late(self) -> tuple[int, ...]:
        return ()

    def observe(self, proposed: int, accepted: int, took: Took | None) -> None:
        self.observed.append((proposed, accepted))


def answer(frame: SendFrame, drawn: int, truth: list[int]) -> list[int]:
    """What the last stage draws for a frame when the model's own sequence is ``truth``."""
    if not frame.sample:
        return []
    ids = [truth[drawn]]
    for draft in frame.draft_ids:
        if draft != ids[-1] or ids[-1] == END:
            break
        ids.append(truth[drawn + len(ids)])
    return ids


@given(
    guesses=st.lists(st.booleans(), min_size=40, max_size=40),
    max_tokens=st.integers(1, 40),
    end_after=st.integers(1, 60),
    chunk=st.integers(1, 12),
)
def test_drafts_change_no_token_and_close_no_chunk(
    guesses: list[bool], max_tokens: int, end_after: int, chunk: int
) -> None:
    truth = ([10 + i for i in range(end_after - 1)] + [END] + [99] * 60)[:60]
    script = [token if right else 5 for token, right in zip(truth, guesses, strict=False)]
    drafter = Echo(script)
    driver = Driver((100, 101), max_tokens, frozenset({END}), Accounting(chunk, 8), 200, drafter)
    actions, delivered, open_draws = driver.start(), list[int](), 0
    while not (ended := [one for one in actions if isinstance(one, Finish)]):
        [sent] = [one for one in actions if isinstance(one, SendFrame)]
        assert not (sent.drafts and sent.close_chunk)
        open_draws += 1 + sent.drafts
        assert sent.rows == 0 or open_draws <= max(chunk, 1 + sent.drafts) or sent.close_chunk
        ids = answer(sent, len(driver.drawn), truth)
        open_draws = 0 if sent.close_chunk else open_draws - 1 - sent.drafts + len(ids)
        actions = driver.on_result(sent.traversal, ids, [0.0] * len(ids))
        delivered += [one.token_id for one in actions if isinstance(one, Deliver)]
    expected = truth[: min(max_tokens, end_after)]
    assert driver.drawn == expected
    assert delivered == [token for token in expected if token != END]
    assert ended[0].reason == ("stop" if END in expected else "length")
    assert drafter.learnt == expected
    assert all(0 <= accepted <= proposed for proposed, accepted in drafter.observed)
    counts, observed = driver.draft_counts, drafter.observed
    assert counts.traversals == len(observed)
    assert counts.drafted == sum(proposed for proposed, _ in observed)
    assert counts.accepted == sum(accepted for _, accepted in observed)


@given(
    prompt=st.integers(1, 20),
    prefill=st.integers(1, 8),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    lost=st.booleans(),
    replay=st.booleans(),
)
def test_a_reroute_repeats_and_skips_nothing(
    prompt: int, prefill: int, cuts: list[int], lost: bool, replay: bool
) -> None:
    truth = [10 + i for i in range(12)] + [END]
    prompt_ids = tuple(range(100, 100 + prompt))
    driver = Driver(prompt_ids, 20, frozenset({END}), Accounting(4, prefill), 200)
    actions, delivered, step = driver.start(), list[int](), 0
    while not any(isinstance(one, Finish) for one in actions):
        delivered += [one.token_id for one in actions if isinstance(one, Deliver)]
        sent = [one for one in actions if isinstance(one, SendFrame)][-1]
        step += 1
        if step in cuts and driver.finish is None:
            position = driver.position
            actions = driver.resume(replay=replay)
            frames = [one for one in actions if isinstance(one, SendFrame)]
            live = frames[-1]
            assert (live.traversal, live.first_position) == (position, position)
            assert live.close_chunk
            fed = [token for frame in frames[:-1] for token in frame.ids]
            assert fed == (list((*prompt_ids, *driver.drawn)[:position]) if replay else [])
            assert all(frame.replay and not frame.sample for frame in frames[:-1])
            assert [frame.traversal for frame in frames[:-1]] == list(range(len(frames) - 1))
            if lost:
                assert driver.on_result(live.traversal - 1, [], []) == []
            continue
        ids = answer(sent, len(driver.drawn), truth)
        actions = driver.on_result(sent.traversal, ids, [0.0] * len(ids))
    delivered += [one.token_id for one in actions if isinstance(one, Deliver)]
    assert delivered == truth[:-1]


def test_a_stopped_answer_ends_with_the_token_that_is_due() -> None:
    driver = Driver((5,), 8, frozenset({END}), Accounting(), 100)
    driver.start()
    driver.on_result(0, [11], [-0.1])
    driver.stop()
    actions = driver.on_result(1, [12], [-0.1])
    assert actions[:1] == [Deliver(12, -0.1)]
    assert driver.finish == "ended"
    close = driver.in_flight
    assert close.rows == 0
    assert driver.on_result(close.traversal, [], []) == [Finish("ended")]
    assert driver.token_ids == (11, 12)


@pytest.mark.parametrize("ids", [[7, 8, 9], [8, 8], [END, 8], []])
def test_draws_that_do_not_follow_the_drafts_are_the_peers_fault(ids: list[int]) -> None:
    driver = Driver((5,), 30, frozenset({END}), Accounting(), 100, Echo([6, 7, END, 9, 9]))
    driver.start()
    driver.on_result(0, [6], [-0.1])
    assert driver.in_flight.draft_ids == (7, END, 9, 9)
    with pytest.raises(RemoteProtocolError):
        driver.on_result(1, ids, [-0.1] * len(ids))
    assert driver.drawn == [6]


def test_the_likeliest_tokens_come_with_each_token() -> None:
    driver = Driver((5,), 8, frozenset({END}), Accounting(), 100)
    driver.start()
    top = ((11, -0.1), (12, -2.0))
    [deliver, _] = driver.on_result(0, [11], [-0.1], extras=Extras(tops=(top,)))
    assert deliver == Deliver(11, -0.1, top)
    bad = ((top, top), (((100, -0.1),),), (((1, 0.5),),), (((1, float("nan")),),))
    for tops in bad:
        with pytest.raises(RemoteProtocolError, match="likeliest"):
            driver.is_due(1, [11], [-0.1], Extras(tops=tops))


def test_an_embedding_comes_with_the_token_after_the_whole_prompt() -> None:
    driver = Driver((5, 6, 7), 1, frozenset({END}), Accounting(32, 2), 100, embed=True)
    driver.start()
    assert not driver.in_flight.embedding
    driver.on_result(0, [], [])
    assert driver.in_flight.embedding
    for values in ((), (float("nan"),), (float("inf"), 1.0)):
        with pytest.raises(RemoteProtocolError, match="embedding"):
            driver.on_result(1, [END], [-0.1], extras=Extras(embedding=values))
    actions = driver.on_result(1, [END], [-0.1], extras=Extras(embedding=(1.0, 2.0)))
    assert actions == [Embedded((1.0, 2.0)), EndDrawn(END, -0.1), Finish("stop")]


def test_an_embedding_is_asked_again_in_the_next_epoch_unless_it_came() -> None:
    driver = Driver((5, 6), 2, frozenset({END}), Accounting(), 100, embed=True)
    driver.start()
    assert driver.resume(replay=False)[-1:] == [driver.in_flight]
    assert driver.in_flight.embedding
    driver.on_result(driver.in_flight.traversal, [9], [-0.1], extras=Extras(embedding=(1.0,)))
    assert not driver.in_flight.embedding
    with pytest.raises(RemoteProtocolError, match="not asked"):
        driver.is_due(driver.in_flight.traversal, [9], [-0.1], Extras(embedding=(1.0,)))


def test_scores_come_for_every_token_of_the_prompt_but_the_first() -> None:
    driver = Driver((5, 6, 7, 8, 9), 1, frozenset({END}), Accounting(32, 2), 100, score=True)
    driver.start()
    assert driver.in_flight.scored == (6, 7)
    bad = (
        Extras(),
        Extras(scores=(-1.0,)),
        Extras(scores=(-1.0, 0.5)),
        Extras(scores=(-1.0, float("nan"))),
        Extras(scores=(-1.0, -2.0), score_tops=(((1, -0.1),),)),
        Extras(scores=(-1.0, -2.0), score_tops=(((100, -0.1),), ())),
    )
    for extras in bad:
        with pytest.raises(RemoteProtocolError):
            driver.is_due(0, [], [], extras)
    actions = driver.on_result(0, [], [], extras=Extras(scores=(-1.0, -2.0)))
    assert actions[0] == PromptScored((-1.0, -2.0))
    assert driver.in_flight.scored == (8, 9)
    # A reroute asks again only for what has not come.
    driver.resume(replay=True)
    assert driver.in_flight.scored == (8, 9)
    tops = (((8, -0.5),), ((9, -0.25),))
    sent = driver.in_flight.traversal
    actions = driver.on_result(sent, [], [], extras=Extras(scores=(-0.5, -0.25), score_tops=tops))
    assert actions[0] == PromptScored((-0.5, -0.25), tops)
    assert driver.in_flight.ids == (9,)
    assert not driver.in_flight.scored
    last = driver.on_result(driver.in_flight.traversal, [END], [-0.1])
    assert last == [EndDrawn(END, -0.1), Finish("stop")]
    plain = Driver((5, 6), 1, frozenset(), Accounting(), 100)
    plain.start()
    with pytest.raises(RemoteProtocolError, match="scored"):
        plain.is_due(0, [7], [-0.1], Extras(scores=(-1.0,)))
