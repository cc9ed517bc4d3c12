"""How rows are cut into frames when a stage is rebuilt: as they were when first computed. Pure.

Below fp32 the last bits of a result depend on how many rows of one session are computed
together. Prompt rows were computed in pieces of 128 from the first on that was not cached,
decoded ones a few at a time, each as if alone. Cut alike, a rebuilt stage holds to the bit
what the lost one held.
"""

from collections.abc import Iterator

PROMPT_ROWS_MAX = 256
"""A multiple of the pieces that stages cut prompts into."""
DECODED_ROWS_MAX = 32
"""Up to so many rows stages compute each as if it were alone."""


def cut(
    first: int, end: int, prompt_tokens: int, cached: int = 0, rows_max: int = PROMPT_ROWS_MAX
) -> int:
    """How many rows from ``first`` on go into one frame, of those before ``end``.

    Rows before ``cached`` were not computed in this session but found in the cache.
    """
    for border in (cached, prompt_tokens):
        if first < border:
            return min(border - first, end - first, PROMPT_ROWS_MAX, rows_max)
    return min(end - first, DECODED_ROWS_MAX, rows_max)


def cuts(end: int, prompt_tokens: int, cached: int = 0) -> Iterator[tuple[int, int]]:
    """First position and row count of each frame of the rows before ``end``."""
    first = 0
    while first < end:
        rows = cut(first, end, prompt_tokens, cached)
        yield first, rows
        first += rows
