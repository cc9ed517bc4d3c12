"""The torch backend: one span, one KV cache, items computed one after the other."""

import time
from collections.abc import Sequence
from statistics import median

import torch

from plait.compute.admission import check_work
from plait.compute.hf import SpanModel
from plait.compute.kv import KvCache, SessionKv
from plait.compute.port import Done, Drawn, Work
from plait.compute.sampling import draw
from plait.errors import LocalProtocolError, PlaitError, RemoteProtocolError
from plait.types import ModelShape, Sampling, SessionId, Span

_MEASURE_SESSION = SessionId(b"plait/measuring!")
_MEASURE_PREFILL_ROWS = 64
_MEASURE_DECODE_STEPS = 5


class TorchStage:
    """``StageCompute`` over a cut transformers model; made by ``load_stage``."""

    def __init__(
        self, model: SpanModel, shape: ModelShape, *, kv_tokens_max: int, threads: int
    ) -> None:
        self._model = model
        self._shape = shape
        self._threads = threads
        self._kv = KvCache(model.layout, kv_tokens_max)

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
    def kv_tokens_total(self) -> int:
        """Capacity of the KV cache in tokens."""
        return self._kv.tokens_total

    @property
    def kv_tokens_free(self) -> int:
        """Tokens not reserved."""
        return self._kv.tokens_free

    def reserve(
        self, session: SessionId, tokens: int, sampling: Sampling, span: Span | None = None
    ) -> None:
        """Hold room for ``tokens`` positions; see ``StageCompute.reserve``."""
        if span is not None and not self.span.contains(span):
            raise LocalProtocolError(f"layers {span} are not among {self.span}")
        context = self._model.config.context_length
        if not 0 < tokens <= context:
            raise RemoteProtocolError(f"a session of {tokens} tokens; the model takes {context}")
        self._kv.reserve(session, tokens, sampling, span)

    def free(self, session: SessionId) -> None:
        """Forget a session; nothing happens if it is unknown."""
        self._kv.free(session)

    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Compute each item; a fault stays with its item."""
        return [self._outcome(work) for work in batch]

    def numeric_class(self) -> str:
        """Weights / dtype / kernels / wire dtype / threads."""
        return f"{self._shape.digest.hex()[:16]}/fp32/torch-sdpa/f32/t{self._threads}"

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
        done = self._outcome(Work(_MEASURE_SESSION, position, ids, hidden, sample=True))
        if done.error is not None:
            raise done.error
        return (time.perf_counter() - started) * 1e6

    def _outcome(self, work: Work) -> Done:
        try:
            return self._compute(work)
        except (PlaitError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError
            return Done(error=error)

    @torch.inference_mode()
    def _compute(self, work: Work) -> Done:
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
        output = self._model.forward(self._input(work), work.first_position, kv)
        done = self._result(work, output[0], kv)
        kv.length = work.first_position + work.rows
        return done

    def _input(self, work: Work) -> torch.Tensor:
        if work.ids is not None:
            return self._model.embed(work.ids)
        # A copy: bytes off the wire are read-only, which torch does not take.
        return torch.tensor(work.hidden)[None]

    def _result(self, work: Work, output: torch.Tensor, kv: SessionKv) -> Done:
        if kv.span.end != self._shape.layers:
            return Done(hidden=output.contiguous().numpy())
        if not work.sample:
            return Done()
        logits = self._model.logits(output[-1]).numpy()
        token, logprob = draw(logits, kv.sampling, work.first_position + work.rows)
        return Done(drawn=Drawn((token,), (logprob,)))
