"""What ``plait bench pipeline`` and ``plait bench batch`` measure, on testnets of this machine.

Everything is real: node processes, links, receipts. llama.cpp takes its turn on the same
file where the package ``llama_cpp`` is installed. Compare figures of one run only.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from plait.client import AsyncClient, Client, Options
from plait.errors import DeadlineExceeded
from plait.model import catalog
from plait.testing.testnets import Testnet, running_testnet

PROMPT = "Explain in a few sentences why the sky is blue and sunsets are red."
_PEER_PROMPT_ROWS = 64
_TOGETHER_S_MAX = 60.0
"""For so long at most one batch is waited for: what has not answered then is an error."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PipelineFigures:
    """Milliseconds per token through 1 and several stages, round by round, and their
    paired difference: the pipeline's tax."""

    model: str
    dtype: str
    stages: int
    tokens: int
    tpot_ms_one_stage: list[float]
    tpot_ms_stages: list[float]
    tax_ms_median: float
    tax_ms_of_minima: float
    same_tokens: bool
    llama_cpp_ms_per_token: list[float]


@dataclass(frozen=True, slots=True)
class BatchFigure:
    """``sessions`` at once: tokens/s of all together while decoding, and with prefill."""

    sessions: int
    decode_tokens_per_s: float
    total_tokens_per_s: float
    llama_cpp_tokens_per_s: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """The outcome of ``measure_batch``; figures are medians over rounds."""

    model: str
    dtype: str
    stages: int
    tokens: int
    rounds: int
    llama_cpp_threads: int
    batches: list[BatchFigure]


def testnet(model: str, stages: int, dtype: str, wan: str = "") -> AbstractContextManager[Testnet]:
    """A testnet of one host per stage that lives as long as the context; ``wan`` is a profile."""
    shape = ("--stages", str(stages), "--replicas", "1", "--dtype", dtype)
    return running_testnet(model, *shape, *(("--wan", wan) if wan else ()))


def measure_pipeline(
    model: str, stages: int, dtype: str, rounds: int, tokens: int, progress: Progress
) -> PipelineFigures:
    """One stage, several, and llama.cpp in turns; minutes."""
    options = Options(max_tokens=tokens)
    one_ms: list[float] = []
    several_ms: list[float] = []
    peer_ms: list[float] = []
    answers: set[tuple[int, ...]] = set()
    with (
        testnet(model, 1, dtype) as one,
        testnet(model, stages, dtype) as several,
        Client(one.network) as one_client,
        Client(several.network) as several_client,
    ):
        clients = ((one_client, one_ms), (several_client, several_ms))
        for client, _ in clients:
            client.generate(model, PROMPT, Options(max_tokens=4))
        for turn in range(rounds):
            for client, times_ms in clients:
                answer = client.generate(model, PROMPT, options)
                times_ms.append(round(answer.tpot_s * 1e3, 2))
                answers.add(answer.token_ids)
            peer_ms += [round(step_s * 1e3, 2) for step_s in _llama_cpp_steps_s(model, 1, 1)]
            progress(turn + 1, rounds)
    taxes = [more - less for less, more in zip(one_ms, several_ms, strict=True)]
    return PipelineFigures(
        model=model,
        dtype=dtype,
        stages=stages,
        tokens=tokens,
        tpot_ms_one_stage=one_ms,
        tpot_ms_stages=several_ms,
        tax_ms_median=round(median(taxes), 2),
        tax_ms_of_minima=round(min(several_ms) - min(one_ms), 2),
        same_tokens=len(answers) == 1,
        llama_cpp_ms_per_token=peer_ms,
    )


def measure_batch(
    model: str,
    stages: int,
    dtype: str,
    batches: Sequence[int],
    rounds: int,
    tokens: int,
    threads: int,
    progress: Progress,
) -> BatchFigures:
    """Many sessions through one pipeline, and llama.cpp with as many, in turns; minutes."""
    decode: dict[int, list[float]] = {sessions: [] for sessions in batches}
    total: dict[int, list[float]] = {sessions: [] for sessions in batches}
    peer: dict[int, list[float]] = {sessions: [] for sessions in batches}
    with testnet(model, stages, dtype) as net:
        for turn in range(rounds):
            for sessions in batches:
                one = _together(net.network, model, sessions, tokens)
                decode_rate, total_rate = asyncio.run(one)
                decode[sessions].append(decode_rate)
                total[sessions].append(total_rate)
                steps_s = _llama_cpp_steps_s(model, sessions, threads)
                peer[sessions] += [sessions / step_s for step_s in steps_s]
            progress(turn + 1, rounds)
    return BatchFigures(
        model=model,
        dtype=dtype,
        stages=stages,
        tokens=tokens,
        rounds=rounds,
        llama_cpp_threads=threads,
        batches=[
            _batch_figure(sessions, decode[sessions], total[sessions], peer[sessions])
            for sessions in batches
        ],
    )


def _batch_figure(
    sessions: int, decode: list[float], total: list[float], peer: list[float]
) -> BatchFigure:
    theirs = round(median(peer), 1) if peer else None
    ours = round(median(decode), 1)
    return BatchFigure(
        sessions=sessions,
        decode_tokens_per_s=ours,
        total_tokens_per_s=round(median(total), 1),
        llama_cpp_tokens_per_s=theirs,
        ratio=round(ours / theirs, 2) if theirs else None,
    )


async def _together(network: Path, model: str, sessions: int, tokens: int) -> tuple[float, float]:
    """(tokens/s of all sessions while they decode, tokens/s with prefill).

    They are of class ``batch``: stages refuse others once a token would take too long.
    Raises ``DeadlineExceeded`` if not all have ended within a minute.
    """
    options = Options(max_tokens=tokens, qos="batch")
    async with AsyncClient(network, audits=False) as client:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(_TOGETHER_S_MAX), asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(client.generate(model, f"{PROMPT} ({index})", options))
                    for index in range(sessions)
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        except TimeoutError as late:
            raise DeadlineExceeded(
                f"{sessions} sessions did not end within {_TOGETHER_S_MAX:.0f} s",
                remedy="--tokens 16, or fewer sessions: --batches 1,4",
            ) from late
        elapsed_s = time.perf_counter() - started
    answers = [task.result() for task in running]
    total = sum(answer.completion_tokens for answer in answers)
    return sum(1 / answer.tpot_s for answer in answers), total / elapsed_s


def _llama_cpp_steps_s(model: str, sequences: int, threads: int) -> list[float]:
    """Seconds of eight steps; none without the package."""
    from plait.compute import llama_cpp_peer

    if not llama_cpp_peer.is_installed():
        return []
    peer = llama_cpp_peer.LlamaCpp(catalog.load(model).weights_path, sequences, threads)
    try:
        for sequence in range(sequences):
            peer.prefill_s(sequence, range(_PEER_PROMPT_ROWS))
        return [peer.step_s(_PEER_PROMPT_ROWS + step, [step] * sequences) for step in range(9)][1:]
    finally:
        peer.close()
