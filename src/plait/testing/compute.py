"""A stage that computes by hashing: deterministic, instant, without torch or weights.

Each layer keeps, per position, the hash of its previous position's hash and the incoming
row. So outputs depend on every earlier position and layer, as in a transformer, splitting
the model changes nothing, and rewriting a position changes all that follows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from plait.compute.admission import check_work
from plait.compute.pages import PAGE_TOKENS
from plait.compute.port import Done, Drawn, Hidden, PrefixUse, Scored, Work, draw_with_drafts
from plait.errors import CapacityError, LocalProtocolError, PlaitError
from plait.types import Digest, ModelShape, Sampling, SessionId, Span

WIDTH = 16
VOCABULARY_SIZE = 256
PREFIX_PAGES_MAX = 64

FAKE_SHAPE = ModelShape(
    name="fake", digest=Digest(bytes(32)), layers=4, head_cost_layers=1, bytes_per_row=4 * WIDTH
)


class _Session:
    def __init__(self, span: Span, tokens: int, sampling: Sampling) -> None:
        self.span = span
        self.tokens = tokens
        self.sampling = sampling
        self.hashes: list[list[bytes]] = [[] for _ in range(len(span))]


class FakeStage:
    """``StageCompute`` for tests.

    ``draws`` forces the token at a position (an end token, say); otherwise it is a hash
    of all before it and, unless greedy, of the seed. Faults are injected with ``fail_next``.
    """

    def __init__(
        self,
        span: Span,
        shape: ModelShape = FAKE_SHAPE,
        *,
        kv_tokens_total: int = 4096,
        draws: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.span = span
        self.shape = shape
        self.width = WIDTH
        self.kv_tokens_total = kv_tokens_total
        self.batches: list[int] = []
        """Sizes of the batches stepped so far."""
        self._draws = draws
        self._sessions: dict[SessionId, _Session] = {}
        self._faults: dict[SessionId, Exception] = {}
        self._prefixes: dict[tuple[str, Span, bytes], list[list[bytes]]] = {}

    @property
    def device(self) -> str:
        """Where a fake computes."""
        return "cpu"

    @property
    def kv_bytes_total(self) -> int:
        """Some bytes a token."""
        return self.kv_tokens_total * WIDTH * 4

    @property
    def kv_tokens_free(self) -> int:
        """Tokens not reserved."""
        return self.kv_tokens_total - sum(held.tokens for held in self._sessions.values())

    def reserve(
        self,
        session: SessionId,
        tokens: int,
        sampling: Sampling,
        span: Span | None = None,
        context_ids: Sequence[int] = (),
        prompt_tokens: int = 0,
    ) -> None:
        """Hold ``tokens`` positions. Raises ``CapacityError``."""
        earlier = self._sessions.get(session)
        if tokens > self.kv_tokens_free + (earlier.tokens if earlier else 0):
            raise CapacityError(f"{tokens} tokens asked for, {self.kv_tokens_free} free")
        if earlier is None:
            self._sessions[session] = _Session(span or self.span, tokens, sampling)
        else:
            earlier.tokens, earlier.sampling = max(tokens, earlier.tokens), sampling

    def free(self, session: SessionId) -> None:
        """Forget a session; nothing happens if it is unknown."""
        self._sessions.pop(session, None)

    def adopt_prefix(self, session: SessionId, tenant: str, hashes: Sequence[bytes]) -> int:
        """Start with the pages that the tenant published."""
        held = self._known(session)
        for name in hashes:
            page = self._prefixes.get((tenant, held.span, name))
            if page is None or len(held.hashes[0]) + PAGE_TOKENS > held.tokens:
                break
            for layer, known in zip(held.hashes, page, strict=True):
                layer.extend(known)
        return len(held.hashes[0])

    def publish_prefix(
        self, session: SessionId, tenant: str, hashes: Sequence[bytes], keep_ms: int = 0
    ) -> None:
        """Keep the session's first pages for the tenant; the oldest go when there are many."""
        held = self._known(session)
        if len(hashes) * PAGE_TOKENS > len(held.hashes[0]):
            raise LocalProtocolError("a prefix that is not cached cannot be published")
        for index, name in enumerate(hashes):
            at = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
            self._prefixes[tenant, held.span, name] = [layer[at] for layer in held.hashes]
        while len(self._prefixes) > PREFIX_PAGES_MAX:
            del self._prefixes[next(iter(self._prefixes))]

    def park_prefixes(self) -> None:
        """There is no disk."""

    @property
    def prefixes(self) -> PrefixUse:
        """What is published."""
        return PrefixUse(len(self._prefixes) * PAGE_TOKENS)

    def _known(self, session: SessionId) -> _Session:
        held = self._sessions.get(session)
        if held is None:
            raise LocalProtocolError(f"session {session.hex()} holds no KV pages")
        return held

    def fail_next(self, session: SessionId, error: Exception) -> None:
        """Make the session's next step end in ``error``."""
        self._faults[session] = error

    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Compute each item; a fault stays with its item."""
        self.batches.append(len(batch))
        return [self._outcome(work) for work in batch]

    def numeric_class(self) -> str:
        """Always the same: hashes are exact."""
        return f"{self.shape.digest.hex()[:16]}/fake"

    def measure(self) -> tuple[int, int]:
        """Invented times: 100 µs a decode step, 10 µs a prompt token."""
        return 100, 10

    def _outcome(self, work: Work) -> Done:
        fault = self._faults.pop(work.session, None)
        if fault is not None:
            return Done(error=fault)
        try:
            return self._compute(work)
        except PlaitError as error:
            return Done(error=error)

    def _compute(self, work: Work) -> Done:
        session = self._known(work.session)
        check_work(
            work,
            first_stage=session.span.start == 0,
            width=WIDTH,
            vocabulary_size=VOCABULARY_SIZE,
            cached=len(session.hashes[0]),
            reserved=session.tokens,
        )
        rows = _rows(work)
        for index, hashes in enumerate(session.hashes):
            del hashes[work.first_position :]
            for row in rows:
                previous = hashes[-1] if hashes else b""
                label = (session.span.start + index).to_bytes(4, "big")
                hashes.append(hashlib.sha256(label + previous + row).digest())
            rows = hashes[work.first_position :]
        if session.span.end < self.shape.layers:
            return Done(hidden=_hidden(rows))
        scored = _scored(work, rows, session.sampling.top_logprobs)
        if not work.sample:
            return Done(hidden=_hidden(rows), scored=scored)
        drawn = self._drawn(work, rows, session.sampling)
        return Done(hidden=_hidden(rows), drawn=drawn, scored=scored)

    def _drawn(self, work: Work, rows: Sequence[bytes], sampling: Sampling) -> Drawn:
        seed = b"" if sampling.greedy else sampling.seed.to_bytes(8, "big")
        before = work.rows - len(work.drafts)
        ids: list[int] = []

        def draw(index: int) -> int:
            hashed = hashlib.sha256(rows[before - 1 + index] + seed).digest()[0]
            ids.append(self._draws.get(work.first_position + before + index, hashed))
            return ids[-1]

        if work.claimed:
            right = [draw(index) for index in range(len(work.claimed))]
            wrong = zip(work.claimed, right, strict=True)
            margins = tuple(float(a != b) for a, b in wrong)
            count = len(right)
            return Drawn(work.claimed, (-1.0,) * count, (), (0.0,) * count, margins)
        draw_with_drafts(work.drafts, sampling.end_ids, draw)
        embedding = tuple(_hidden(rows[-1:])[0].tolist()) if work.embedding else ()
        count = len(ids)
        return Drawn(tuple(ids), (-1.0,) * count, totals=(0.0,) * count, embedding=embedding)


def _scored(work: Work, rows: Sequence[bytes], tops: int) -> Scored:
    """A function of all before an id and the id itself."""
    logprobs = tuple(
        -hashlib.sha256(row + token.to_bytes(4, "big")).digest()[0] / 16
        for row, token in zip(rows, work.scored, strict=False)
    )
    pairs = zip(work.scored, logprobs, strict=True)
    return Scored(logprobs, tuple(((token, value),) for token, value in pairs) if tops else ())


def _rows(work: Work) -> list[bytes]:
    if work.ids is not None:
        return [token.to_bytes(4, "big") for token in work.ids]
    assert work.hidden is not None  # check_work saw to it
    return [row.tobytes() for row in work.hidden.clip(0, 65535).astype("<u2")]


def _hidden(rows: Sequence[bytes]) -> Hidden:
    """Each 32-byte hash as 16 floats that hold 16-bit integers."""
    return np.frombuffer(b"".join(rows), "<u2").reshape(-1, WIDTH).astype(np.float32)
