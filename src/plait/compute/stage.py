"""The torch backend: one span, one KV cache, the items of a step computed together."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from plait.compute.admission import check_work
from plait.compute.attention import Item
from plait.compute.device_memory import HOST, DeviceMemory
from plait.compute.draw_state import Draw, DrawState
from plait.compute.grammar import Vocabulary
from plait.compute.kv import KvCache, KvLayout
from plait.compute.port import (
    NOT_SCORED,
    Done,
    Drawn,
    PrefixUse,
    Scored,
    Work,
    draw_with_drafts,
)
from plait.compute.sampling import score
from plait.compute.spill import DiskRoom
from plait.errors import LocalProtocolError, PlaitError, RemoteProtocolError
from plait.model.config import ModelConfig
from plait.types import ModelShape, Sampling, SessionId, Span

_MEASURE_SESSION = SessionId(b"plait/measuring!")
_MEASURE_PREFILL_ROWS = 64
_MEASURE_DECODE_STEPS = 5
_SCORED_AT_ONCE = 32
"""Rows whose logits are in memory at a time."""


class SpanCompute(Protocol):
    """The arithmetic of a span: transformers' own, or ours for many items at once."""

    config: ModelConfig
    span: Span
    layout: KvLayout

    @property
    def batches(self) -> bool:
        """Whether ``run`` gains from several items."""

    @property
    def numerics(self) -> str:
        """dtype/kernel."""

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), hidden] for ids in range. Only the first stage can."""

    def run(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """[rows, hidden] of each item, whose sessions differ and run the same span."""

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] for normed rows, [n, hidden]. Only the last stage can."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A work that was admitted; ``index`` is its place in the batch."""

    index: int
    work: Work
    item: Item


