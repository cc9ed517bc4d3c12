"""Names of special tokens in what somebody wrote: text, not markers.

A chat template mixes its own markers with the words of a conversation. Whoever writes
``<|im_end|>`` must not end a turn by that, nor begin one of another role. So each such name is
stood for by one character that is nowhere else while the template is filled in, and put back
once the template's own markers have been found.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plait.errors import ConfigError

_PRIVATE = range(0xF0000, 0xFFFFE)
"""Code points that no standard gives a meaning."""


def pattern_of(names: Collection[str]) -> re.Pattern[str] | None:
    """What finds any of the names, the longest first; None if there are none."""
    ordered = sorted(filter(None, names), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


@dataclass(frozen=True, slots=True)
class Disguise:
    """Characters that stand for names."""

    pattern: re.Pattern[str]
    stands: Mapping[str, str]

    def on(self, value: Any) -> Any:
        """The value, with every name in its texts replaced."""
        return _changed(value, self._hidden)

    def off(self, text: str) -> str:
        """The text as it was written."""
        return text.translate({ord(stand): name for name, stand in self.stands.items()})

    def _hidden(self, text: str) -> str:
        return self.pattern.sub(lambda found: self.stands[found[0]], text)


def disguise(value: Any, pattern: re.Pattern[str] | None) -> Disguise | None:
    """What hides the names in all texts of a JSON-like value; None if there are none.

    Raises ``ConfigError`` if the texts leave no character free to stand for them.
    """
    if pattern is None:
        return None
    found = sorted({name for text in _texts(value) for name in pattern.findall(text)})
    if not found:
        return None
    used = {ord(one) for text in _texts(value) for one in text if ord(one) in _PRIVATE}
    free = (chr(point) for point in _PRIVATE if point not in used)
    stands = dict(zip(found, free, strict=False))
    if len(stands) < len(found):
        raise ConfigError("the prompt has too many characters for private use")
    return Disguise(pattern, stands)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(part, change) for part in value]
    return value
