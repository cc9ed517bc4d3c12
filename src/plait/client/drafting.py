"""Guesses for one session: what may follow, and how much of it is worth sending. Pure."""

from collections.abc import Sequence

from plait.compute.drafts import DraftLength, Lookup


class Drafting:
    """The driver's ``Drafter``: a lookup for the ids, a policy for their number."""

    def __init__(self, lookup: Lookup, length: DraftLength | None = None) -> None:
        self._lookup = lookup
        self._length = length or DraftLength()
        self._match = 0

    def extend(self, ids: Sequence[int]) -> None:
        """Learn what was drawn."""
        self._lookup.extend(ids)

    def propose(self, most: int) -> tuple[int, ...]:
        """Up to ``most`` ids that may follow; none where they would not pay."""
        self._match = self._lookup.match_length
        return self._lookup.propose(min(most, self._length.length(self._match)))

    def observe(self, proposed: int, accepted: int, elapsed_ms: float | None) -> None:
        """Learn how a traversal went."""
        self._length.record(self._match, proposed, accepted, elapsed_ms)
