"""Stop sequences never leak, however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.gateway.stops import StopFilter

letters = st.text("ab\n", max_size=40)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the plain definition."""
    for end in range(len(text) + 1):
        if completed := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, completed))], True
    return text, False


@given(pieces=st.lists(letters, max_size=12), stops=stop_lists)
def test_the_pieces_make_no_difference_and_nothing_leaks(
    pieces: list[str], stops: list[str]
) -> None:
    stop_filter, released = StopFilter(stops), ""
    wanted, stopped = expected("".join(pieces), stops)
    for piece in pieces:
        released += stop_filter.push(piece)
        assert wanted.startswith(released)
    released += stop_filter.flush()
    assert (released, stop_filter.stopped) == (wanted, stopped)
    assert not any(stop in released for stop in stops)


@given(pieces=st.lists(letters, max_size=12), stops=stop_lists)
def test_no_more_is_held_back_than_may_begin_a_stop(pieces: list[str], stops: list[str]) -> None:
    stop_filter, seen, released = StopFilter(stops), "", ""
    for piece in pieces:
        seen, released = seen + piece, released + stop_filter.push(piece)
        held = seen[len(released) :]
        if not stop_filter.stopped:
            assert not held or any(stop.startswith(held) for stop in stops)


def test_nothing_comes_after_a_stop() -> None:
    stop_filter = StopFilter(["\n\n"])
    assert [stop_filter.push(text) for text in ("one\n", "\ntwo", "three")] == ["one", "", ""]
    assert stop_filter.flush() == ""


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopFilter([""])
