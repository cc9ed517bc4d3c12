"""Guessing the next tokens from the text so far, and how many guesses are worth sending.

Pure and light: the driver uses it. Guesses never change the text, since the last stage only
accepts what it would have drawn anyway; they change how many tokens one traversal gives.
Looking up n-grams in prompt and answer is Saxena's prompt lookup decoding (2023); how many
to send follows the expected gain of Leviathan et al. (2023, arXiv:2211.17192, section 3).
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

LENGTH_MAX = 16
"""Drafts of one traversal, at most."""
_PAIR = 2
_MATCH_MAX = 16
_PLACES_MAX = 16  # of one pair of ids that are looked at, the latest ones
_COPY_MIN = 4  # ids that fitted in a row, so that one that does not is taken for an edit


class Lookup(Protocol):
    """Guesses how a sequence goes on."""

    @property
    def match_length(self) -> int:
        """How well the last ids are known, as a number of ids; 0 if nothing is proposed."""

    def extend(self, ids: Sequence[int]) -> None:
        """These ids came after all those known so far."""

    def propose(self, count: int) -> tuple[int, ...]:
        """At most ``count`` ids that may come next."""


class NgramDrafter:
    """Proposes what followed the longest earlier occurrence of the sequence's last ids.

    Where the last two ids are new together, the weakest guesses remain: that one id of an
    edited copy was replaced and the copy goes on behind it, or what followed the last id.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        """Of each pair of ids in a row, the positions behind them."""
        self._latest: dict[int, int] = {}
        """Of each id, the position behind its latest occurrence but the sequence's end."""
        self._match = (0, 0)
        self.extend(prompt_ids)

    @property
    def match_length(self) -> int:
        """How many of the last ids were found earlier on; 0 if not even the last one."""
        return self._match[0]

    def extend(self, ids: Sequence[int]) -> None:
        """These ids came after all those known so far."""
        for token in ids:
            if self._ids:
                self._latest[self._ids[-1]] = len(self._ids)
            if len(self._ids) >= _PAIR:
                places = self._places.setdefault(tuple(self._ids[-_PAIR:]), [])
                places.append(len(self._ids))
                del places[:-_PLACES_MAX]
            self._ids.append(token)
            self._match = self._next_match()

    def propose(self, count: int) -> tuple[int, ...]:
        """At most ``count`` ids that may come next; none if the last one is new."""
        length, place = self._match
        if not length:
            return ()
        found = self._ids[place : place + count]
        period = len(self._ids) - place
        # What reaches the end goes on as it began: the text repeats itself there.
        return tuple(found[index % period] for index in range(count)) if found else ()

    def _next_match(self) -> tuple[int, int]:
        """(length, position behind it) of the longest match, the latest among equals."""
        places = self._places.get(tuple(self._ids[-_PAIR:]), ())
        length, place = max(((self._length_at(at), at) for at in places), default=(0, 0))
        if length:
            return length, place
        before, followed = self._match
        if before >= _COPY_MIN:
            return 1, followed + 1
        latest = self._latest.get(self._ids[-1])
        return (1, latest) if latest is not None else (0, 0)

    def _length_at(self, place: int) -> int:
        length = _PAIR
        while length < min(_MATCH_MAX, place) and (
            self._ids[place - 1 - length] == self._ids[-1 - length]
        ):
            length += 1
        return length


@dataclass(frozen=True, slots=True)
class Took:
    """How long a traversal took, and how much of that the stages say they had it, if known."""

    elapsed_ms: float
    stages_ms: float | None = None


_DECAY = 0.95  # of what was seen, per traversal: about the last twenty count
_GAIN_MIN = 1.04  # expected of drafts: less is within what is not known of their chance
_PRIOR_TRIALS = 3.0
_KINDS = (2, 4, 8, 16)
_PRIORS = (0.2, 0.4, 0.6, 0.85, 0.96)  # acceptance after a match of 1, 2, 4, 8, 16 ids
_ROW_COST = 0.15  # of a traversal: a further row, until anything is known
_ROW_COST_IN_STAGE = 0.4  # of what a row takes in the stages: a further one, until measured
_RATIO_MIN = 0.02
_SPREAD_MIN = 0.08  # variance of rows from which a line is drawn
_PLAIN_EVERY = 12  # traversals with drafts, until one without shows what a row costs
_PROBE_AFTER = 8  # traversals without drafts that were possible
_PROBE_AFTER_MAX = 64


