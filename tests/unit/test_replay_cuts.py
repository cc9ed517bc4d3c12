"""How rows are cut into frames when a stage is rebuilt."""

from hypothesis import given
from hypothesis import strategies as st

from plait.node.scheduler import PIECE_ROWS
from plait.replay_cuts import DECODED_ROWS_MAX, PROMPT_ROWS_MAX, cuts

COUNTS = st.integers(0, 2_000)


@given(COUNTS, COUNTS, COUNTS)
def test_every_row_is_replayed_once_and_cut_as_it_was_computed(
    end: int, prompt: int, cached: int
) -> None:
    cached = min(cached, prompt)
    frames = list(cuts(end, prompt, cached))
    assert [at for first, rows in frames for at in range(first, first + rows)] == list(range(end))
    for first, rows in frames:
        if first >= prompt:
            assert rows <= DECODED_ROWS_MAX
            continue
        began, ended = (cached, prompt) if first >= cached else (0, cached)
        assert first + rows <= ended
        assert rows <= PROMPT_ROWS_MAX
        assert (first - began) % PIECE_ROWS == 0


def test_what_counts_as_few_rows_is_said_alike() -> None:
    from plait.compute.linear import NARROW_ROWS

    assert DECODED_ROWS_MAX == NARROW_ROWS
