"""How fast one stage with all layers computes: by dtype, threads and sessions at once.

Engines take turns within a round, and rounds repeat, so that what else the machine does
meets all alike. Compare figures of one run only. llama.cpp joins in where the package
``llama_cpp`` is installed. How good a dtype is, ``quality.py`` measures.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from plait.compute import llama_cpp_peer
from plait.compute.llama_cpp_peer import LlamaCpp
from plait.compute.load import load_stage
from plait.compute.port import Work
from plait.compute.stage import TorchStage
from plait.model.local import LocalModel
from plait.types import Sampling, SessionId, Span

PROMPT_ROWS = 64
PREFILL_ROWS = 256
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to measure: every combination, ``rounds`` times, each with ``steps`` decode steps
    of one session, or fewer of many."""

    dtypes: Sequence[str] = ("fp32", "bf16", "int4", "int8")
    threads: Sequence[int] = (1, 2)
    batches: Sequence[int] = (1, 4, 16)
    rounds: int = 5
    steps: int = 6

    def steps_of(self, batch: int) -> int:
        """Decode steps in a round; two at least."""
        return max(2, 2 * self.steps // (batch + 1))


@dataclass(frozen=True, slots=True)
class DecodeFigure:
    """One decode step of ``batch`` sessions; ``token`` is the step divided by them."""

    dtype: str
    threads: int
    batch: int
    step_ms_median: float
    step_ms_min: float
    token_ms_median: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class PrefillFigure:
    """Prompt tokens per second of one session, ``rows`` at once."""

    dtype: str
    threads: int
    rows: int
    tokens_per_s_median: float
    tokens_per_s_max: float


@dataclass(frozen=True, slots=True)
class ComputeFigures:
    """The outcome of ``measure_compute``."""

    model: str
    torch: str
    rounds: int
    steps: int
    decode: tuple[DecodeFigure, ...]
    prefill: tuple[PrefillFigure, ...]
    load_s: dict[str, float]


class _Engine(Protocol):
    batches: Sequence[int]

    def prefill_s(self) -> float:
        """Seconds of ``PREFILL_ROWS`` rows."""

    def decode_s(self, batch: int, steps: int) -> list[float]:
        """Seconds of each of ``steps`` steps of one token per session."""


Progress = Callable[[int, int], None]
"""Called with (rounds measured, rounds to measure)."""


def measure_compute(
    local: LocalModel, plan: BenchPlan, progress: Progress = lambda done, total: None
) -> ComputeFigures:
    """Measure; minutes. Raises ``ConfigError`` for a dtype that does not exist."""
    engines: dict[int, dict[str, _Engine]] = {}
    load_s: dict[str, float] = {}
    for threads in plan.threads:  # each its own, as some kernels are loaded for a number
        engines[threads] = _stages(local, plan, threads, load_s)
        if llama_cpp_peer.is_installed():
            engines[threads][LLAMA_CPP] = _LlamaCppEngine(local, plan.batches, threads)
    decode: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    prefill: dict[tuple[str, int], list[float]] = defaultdict(list)
    for turn in range(plan.rounds):
        for threads in plan.threads:
            torch.set_num_threads(threads)
            for name, engine in engines[threads].items():
                prefill[name, threads].append(engine.prefill_s())
                for batch in engine.batches:
                    decode[name, threads, batch] += engine.decode_s(batch, plan.steps_of(batch))
        progress(turn + 1, plan.rounds)
    return ComputeFigures(
        model=local.name,
        torch=torch.__version__,
        rounds=plan.rounds,
        steps=plan.steps,
        decode=tuple(_decode_figure(*key, steps) for key, steps in decode.items()),
        prefill=tuple(_prefill_figure(*key, times) for key, times in prefill.items()),
        load_s=load_s,
    )


def _stages(
    local: LocalModel, plan: BenchPlan, threads: int, load_s: dict[str, float]
) -> dict[str, _Engine]:
    found: dict[str, _Engine] = {}
    for dtype in plan.dtypes:
        started = time.perf_counter()
        stage = load_stage(local, Span(0, local.manifest.layers), dtype, threads)
        load_s[dtype] = round(time.perf_counter() - started, 2)
        found[dtype] = _StageEngine(stage, plan.batches, PROMPT_ROWS + max(2, plan.steps))
    return found


def _decode_figure(dtype: str, threads: int, batch: int, steps_s: list[float]) -> DecodeFigure:
    step_ms = median(steps_s) * 1e3
    return DecodeFigure(
        dtype=dtype,
        threads=threads,
        batch=batch,
        step_ms_median=round(step_ms, 2),
        step_ms_min=round(min(steps_s) * 1e3, 2),
        token_ms_median=round(step_ms / batch, 2),
        tokens_per_s=round(batch * 1e3 / step_ms, 1),
    )


def _prefill_figure(dtype: str, threads: int, times_s: list[float]) -> PrefillFigure:
    return PrefillFigure(
        dtype=dtype,
        threads=threads,
        rows=PREFILL_ROWS,
        tokens_per_s_median=round(PREFILL_ROWS / median(times_s), 1),
        tokens_per_s_max=round(PREFILL_ROWS / min(times_s), 1),
    )


class _StageEngine:
    """Our own stage; its sessions hold their prompts for all rounds."""

    def __init__(self, stage: TorchStage, batches: Sequence[int], tokens: int) -> None:
        self.batches = batches
        self._stage = stage
        self._sessions = [SessionId(index.to_bytes(16, "big")) for index in range(max(batches))]
        for session in self._sessions:
            stage.reserve(session, tokens, Sampling())
            self._step([Work(session, 0, tuple(range(PROMPT_ROWS)), None)])

    def prefill_s(self) -> float:
        session = SessionId(b"plait/benchmark!")
        self._stage.reserve(session, PREFILL_ROWS, Sampling())
        try:
            return self._step([Work(session, 0, tuple(range(PREFILL_ROWS)), None, sample=True)])
        finally:
            self._stage.free(session)

    def decode_s(self, batch: int, steps: int) -> list[float]:
        return [
            self._step(
                [
                    Work(session, PROMPT_ROWS + step, (step,), None, sample=True)
                    for session in self._sessions[:batch]
                ]
            )
            for step in range(steps)
        ]

    def _step(self, works: Sequence[Work]) -> float:
        started = time.perf_counter()
        outcomes = self._stage.step(works)
        elapsed_s = time.perf_counter() - started
        for done in outcomes:
            if done.error is not None:
                raise done.error
        return elapsed_s


class _LlamaCppEngine:
    """llama.cpp on the same file."""

    def __init__(self, local: LocalModel, batches: Sequence[int], threads: int) -> None:
        self.batches = batches
        self._peer = LlamaCpp(local.weights_path, max(batches), threads)
        for sequence in range(max(batches)):
            self._peer.prefill_s(sequence, range(PROMPT_ROWS))

    def prefill_s(self) -> float:
        seconds = self._peer.prefill_s(0, range(PREFILL_ROWS))
        self._peer.prefill_s(0, range(PROMPT_ROWS))
        return seconds

    def decode_s(self, batch: int, steps: int) -> list[float]:
        return [self._peer.step_s(PROMPT_ROWS + step, [step] * batch) for step in range(steps)]