class TorchStage:
    """``StageCompute`` over the layers of a span; made by ``load_stage``."""

    def __init__(
        self,
        model: SpanCompute,
        shape: ModelShape,
        *,
        kv_tokens_max: int,
        threads: int,
        vocabulary: Vocabulary | None = None,
        disk: DiskRoom = DiskRoom(),  # noqa: B008 - frozen
        memory: DeviceMemory = HOST,
    ) -> None:
        self._model = model
        self._shape = shape
        self._threads = threads
        self._memory = memory
        self._kv = KvCache(model.layout, kv_tokens_max, disk=disk, device=memory.torch_device)
        self._vocabulary = vocabulary
        self._draws: dict[SessionId, DrawState] = {}

    @property
    def span(self) -> Span:
        """The layers this stage computes."""
        return self._model.span

    @property
    def shape(self) -> ModelShape:
        """The whole model's shape."""
        return self._shape

    @property
    def width(self) -> int:
        """Length of one activation row."""
        return self._model.config.hidden_size

    @property
    def device(self) -> str:
        """Where it computes; see ``StageCompute.device``."""
        return self._memory.device.name

    @property
    def kv_tokens_total(self) -> int:
        """Capacity of the KV cache in tokens."""
        return self._kv.tokens_total

    @property
    def kv_bytes_total(self) -> int:
        """Memory of the whole KV cache."""
        return self._kv.data.nbytes

    @property
    def kv_tokens_free(self) -> int:
        """Tokens not reserved."""
        return self._kv.tokens_free

    def reserve(
        self,
        session: SessionId,
        tokens: int,
        sampling: Sampling,
        span: Span | None = None,
        context_ids: Sequence[int] = (),
        prompt_tokens: int = 0,
    ) -> None:
        """Hold room for ``tokens`` positions; see ``StageCompute.reserve``."""
        if span is not None and not self.span.contains(span):
            raise LocalProtocolError(f"layers {span} are not among {self.span}")
        context = self._model.config.context_length
        if not 0 < tokens <= context:
            raise RemoteProtocolError(f"a session of {tokens} tokens; the model takes {context}")
        self._kv.reserve(session, tokens, sampling, span)
        if (span or self.span).end == self._shape.layers:
            known = self._draws.get(session)
            # A session that goes on here keeps its history, unless it is told a new one.
            if known is None or context_ids or known.sampling != sampling:
                self._draws[session] = DrawState(
                    sampling, context_ids, prompt_tokens, self._vocabulary
                )

    def free(self, session: SessionId) -> None:
        """Forget a session; nothing happens if it is unknown."""
        self._kv.free(session)
        self._draws.pop(session, None)

    def adopt_prefix(self, session: SessionId, tenant: str, hashes: Sequence[bytes]) -> int:
        """Start with cached pages of the tenant; see ``StageCompute.adopt_prefix``."""
        return self._kv.adopt(session, tenant, hashes)

    def publish_prefix(
        self, session: SessionId, tenant: str, hashes: Sequence[bytes], keep_ms: int = 0
    ) -> None:
        """Keep the session's first pages for the tenant; see ``StageCompute``."""
        self._kv.publish(session, tenant, hashes, keep_ms)

    def park_prefixes(self) -> None:
        """Write to disk what is to be kept there; see ``StageCompute``."""
        self._kv.park()

    @property
    def prefixes(self) -> PrefixUse:
        """What published prefixes take."""
        return self._kv.prefixes

    @torch.inference_mode()
    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Compute each item; a fault stays with its item."""
        outcomes: dict[int, Done] = {}
        with self._kv.computing(work.session for work in batch):
            for wave in _waves(batch):
                ready = [one for i, work in wave if (one := self._admit(i, work, outcomes))]
                for together in self._groups(ready):
                    self._compute_all(together, outcomes)
        return [outcomes[index] for index in range(len(batch))]

    def numeric_class(self) -> str:
        """Weights / dtype / kernels / wire dtype / threads, of which an accelerator has none."""
        threads = 0 if self._memory.device.is_accelerator else self._threads
        return f"{self._shape.digest.hex()[:16]}/{self._model.numerics}/f32/t{threads}"

    def measure(self) -> tuple[int, int]:
        """(microseconds of one decode step, microseconds per prompt token), both through
        the whole span and with a short context. Takes a second; needs free KV pages."""
        tokens = _MEASURE_PREFILL_ROWS + _MEASURE_DECODE_STEPS
        self.reserve(_MEASURE_SESSION, tokens, Sampling())
        try:
            self._timed_us(0, 1)  # the first call warms up
            prefill_us = self._timed_us(0, _MEASURE_PREFILL_ROWS)
            decode_us = median(
                self._timed_us(_MEASURE_PREFILL_ROWS + i, 1) for i in range(_MEASURE_DECODE_STEPS)
            )
        finally:
            self.free(_MEASURE_SESSION)
        return max(1, round(decode_us)), max(1, round(prefill_us / _MEASURE_PREFILL_ROWS))

    def _timed_us(self, position: int, rows: int) -> float:
        first = self.span.start == 0
        ids = (0,) * rows if first else None
        hidden = None if first else torch.zeros(rows, self.width).numpy()
        started = time.perf_counter()
        (done,) = self.step([Work(_MEASURE_SESSION, position, ids, hidden, sample=True)])
        if done.error is not None:
            raise done.error
        return (time.perf_counter() - started) * 1e6

    def _admit(self, index: int, work: Work, outcomes: dict[int, Done]) -> _Ready | None:
        """The item to compute, or None and an error among the outcomes."""
        try:
            kv = self._kv.get(work.session)
            if kv is None:
                raise LocalProtocolError(f"session {work.session.hex()} holds no KV pages")
            check_work(
                work,
                first_stage=kv.span.start == 0,
                width=self.width,
                vocabulary_size=self._model.config.vocabulary_size,
                cached=kv.length,
                reserved=kv.tokens,
            )
            kv.prepare(work.first_position, work.rows)
            return _Ready(index, work, Item(self._input(work), work.first_position, kv))
        except (PlaitError, RuntimeError, MemoryError) as error:
            outcomes[index] = Done(error=error)
            return None

    def _groups(self, ready: Sequence[_Ready]) -> Iterable[Sequence[_Ready]]:
        """What can be computed together: sessions that run the same layers."""
        if not self._model.batches:
            return [[one] for one in ready]
        groups: dict[Span, list[_Ready]] = {}
        for one in ready:
            groups.setdefault(one.item.kv.span, []).append(one)
        return groups.values()

    def _compute_all(self, together: Sequence[_Ready], outcomes: dict[int, Done]) -> None:
        """Compute a group; if that fails, each alone, so that the fault finds its item."""
        try:
            results, logits = self._fetched(together)
        except (PlaitError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError
            if len(together) == 1:
                outcomes[together[0].index] = Done(error=error)
                return
            for one in together:
                self._compute_all([one], outcomes)
            return
        for one, result in zip(together, results, strict=True):
            outcomes[one.index] = self._finished(one, result, logits.get(one.index))

    def _fetched(
        self, together: Sequence[_Ready]
    ) -> tuple[Sequence[torch.Tensor], dict[int, torch.Tensor]]:
        """The group's outputs, and logits by index, on the host: here the device is waited for."""
        results = self._model.run([one.item for one in together])
        logits = self._logits(together, results)
        outputs = [result.float() for result in results]
        here = self._memory.fetch([*outputs, *logits.values()])
        return here[: len(results)], dict(zip(logits, here[len(results) :], strict=True))

    def _input(self, work: Work) -> torch.Tensor:
        if work.ids is not None:
            return self._memory.carry(self._model.embed(work.ids))
        assert work.hidden is not None
        # A copy: bytes off the wire are read-only, which torch does not take.
        return self._memory.carry(torch.from_numpy(work.hidden.copy()))

    def _logits(
        self, together: Sequence[_Ready], results: Sequence[torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """By index, logits after the last row, and the one before each draft, of the items
        that draw tokens."""
        drawing = {
            one.index: result[-1 - len(one.work.drafts) :]
            for one, result in zip(together, results, strict=True)
            if one.work.sample and one.item.kv.span.end == self._shape.layers
        }
        if not drawing:
            return {}
        logits = self._model.logits(torch.cat(list(drawing.values())))
        sizes = [len(rows) for rows in drawing.values()]
        return dict(zip(drawing, logits.split(sizes), strict=True))

    def _finished(self, one: _Ready, output: torch.Tensor, logits: torch.Tensor | None) -> Done:
        """Draw if asked to, and only then count the rows as cached."""
        kv, end = one.item.kv, one.work.first_position + one.work.rows
        hidden = output.contiguous().numpy()
        done = Done(hidden)
        if kv.span.end == self._shape.layers:
            try:
                answered = self._answered(one.work, kv.sampling, output, logits)
            except (PlaitError, RuntimeError, MemoryError) as error:
                return Done(error=error)
            done = replace(answered, hidden=hidden)
        kv.length = end
        return done

    def _answered(
        self, work: Work, sampling: Sampling, output: torch.Tensor, logits: torch.Tensor | None
    ) -> Done:
        """What the last stage has to say about a work."""
        scored = self._scored(work, sampling, output) if work.scored else NOT_SCORED
        if logits is None:
            return Done(scored=scored)
        drawn = self._drawn(work, sampling, logits.numpy())
        if work.embedding:
            drawn = replace(drawn, embedding=tuple(output[-1].tolist()))
        return Done(drawn=drawn, scored=scored)

    def _scored(self, work: Work, sampling: Sampling, output: torch.Tensor) -> Scored:
        found = []
        for start in range(0, len(work.scored), _SCORED_AT_ONCE):
            ids = work.scored[start : start + _SCORED_AT_ONCE]
            rows = self._memory.carry(output[start : start + len(ids)])
            (logits,) = self._memory.fetch([self._model.logits(rows)])
            found += [
                score(row, token, sampling.top_logprobs)
                for row, token in zip(logits.numpy(), ids, strict=True)
            ]
        tops = tuple(top for _, top in found) if sampling.top_logprobs else ()
        return Scored(tuple(logprob for logprob, _ in found), tops)

    def _drawn(self, work: Work, sampling: Sampling, logits: npt.NDArray[np.float32]) -> Drawn:
        """Draw from the [drafts + 1, vocabulary] ``logits`` of a work."""
        state = self._draws.get(work.session) or DrawState(sampling)
        position = work.first_position + work.rows - len(work.drafts)
        if work.claimed:
            taken = [
                state.take(logits[index], position + index, token)
                for index, token in enumerate(work.claimed[: len(logits)])
            ]
            return _drawn(taken)
        draws: list[Draw] = []

        def draw(index: int) -> int:
            draws.append(state.draw(logits[index], position + index))
            return draws[-1].token_id

        draw_with_drafts(work.drafts, sampling.end_ids, draw)
        return _drawn(draws)


def _drawn(draws: Sequence[Draw]) -> Drawn:
    return Drawn(
        tuple(drawn.token_id for drawn in draws),
        tuple(drawn.logprob for drawn in draws),
        tuple(drawn.top for drawn in draws if drawn.top),
        tuple(drawn.total for drawn in draws),
        tuple(drawn.margin for drawn in draws),
    )


def _waves(batch: Sequence[Work]) -> Iterable[Sequence[tuple[int, Work]]]:
    """Works in order, each session's later ones in later waves."""
    waves: list[list[tuple[int, Work]]] = []
    turns: dict[SessionId, int] = {}
    for index, work in enumerate(batch):
        turn = turns.get(work.session, 0)
        turns[work.session] = turn + 1
        if turn == len(waves):
            waves.append([])
        waves[turn].append((index, work))
    return waves
