"""When silence means trouble, who holds a pipeline up, and whom a session avoids."""

from plait.client.pace import (
    SILENCE_FIRST_MS_MIN,
    SILENCE_MS_MAX,
    SILENCE_MS_MIN,
    WINDOW,
    Pace,
)
from plait.client.suspects import AVOID_MS, Suspects
from plait.router.view import View
from plait.testing.offers import paper_offer
from plait.types import Span


def test_patience_follows_the_pipelines_own_past() -> None:
    pace = Pace([1000.0, 1000.0], first_ms=100.0)
    assert pace.patience_ms(decode=True) == SILENCE_FIRST_MS_MIN
    pace.note(10.0, [1000, 1000])
    assert pace.patience_ms(decode=True) == SILENCE_MS_MIN
    assert pace.patience_ms(decode=False) == SILENCE_FIRST_MS_MIN
    for _ in range(WINDOW):
        pace.note(1_000.0, [1000, 1000])
    assert pace.patience_ms(decode=True) == 8_000
    for _ in range(WINDOW):
        pace.note(100_000.0, [1000, 1000])
    assert pace.patience_ms(decode=True) == SILENCE_MS_MAX


def test_a_straggler_is_far_slower_than_its_offer_and_most_of_the_time() -> None:
    slow_offer = Pace([100_000.0, 1000.0], first_ms=0.0)
    slow_now = Pace([1000.0, 1000.0], first_ms=0.0)
    for _ in range(WINDOW):
        assert slow_now.straggler() is None
        slow_offer.note(110.0, [100_000, 1000])
        slow_now.note(110.0, [100_000, 1000])
    assert slow_offer.straggler() is None
    assert slow_now.straggler() == 0


def test_one_slow_step_makes_no_straggler() -> None:
    pace = Pace([1000.0, 1000.0], first_ms=0.0)
    for step in range(2 * WINDOW):
        pace.note(3.0, [900_000 if step == 3 else 1000, 1000])
        assert pace.straggler() is None


def test_a_suspect_is_avoided_for_a_while_and_only_in_its_incarnation() -> None:
    offer = paper_offer("a", Span(0, 4))
    view = View({offer.peer: offer}, {}, {})
    suspects = Suspects()
    suspects.add(offer.peer, "slow", offer.incarnation, now_ms=0)
    assert suspects.avoided(view, 1) == {offer.peer}
    assert suspects.avoided(view, 1, also_slow=False) == frozenset()
    assert suspects.avoided(view, AVOID_MS["slow"]) == frozenset()
    suspects.add(offer.peer, "gone", offer.incarnation - 1, now_ms=0)
    assert suspects.avoided(view, 1) == frozenset()
    assert suspects.kind(offer.peer) == "gone"
