"""What a stage keeps of prompts, for the client that sent them and for nobody else. No IO.

The tenant is the session's client, as the peer port authenticated it. A stage says at Open
how much of a prompt it holds; the client says at Confirm where it starts. Once the prompt
is computed its full pages are published, and at Close those of prompt and answer.
"""

from collections.abc import Sequence

from plait.compute.pages import HASH_BYTES, PAGE_TOKENS
from plait.compute.port import StageCompute
from plait.errors import RemoteProtocolError
from plait.node.sessions import StageSession


def check_names(names: Sequence[bytes], tokens: int) -> None:
    """Raise ``RemoteProtocolError`` unless these may name pages of so many tokens."""
    if len(names) * PAGE_TOKENS > tokens:
        raise RemoteProtocolError(f"{len(names)} pages are named of {tokens} tokens")
    if any(len(name) != HASH_BYTES for name in names):
        raise RemoteProtocolError(f"the name of a page is {HASH_BYTES} bytes")


class Prefixes:
    """One stage's dealings with its cache; ``keep_alive_s_max`` is the longest it keeps any."""

    def __init__(self, compute: StageCompute, keep_alive_s_max: int) -> None:
        self._compute = compute
        self._keep_alive_s_max = keep_alive_s_max

    def adopt(self, session: StageSession, names: Sequence[bytes]) -> None:
        """Look for the prompt's pages, which ``check_names`` has passed.

        Only a session's first epoch starts from them: whoever enters later is rebuilt.
        """
        session.prefix = tuple(names)
        if names and session.terms.epoch == 1:
            session.reusable = self._compute.adopt_prefix(session.id, _tenant(session), names)

    def publish_prompt(self, session: StageSession) -> None:
        """Publish the prompt's pages, once they are all computed and nothing is under way."""
        if not session.prefix or session.prompt_rows_left or session.frames_queued:
            return
        self._compute.publish_prefix(session.id, _tenant(session), session.prefix)
        session.prefix = ()

    def publish_all(self, session: StageSession, names: Sequence[bytes], keep_alive_s: int) -> None:
        """A session ends well: publish what it has computed of the pages named."""
        computed = tuple(names)[: session.positions // PAGE_TOKENS]
        if not computed or session.frames_queued or session.books is None:
            return
        keep_ms = min(keep_alive_s, self._keep_alive_s_max) * 1000
        self._compute.publish_prefix(session.id, _tenant(session), computed, keep_ms)


def _tenant(session: StageSession) -> str:
    # What crossed the hops in another format led to other keys and values.
    return f"{session.terms.client} {session.terms.wire_dtype}"
