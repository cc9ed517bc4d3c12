"""Stop sequences never leak, however the text is cut into pieces."""

import asyncio
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.client import Options
from plait.gateway.orders import Job
from plait.gateway.port import Ask
from plait.gateway.running import Events, Piece, Token, run_job
from plait.gateway.shelf import Shelved
from plait.gateway.stops import StopFilter
from plait.testing.upstream import FIRST_ID, FakeUpstream
from plait.types import Sampling

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


class Scripted(FakeUpstream):
    """Pieces, and no model: nobody looks at it here."""

    def __post_init__(self) -> None:
        return


def pieces_of(pieces: list[str], stops: list[str]) -> list[Piece]:
    """What becomes of an answer whose tokens have these texts."""
    ask = Ask(model="m", prompt_ids=(1,), sampling=Sampling(), options=Options(max_tokens=99))
    job = Job(index=0, choice=0, model=cast("Shelved", None), ask=ask, stops=tuple(stops))
    events = Events([job])
    asyncio.run(run_job(Scripted(pieces=tuple(pieces)), job, events))
    found = []
    while (event := events.next_now()) is not None:
        found += [event] if isinstance(event, Piece) else []
    return found


def text_of(token: Token, pieces: list[str]) -> str:
    whole = pieces[token.id - FIRST_ID].encode()
    return whole[: len(whole) - token.cut].decode()


@given(pieces=st.lists(st.text("ab\n\u20ac", max_size=4), max_size=12), stops=stop_lists)
def test_the_tokens_say_what_the_text_says(pieces: list[str], stops: list[str]) -> None:
    found = pieces_of(pieces, stops)
    wanted, _ = expected("".join(pieces), stops)
    assert "".join(piece.text for piece in found) == wanted
    tokens = [token for piece in found for token in piece.tokens]
    assert "".join(text_of(token, pieces) for token in tokens) == wanted
    assert not any(token.cut for token in tokens[:-1])
    passed = read = 0
    for piece in found:  # no token goes before its text
        passed += len(piece.text)
        read += sum(len(text_of(token, pieces)) for token in piece.tokens)
        assert read <= passed


def test_a_token_that_a_stop_cuts_waits_for_it() -> None:
    found = pieces_of(["-", "da", "bc"], ["ab"])
    assert [(piece.text, [token.cut for token in piece.tokens]) for piece in found] == [
        ("-", [0]),
        ("d", []),
        ("", [1]),
    ]
