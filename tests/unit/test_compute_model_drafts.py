"""Drafts of a model: kept ahead of the text, waited for only where that gains time."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from plait.client.driver import Accounting, Deliver, Driver, Finish, SendFrame
from plait.compute.drafts import Took
from plait.compute.model_drafts import Answered, ModelDrafts, PairedDrafter


class Oracle:
    """A model that knows a sequence, wrong at some positions; answers when told to."""

    def __init__(self, known: list[int], wrong: frozenset[int] = frozenset()) -> None:
        self.known, self.wrong = known, wrong
        self.cache: list[int] = []
        self.waiting: deque[tuple[int, tuple[int, ...], Answered]] = deque()
        self.took_ms = 1.0
        self.broken = False

    def ask(self, first: int, ids: tuple[int, ...], answered: Answered) -> None:
        self.waiting.append((first, ids, answered))

    def answer(self) -> None:
        first, ids, answered = self.waiting.popleft()
        if self.broken:
            answered(None, 0.0)
            return
        assert first <= len(self.cache), "positions were left out"
        self.cache[first:] = ids
        at = len(self.cache)
        right = self.cache == self.known[:at] and at not in self.wrong
        answered(self.known[at] if right and at < len(self.known) else 7, self.took_ms)


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 5), max_size=20))
def test_what_is_ahead_follows_what_came(steps: list[int], wants: list[int]) -> None:
    known = [10 + i for i in range(60)]
    model = Oracle(known)
    drafts = ModelDrafts(known[:4], model.ask, lambda: None)
    came, turns = 4, deque(wants)
    for step in steps:
        if turns:
            drafts.want(turns.popleft())
        if model.waiting and step % 2:
            model.answer()
        # Every third id is another than the model thinks.
        new = [99 if (came + i) % 3 == 0 else known[came + i] for i in range(step)]
        for index, token in enumerate(new):
            model.known = [*model.known[: came + index], token, *model.known[came + index + 1 :]]
        drafts.extend(new)
        came += step
        assert len(model.waiting) <= 1
    drafts.want(3)
    while model.waiting:
        model.answer()
    assert len(drafts.ahead) >= 3
    assert drafts.ahead == model.known[came : came + len(drafts.ahead)]


def run(
    truth: list[int], model: Oracle, max_tokens: int, order: list[bool], traversal_ms: float = 50.0
) -> tuple[list[int], Driver, int]:
    """Drive an answer; ``order`` says whether the model or the pipeline is next."""
    events: list[str] = []
    drafter = PairedDrafter((100, 101), model.ask, lambda: events.append("ready"))
    driver = Driver((100, 101), max_tokens, frozenset(), Accounting(8, 8), 200, drafter)
    actions, delivered, turns, waits = driver.start(), list[int](), deque(order), 0
    while not any(isinstance(one, Finish) for one in actions):
        delivered += [one.token_id for one in actions if isinstance(one, Deliver)]
        waits += driver.thinking
        if model.waiting and (driver.thinking or (turns and turns.popleft())):
            model.answer()
            actions = []
            if events:
                events.clear()
                actions = driver.drafted()
            continue
        assert driver.awaiting, "nobody is waited for"
        sent = driver.in_flight
        drawn, ids = len(driver.drawn), list[int]()
        if sent.sample:
            ids = [truth[drawn]]
            for draft in sent.draft_ids:
                if draft != ids[-1]:
                    break
                ids.append(truth[drawn + len(ids)])
        actions = driver.on_result(sent.traversal, ids, [0.0] * len(ids), Took(traversal_ms))
    delivered += [one.token_id for one in actions if isinstance(one, Deliver)]
    return delivered, driver, waits


truths = st.lists(st.integers(10, 14), min_size=40, max_size=40)


@given(
    truths,
    st.frozensets(st.integers(3, 40)),
    st.integers(1, 38),
    st.lists(st.booleans(), max_size=80),
    st.floats(0.1, 200),
    st.booleans(),
)
def test_no_draft_of_a_model_changes_a_token(
    truth: list[int],
    wrong: frozenset[int],
    max_tokens: int,
    order: list[bool],
    took_ms: float,
    broken: bool,
) -> None:
    model = Oracle([100, 101, *truth], wrong)
    model.took_ms, model.broken = took_ms, broken
    delivered, driver, _ = run(truth, model, max_tokens, order)
    assert delivered == driver.drawn == truth[:max_tokens]
    assert all(frame.drafts <= 16 for frame in driver.frames)


def test_a_cheap_model_that_is_right_is_waited_for_and_a_dear_one_is_not() -> None:
    truth = [10 + 7 * i % 180 for i in range(60)]  # nothing of it repeats itself soon
    cheap, dear = Oracle([100, 101, *truth]), Oracle([100, 101, *truth])
    dear.took_ms = 500.0
    _, fast, waits = run(truth, cheap, 50, [])
    _, slow, _ = run(truth, dear, 50, [])
    assert waits > 0
    assert fast.draft_counts.traversals < 25
    assert fast.draft_counts.accepted == fast.draft_counts.drafted > 0
    assert slow.draft_counts.traversals > 40


def test_a_model_that_fails_is_not_waited_for() -> None:
    truth = [10 + i for i in range(30)]
    model = Oracle([100, 101, *truth])
    model.broken = True
    delivered, driver, _ = run(truth, model, 20, [])
    assert delivered == truth[:20]
    assert driver.draft_counts.drafted == 0


def test_a_late_drafter_sends_what_there_is() -> None:
    truth = [10 + i for i in range(30)]
    model = Oracle([100, 101, *truth])
    drafter = PairedDrafter((100, 101), model.ask, lambda: None)
    driver = Driver((100, 101), 20, frozenset(), Accounting(), 200, drafter)
    driver.start()
    model.answer()
    driver.on_result(0, [10], [0.0])
    assert not driver.thinking  # no traversal was timed yet
    driver.on_result(1, [11], [0.0], Took(50.0))
    assert driver.thinking
    assert not driver.awaiting
    model.answer()
    [sent] = driver.drafted(late=True)
    assert isinstance(sent, SendFrame)
    assert not driver.thinking
    assert driver.drafted(late=True) == []
