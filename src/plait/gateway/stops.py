"""Stop sequences in a stream of text: nothing of one ever gets out.

Pure. The answer ends where the first stop sequence to be *completed* begins (the longest
of several completed at once), whatever the pieces the text comes in.
"""

from collections.abc import Sequence


class StopFilter:
    """Feed it text; it holds back what may turn out to be a stop sequence."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop sequence must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        self.found: str | None = None
        """The stop sequence that ended the answer."""

    def push(self, text: str) -> str:
        """The text that may go out now; sets ``stopped`` when a stop sequence is complete."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            self.stopped, self._held = True, ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
