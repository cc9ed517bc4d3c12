"""What a session takes from earlier ones, and leaves for later ones. Pure.

Every stage says how many positions of the prompt it holds; the session starts behind the
fewest of them, and always feeds the prompt's last token, whose row draws the first one.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plait.compute.pages import PAGE_TOKENS, prefix_hashes
from plait.ledger.terms import SessionTerms
from plait.types import PeerId, Span

PAGES_MAX = 8_192
"""Pages of earlier sessions of which a client remembers who had them."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """``salt`` keeps those apart whom one client serves: each finds only its own.

    Stages are asked to keep prompt and answer for ``keep_alive_s``, even if they need their
    room; without, for as long as there is room.
    """

    salt: bytes = b""
    keep_alive_s: int = 0

    def names(self, ids: Sequence[int]) -> tuple[bytes, ...]:
        """The names of the full pages of ``ids``."""
        return prefix_hashes(ids, self.salt)


def agreed_start(reusable_tokens: Iterable[int], terms: SessionTerms) -> int:
    """The first position to feed, if the stages hold so many each: whole pages.

    It is 0 where cached tokens cost more than others: nobody asked for that.
    """
    if any(stage.prices.cached_prompt > stage.prices.prompt for stage in terms.stages):
        return 0
    most = min(terms.prompt_tokens - 1, *reusable_tokens)
    return most - most % PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Warm:
    """Stages that served the beginning of a prompt before, and how many tokens that is."""

    stages: tuple[tuple[Span, PeerId], ...]
    tokens: int


class WarmRoutes:
    """Which stages a client's last sessions had. It asks nobody: only it can know."""

    def __init__(self) -> None:
        self._routes: OrderedDict[bytes, tuple[tuple[Span, PeerId], ...]] = OrderedDict()

    def note(self, names: Sequence[bytes], stages: tuple[tuple[Span, PeerId], ...]) -> None:
        """A session ended whose prompt and answer have pages of these names."""
        for name in names:
            self._routes[name] = stages
            self._routes.move_to_end(name)
        while len(self._routes) > PAGES_MAX:
            self._routes.popitem(last=False)

    def find(self, names: Sequence[bytes]) -> Warm | None:
        """Who served the longest part of a prompt whose pages have these names."""
        for count in range(len(names), 0, -1):
            stages = self._routes.get(names[count - 1])
            if stages is not None:
                return Warm(stages, count * PAGE_TOKENS)
        return None
