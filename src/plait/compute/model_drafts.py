"""Drafts by a smaller model beside the driver, where they beat those from the text.

Pure: no thread, no clock. Whoever owns the model is asked for one id at a time (``Ask``) and
answers later; meanwhile the driver goes on. While a traversal is under way, the model
drafts on behind what was sent, so that right drafts cost no time. Whether to wait for more of
them, and how many, follows the expected gain: their acceptance lately, and what a drafted id
costs against the time of a traversal, both measured.
"""

from collections.abc import Callable, Sequence

from plait.compute.drafts import LENGTH_MAX, Acceptance, AdaptiveDrafter, Took

ROWS_MAX = 256
"""Ids that the model is given at once: so a long prompt of one session delays others little."""
_PRIOR = 0.6
_COST_GUESS = 0.2  # of a traversal: an id drafted, until measured
_GAIN_MIN = 1.04
_RECENT = 0.2  # weight of the newest time

Answered = Callable[[int | None, float], None]
"""Takes the id that follows, or None if the model failed, and the milliseconds it took."""
Ask = Callable[[int, tuple[int, ...], Answered], None]
"""Feed ids from a position on, which overwrites what was there; answer what follows them."""


class ModelDrafts:
    """What a model says comes next, kept as far ahead of the sequence as ``want`` asks."""

    def __init__(self, prompt_ids: Sequence[int], ask: Ask, ready: Callable[[], None]) -> None:
        """``ready`` is called when as many ids as wanted are ahead, or no more will come."""
        self.ahead: list[int] = []
        self.failed = False
        self.id_ms: float | None = None
        """What an id takes; None until it is known."""
        self._ids = list(prompt_ids)
        self._ask = ask
        self._ready = ready
        self._cached = 0
        """Positions that the model has computed with the ids that now stand there."""
        self._asked: tuple[int, ...] | None = None
        self._wanted = 0

    def want(self, count: int) -> None:
        """Keep so many ids ahead."""
        self._wanted = count
        self._go_on()

    def extend(self, ids: Sequence[int]) -> None:
        """These ids came; what was ahead stays if it begins with them."""
        for token in ids:
            if self.ahead and self.ahead[0] == token:
                self.ahead.pop(0)
            else:
                self.ahead.clear()
                self._cached = min(self._cached, len(self._ids))
            self._ids.append(token)

    def _go_on(self) -> None:
        if self._asked is not None or self.failed or len(self.ahead) >= self._wanted:
            return
        rows = (*self._ids, *self.ahead)[self._cached : self._cached + ROWS_MAX]
        first, self._asked = self._cached, rows
        self._ask(first, rows, lambda token, took_ms: self._take(first, rows, token, took_ms))

    def _take(self, first: int, rows: tuple[int, ...], token: int | None, took_ms: float) -> None:
        self._asked = None
        if token is None:
            self.failed = True
            self.ahead.clear()
            self._ready()
            return
        if len(rows) == 1:
            before_ms = took_ms if self.id_ms is None else self.id_ms
            self.id_ms = before_ms + _RECENT * (took_ms - before_ms)
        known = (*self._ids, *self.ahead)
        right = _common(known[first:], rows)
        # Ids may have come meanwhile that are not those fed, or those before: all is void then.
        if self._cached >= first:
            self._cached = first + right
            if self._cached == len(known) and right == len(rows):
                self.ahead.append(token)
            # To know what follows, the last id at least is fed again.
            self._cached = min(self._cached, len(self._ids) + len(self.ahead) - 1)
        if len(self.ahead) >= self._wanted:
            self._ready()
        self._go_on()


class PairedDrafter:
    """A driver's drafter that has a model beside the n-grams, and takes whichever gains more.

    ``propose`` gives None while it waits for the model; ``ready`` is called once it is worth
    asking again. If the model fails, n-grams go on alone.
    """

    def __init__(self, prompt_ids: Sequence[int], ask: Ask, ready: Callable[[], None]) -> None:
        self._text = AdaptiveDrafter(prompt_ids)
        self._model = ModelDrafts(prompt_ids, ask, ready)
        self._acceptance = Acceptance(_PRIOR)
        self._by_model = False
        self._awaited = 0
        self._model.want(1)  # computes the prompt while the pipeline does

    def extend(self, ids: Sequence[int]) -> None:
        """Learn what was drawn."""
        self._awaited = 0
        self._text.extend(ids)
        self._model.extend(ids)

    def propose(self, most: int) -> tuple[int, ...] | None:
        """Up to ``most`` ids that may follow; None: not yet."""
        model = self._model
        from_text, text_gain = self._text.offer(most)
        count, gain = self._best(most)
        self._by_model = bool(count) and gain > text_gain
        if not self._by_model:
            self._awaited = 0
            return from_text
        if count > len(model.ahead) and not self._awaited:
            self._awaited = count
            model.want(count)
            if self._awaited > len(model.ahead) and not model.failed:
                return None
        drafts = tuple(model.ahead[: self._awaited or count])
        self._awaited = 0
        # The id behind right drafts, and then as many drafts again.
        model.want(2 * len(drafts) + 1)
        return drafts

    def late(self) -> tuple[int, ...]:
        """What there is, when nobody can wait any longer."""
        drafts = tuple(self._model.ahead[: self._awaited])
        self._by_model, self._awaited = bool(drafts), 0
        return drafts

    def observe(self, proposed: int, accepted: int, took: Took | None = None) -> None:
        """Learn how many of the last proposal were drawn, and how long the traversal took."""
        if self._by_model and proposed:
            self._acceptance.record(min(proposed, accepted + 1), accepted)
        else:
            self._acceptance.fade()  # so that it is tried again when the text has changed
        from_text = 0 if self._by_model else proposed
        self._text.observe(from_text, min(accepted, from_text), None)
        self._text.observe_time(1 + proposed, took)

    def _best(self, most: int) -> tuple[int, float]:
        """(how many ids of the model's, the gain expected) by what rows and waiting cost."""
        traversal_ms, row_cost = self._text.traversal_ms, self._text.row_cost
        if not traversal_ms or self._model.failed:
            return 0, 0.0
        id_ms = self._model.id_ms
        id_cost = _COST_GUESS if id_ms is None else id_ms / traversal_ms
        ready = len(self._model.ahead)
        best, best_gain = 0, _GAIN_MIN
        tokens, chance = 1.0, 1.0
        for count in range(1, min(most, LENGTH_MAX) + 1):
            chance *= self._acceptance.rate
            tokens += chance
            gain = tokens / (1 + row_cost * count + id_cost * max(0, count - ready))
            if gain > best_gain:
                best, best_gain = count, gain
        return best, best_gain


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Ids at the beginning that two sequences share."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