@dataclass(slots=True)
class Acceptance:
    """Recent drafts after matches of one kind: how many were tried, how many were right."""

    prior: float
    tried: float = 0.0
    right: float = 0.0

    @property
    def rate(self) -> float:
        """The chance of the next draft."""
        return (self.right + self.prior * _PRIOR_TRIALS) / (self.tried + _PRIOR_TRIALS)

    def record(self, tried: int, right: int) -> None:
        """Of so many drafts, up to the first wrong one, so many were right."""
        self.fade()
        self.tried += tried
        self.right += right

    def fade(self) -> None:
        """Count what was seen a little less: the estimate goes back to what is usual."""
        self.tried *= _DECAY
        self.right *= _DECAY


@dataclass(slots=True)
class _RowCost:
    """What a further row costs, in traversals of one row: the line through recent times."""

    ratio: float = _ROW_COST
    one_row_ms: float = 0.0
    """0 until it is known."""
    weight: float = 0.0
    rows: float = 0.0
    time: float = 0.0
    rows_rows: float = 0.0
    rows_time: float = 0.0
    in_stages: float = 0.0
    """Share of the time of traversals of one row, ``singles`` of them."""
    singles: int = 0

    @property
    def clear(self) -> bool:
        """Whether recent traversals differed enough in length."""
        spread = self.weight * self.rows_rows - self.rows**2
        return self.weight >= 4 and spread >= self.weight**2 * _SPREAD_MIN

    def record(self, rows: int, took: Took) -> None:
        elapsed_ms = took.elapsed_ms
        self._guess(rows, took)
        self.weight = self.weight * _DECAY + 1
        self.rows = self.rows * _DECAY + rows
        self.time = self.time * _DECAY + elapsed_ms
        self.rows_rows = self.rows_rows * _DECAY + rows * rows
        self.rows_time = self.rows_time * _DECAY + rows * elapsed_ms
        if not self.clear:
            return
        spread = self.weight * self.rows_rows - self.rows**2
        slope = (self.weight * self.rows_time - self.rows * self.time) / spread
        one_row = (self.time - slope * self.rows) / self.weight + slope
        if one_row > 0:
            self.one_row_ms = one_row
            self.ratio = min(1.0, max(_RATIO_MIN, slope / one_row))

    def _guess(self, rows: int, took: Took) -> None:
        """Until rows were measured: what they cost is computing, and none of it the way."""
        if rows != 1 or took.stages_ms is None or self.one_row_ms or took.elapsed_ms <= 0:
            return
        self.singles += 1
        share = min(1.0, max(0.0, took.stages_ms / took.elapsed_ms))
        self.in_stages += (share - self.in_stages) / self.singles
        self.ratio = max(_RATIO_MIN, _ROW_COST_IN_STAGE * self.in_stages)


