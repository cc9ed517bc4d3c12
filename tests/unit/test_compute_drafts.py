"""Drafts: what is proposed occurs in the text, and lengths follow what is accepted."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.compute.drafts import LENGTH_MAX, AdaptiveDrafter, DraftLength, NgramDrafter, Took

texts = st.lists(st.integers(0, 4), max_size=60)


def test_what_followed_the_same_ids_is_proposed() -> None:
    drafter = NgramDrafter([1, 2, 3, 4, 5, 9, 2, 3])
    assert drafter.match_length == 2
    assert drafter.propose(3) == (4, 5, 9)
    drafter.extend([4])
    assert drafter.match_length == 3
    assert drafter.propose(2) == (5, 9)


def test_an_edited_copy_goes_on_behind_the_edit() -> None:
    copy = NgramDrafter([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4])
    assert copy.match_length == 4
    copy.extend([30])
    assert copy.match_length == 1
    assert copy.propose(3) == (6, 7, 8)
    copy.extend([31])  # no copy any more
    assert copy.match_length == 0
    assert copy.propose(4) == ()
    short = NgramDrafter([1, 2, 3, 4, 1, 2, 30])
    assert short.match_length == 0


def test_what_followed_the_last_id_alone_is_the_weakest_guess() -> None:
    drafter = NgramDrafter([1, 2, 3, 4, 9, 2])
    assert drafter.match_length == 1
    assert drafter.propose(2) == (3, 4)
    assert NgramDrafter([1, 2, 3]).match_length == 0
    assert NgramDrafter([7, 7]).propose(3) == (7, 7, 7)


def test_the_longest_match_wins_and_the_latest_among_equals() -> None:
    assert NgramDrafter([1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3]).propose(1) == (4,)
    assert NgramDrafter([2, 3, 4, 2, 3, 5, 2, 3]).propose(1) == (5,)


def test_a_repetition_goes_on() -> None:
    assert NgramDrafter([1, 2, 3, 1, 2, 3, 1, 2]).propose(7) == (3, 1, 2, 3, 1, 2, 3)
    assert NgramDrafter([6, 6, 6]).propose(4) == (6, 6, 6, 6)


def simple_match(ids: list[int]) -> tuple[int, int]:
    """The longest earlier occurrence of the last ids, by trying every place."""
    best = (0, 0)
    for place in range(2, len(ids)):
        length = 0
        while length < min(place, 16) and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        if length >= 2:
            best = max(best, (length, place))
    return best


@given(texts, st.integers(0, 20))
def test_it_finds_what_looking_everywhere_finds(ids: list[int], count: int) -> None:
    drafter = NgramDrafter(ids[: len(ids) // 2])
    drafter.extend(ids[len(ids) // 2 :])
    length, place = simple_match(ids)
    found = drafter.propose(count)
    # Only the latest places of a pair are looked at, so a longer match may be missed.
    assert drafter.match_length <= max(length, 1)
    assert drafter.match_length or ids[-1:] not in [[one] for one in ids[:-1]]
    assert len(found) == (count if drafter.match_length else 0)
    if length and drafter.match_length == length:
        known = [*ids, *found]
        assert list(found) == known[place : place + count]


@given(texts, texts)
def test_extending_is_starting_with_more(first: list[int], second: list[int]) -> None:
    drafter = NgramDrafter(first)
    drafter.propose(3)
    drafter.extend(second)
    assert drafter.propose(8) == NgramDrafter(first + second).propose(8)


def traversals(
    policy: DraftLength,
    accepted_of: Callable[[int, int], int],
    count: int = 400,
    row_cost: float = 0.15,
) -> tuple[int, float]:
    """(tokens, time in traversals of one row) of ``count`` traversals."""
    tokens, spent = 0, 0.0
    for turn in range(count):
        length = policy.length(5)
        accepted = accepted_of(turn, length)
        elapsed = 1 + row_cost * length
        policy.record(5, length, accepted, Took(elapsed * 40))
        tokens += accepted + 1
        spent += elapsed
    return tokens, spent


def test_drafts_that_are_always_right_become_long() -> None:
    policy = DraftLength()
    tokens, spent = traversals(policy, lambda turn, length: length)
    assert policy.length(5) == LENGTH_MAX
    assert tokens / spent > 4


@pytest.mark.parametrize("row_cost", [0.02, 0.15, 0.5, 1.0])
def test_drafts_that_are_always_wrong_cost_next_to_nothing(row_cost: float) -> None:
    tokens, spent = traversals(DraftLength(), lambda turn, length: 0, row_cost=row_cost)
    assert tokens / spent > 1 - 0.03 * (1 + 2 * row_cost)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("row_cost", [0.03, 0.15, 0.4])
def test_it_is_never_slower_than_without(rate: float, row_cost: float) -> None:
    def accepted(turn: int, length: int) -> int:
        run = 0
        while run < length and (turn * 7919 + run * 104729) % 1000 < rate * 1000:
            run += 1
        return run

    tokens, spent = traversals(DraftLength(), accepted, row_cost=row_cost)
    assert tokens / spent > 0.97


def test_it_tries_again_when_the_text_changes() -> None:
    policy = DraftLength()
    traversals(policy, lambda turn, length: 0)
    assert policy.length(5) <= 1
    traversals(policy, lambda turn, length: length)
    assert policy.length(5) == LENGTH_MAX


def test_rows_that_cost_much_make_drafts_short() -> None:
    def length_after(row_cost: float) -> int:
        policy = DraftLength()
        traversals(policy, lambda turn, length: min(length, 3 + turn % 3), 60, row_cost)
        return policy.length(5)

    assert length_after(0.8) < length_after(0.02)


@pytest.mark.parametrize(("stages_ms", "drafts"), [(5.0, True), (38.0, False), (1e9, False)])
def test_before_rows_were_measured_they_cost_what_the_stages_have_of_the_time(
    stages_ms: float, drafts: bool
) -> None:
    """What crosses a slow network dearly is worth drafts that on one machine are not."""
    policy = DraftLength()
    for _ in range(3):
        policy.record(1, 0, 0, Took(40.0, stages_ms))
    assert (policy.best(1)[0] > 0) is drafts


def test_nothing_is_sent_without_a_match_or_when_switched_off() -> None:
    assert DraftLength().length(0) == 0
    assert DraftLength(length_max=0).length(16) == 0


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16), st.floats(0, 1e6)), max_size=80))
def test_lengths_stay_in_bounds(seen: list[tuple[int, int, float]]) -> None:
    policy = DraftLength(length_max=9)
    for proposed, accepted, elapsed_ms in seen:
        policy.record(6, proposed, min(proposed, accepted), Took(elapsed_ms))
        assert 0 <= policy.length(6) <= 9


def test_drafts_go_on_as_long_as_longer_matches_are_worth_it() -> None:
    policy = DraftLength()
    for _ in range(60):  # the second id of a copy is doubtful, those behind it never
        policy.record(2, 1, 0, Took(40.0))
        policy.record(4, 6, 6, Took(50.0))
    assert policy.length(4) > policy.length(2)


def test_a_driver_gets_fewer_drafts_when_they_are_wrong() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    drafter = AdaptiveDrafter([*text, *text])
    sent = []
    for _ in range(40):
        sent.append(len(drafter.propose(16)))
        drafter.observe(sent[-1], 0)
    assert sent[0] > 4
    assert max(sent[30:]) <= 1
    fresh = AdaptiveDrafter([*text, 20, 1, 2])
    assert fresh.propose(2) == (3,)
    fresh.extend([30, 31, 32, 33])
    assert fresh.propose(5) == ()
    assert AdaptiveDrafter(text * 2, length_max=0).propose(9) == ()