@dataclass(slots=True)
class DraftLength:
    """How many drafts to send, by how recent ones fared and what rows cost.

    A draft behind i accepted ones stands behind a match that is i ids longer, so its chance
    p_i is what drafts after such matches had lately. k drafts give 1 + p_0 + p_0 p_1 + …
    tokens on average and cost 1 + k times the row cost; ``length`` takes the best k. Where
    that is 0 it tries one draft now and then, ever more rarely while it is wrong. A
    traversal without drafts is put in now and then if nothing else shows what rows cost.
    """

    length_max: int = LENGTH_MAX
    _kinds: tuple[Acceptance, ...] = field(
        default_factory=lambda: tuple(Acceptance(prior) for prior in _PRIORS)
    )
    _cost: _RowCost = field(default_factory=_RowCost)
    _skipped: int = 0
    _drafted: int = 0
    _probe_after: int = _PROBE_AFTER

    @property
    def row_cost(self) -> float:
        """What a further row costs, in traversals of one row."""
        return self._cost.ratio

    @property
    def traversal_ms(self) -> float:
        """A traversal of one row, roughly at first; 0 before any was timed."""
        cost = self._cost
        return cost.one_row_ms or (cost.time / cost.weight if cost.weight else 0.0)

    def record_time(self, rows: int, took: Took | None) -> None:
        """A traversal of so many rows took so long; None where that means nothing."""
        if took is not None:
            self._cost.record(rows, took)

    def length(self, match_length: int) -> int:
        """How many drafts to send after a match of that length; 0 for none."""
        if match_length < 1:
            return 0
        best, _ = self.best(match_length)
        if best == 0 and self.length_max:
            self._skipped += 1
            return int(self._skipped >= self._probe_after)
        if self._drafted >= _PLAIN_EVERY and not self._cost.clear:
            return 0
        return best

    def best(self, match_length: int) -> tuple[int, float]:
        """(drafts that gain most, tokens per time that they give over none)."""
        best, best_gain = 0, _GAIN_MIN
        tokens, chance = 1.0, 1.0
        for count in range(1, self.length_max + 1):
            chance *= self._kinds[_kind(match_length + count - 1)].rate
            tokens += chance
            gain = tokens / (1 + self._cost.ratio * count)
            if gain > best_gain:
                best, best_gain = count, gain
        return best, best_gain if best else 1.0

    def record(
        self, match_length: int, proposed: int, accepted: int, took: Took | None = None
    ) -> None:
        """A traversal came back: of ``proposed`` drafts, ``accepted`` were drawn.

        Leave out how long it took where that means nothing (a prefill, or a rerouted
        traversal).
        """
        self.record_time(1 + proposed, took)
        self._drafted = self._drafted + 1 if proposed else 0
        if not proposed:
            return
        self._learn(match_length, proposed, accepted)
        if self._skipped >= self._probe_after:
            wrong = accepted == 0
            longer = min(2 * self._probe_after, _PROBE_AFTER_MAX)
            self._probe_after = longer if wrong else _PROBE_AFTER
        self._skipped = 0

    def _learn(self, match_length: int, proposed: int, accepted: int) -> None:
        # Behind the first wrong draft nothing is known of the others.
        tried = Counter(_kind(match_length + i) for i in range(min(proposed, accepted + 1)))
        right = Counter(_kind(match_length + i) for i in range(accepted))
        for kind, count in tried.items():
            self._kinds[kind].record(count, right[kind])


def _kind(match_length: int) -> int:
    return bisect_right(_KINDS, match_length)


class AdaptiveDrafter:
    """Drafts of as many tokens as have proved worth it lately: what a driver asks.

    ``lookup`` guesses; by default what followed the same n-gram in prompt and answer.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        lookup: Lookup | None = None,
        length_max: int = LENGTH_MAX,
    ) -> None:
        self._lookup: Lookup = lookup or NgramDrafter(prompt_ids)
        self._policy = DraftLength(length_max)
        self._match_length = 0

    def extend(self, ids: Sequence[int]) -> None:
        """Learn what was drawn."""
        self._lookup.extend(ids)

    @property
    def row_cost(self) -> float:
        """What a further row costs, in traversals of one row."""
        return self._policy.row_cost

    @property
    def traversal_ms(self) -> float:
        """A traversal of one row; 0 before any was timed."""
        return self._policy.traversal_ms

    def propose(self, most: int) -> tuple[int, ...]:
        """Up to ``most`` ids that may follow."""
        return self.offer(most)[0]

    def offer(self, most: int) -> tuple[tuple[int, ...], float]:
        """``propose``, and the gain that is expected of it: 1 is none."""
        self._match_length = self._lookup.match_length
        count = min(most, self._policy.length(self._match_length))
        if count <= 0:
            return (), 1.0
        return self._lookup.propose(count), self._policy.best(self._match_length)[1]

    def late(self) -> tuple[int, ...]:
        """Nothing here is ever waited for."""
        return ()

    def observe_time(self, rows: int, took: Took | None) -> None:
        """Learn how long a traversal of so many rows took, whosever drafts they were."""
        self._policy.record_time(rows, took)

    def observe(self, proposed: int, accepted: int, took: Took | None = None) -> None:
        """Learn how many of the last proposal were drawn, 0 of 0 too, and how long the
        traversal took, if that is known."""
        self._policy.record(self._match_length, proposed, accepted, took)
