"""What n-gram drafts gain on one stage with all layers, with and without in turns.

Three kinds of text, from one that repeats its prompt to one that does not. The tokens must
be the same with and without. ``tokens_per_traversal`` says what a pipeline would gain: with
D ms of network for a traversal, a token takes (step + D) / tokens per traversal.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from plait.compute.drafts import AdaptiveDrafter
from plait.compute.load import load_stage
from plait.compute.port import Drawn, StageCompute, Work
from plait.errors import LocalProtocolError
from plait.model.local import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.types import Sampling, SessionId, Span

_SESSION = SessionId(b"plait/drafting..")
_CODE = """class Account:
    def __init__(self, owner, balance):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance = self.balance + amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance = self.balance - amount
"""
_PROSE = """The sky looks blue because the air scatters short waves of light more than long
ones. On its way through the air, blue light is thrown from molecule to molecule and reaches
the eye from every side, while red light passes almost straight. At sunset the path through
the air is longer: most of the blue has been scattered out of it before it arrives, and what
is left is orange and red."""
TASKS = {
    "copy-edit": f"{_CODE}\n\n{_CODE.replace('amount', 'value')}\n\nclass Account:\n",
    "summarise": f"Summarise this text in two sentences:\n\n{_PROSE}",
    "chat": "Tell me something nice about an afternoon in the mountains.",
}
_RAW = {"copy-edit"}  # without a chat template: small models copy by example, not when told to


@dataclass(frozen=True, slots=True)
class DraftFigure:
    """One task: ``speedup`` and its range over rounds are drafted over plain tokens/s."""

    task: str
    tokens: int
    tokens_per_traversal: float
    plain_ms_per_token: float
    drafted_ms_per_token: float
    speedup: float
    speedup_min: float
    speedup_max: float
    same_tokens: bool


def measure_drafts(
    local: LocalModel,
    dtype: str = "int4",
    tokens: int = 96,
    rounds: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[DraftFigure]:
    """Measure every task, plain and drafted in turns; minutes."""
    stage = load_stage(local, Span(0, local.manifest.layers), dtype)
    tokenizer = Tokenizer.load(local)
    plain: dict[str, list[_Run]] = {task: [] for task in TASKS}
    drafted: dict[str, list[_Run]] = {task: [] for task in TASKS}
    for turn in range(rounds):
        for task in TASKS:
            prompt = _prompt(tokenizer, task)
            sampling = Sampling(end_ids=() if task in _RAW else tokenizer.end_ids)
            plain[task].append(_run(stage, prompt, tokens, sampling, None))
            drafter = AdaptiveDrafter(prompt)
            drafted[task].append(_run(stage, prompt, tokens, sampling, drafter))
        progress(turn + 1, rounds)
    return [_figure(task, plain[task], drafted[task]) for task in TASKS]


def _prompt(tokenizer: Tokenizer, task: str) -> tuple[int, ...]:
    if task in _RAW:
        return tuple(tokenizer.encode(TASKS[task]))
    return tuple(tokenizer.chat([{"role": "user", "content": TASKS[task]}]))


@dataclass(frozen=True, slots=True)
class _Run:
    ids: tuple[int, ...]
    traversals: int
    decode_s: float


def _figure(task: str, plain: list[_Run], drafted: list[_Run]) -> DraftFigure:
    gains = [one.decode_s / other.decode_s for one, other in zip(plain, drafted, strict=True)]
    decoded = len(plain[0].ids) - 1
    return DraftFigure(
        task=task,
        tokens=len(plain[0].ids),
        tokens_per_traversal=round(decoded / drafted[-1].traversals, 2),
        plain_ms_per_token=round(median(run.decode_s for run in plain) / decoded * 1e3, 2),
        drafted_ms_per_token=round(median(run.decode_s for run in drafted) / decoded * 1e3, 2),
        speedup=round(median(gains), 2),
        speedup_min=round(min(gains), 2),
        speedup_max=round(max(gains), 2),
        same_tokens=len({run.ids for run in [*plain, *drafted]}) == 1,
    )


def _run(
    stage: StageCompute,
    prompt: tuple[int, ...],
    tokens: int,
    sampling: Sampling,
    drafter: AdaptiveDrafter | None,
) -> _Run:
    """At most ``tokens`` greedy tokens, timed after the first."""
    stage.reserve(_SESSION, len(prompt) + tokens + 1, sampling)
    try:
        ids = list(_step(stage, Work(_SESSION, 0, prompt, None, sample=True)).ids)
        drafts: tuple[int, ...] = ()
        traversals = 0
        started = before_s = time.perf_counter()
        if drafter is not None:
            drafter.extend(ids)
        while len(ids) < tokens and ids[-1] not in sampling.end_ids:
            if drafter is not None:
                drafts = drafter.propose(tokens - len(ids) - 1)
            at = len(prompt) + len(ids) - 1
            row_ids = (ids[-1], *drafts)
            drawn = _step(stage, Work(_SESSION, at, row_ids, None, sample=True, drafts=drafts))
            ids += drawn.ids
            traversals += 1
            if drafter is not None:
                now_s = time.perf_counter()
                drafter.extend(drawn.ids)
                drafter.observe(len(drafts), len(drawn.ids) - 1, (now_s - before_s) * 1e3)
                before_s = now_s
        return _Run(tuple(ids), traversals, time.perf_counter() - started)
    finally:
        stage.free(_SESSION)


def _step(stage: StageCompute, work: Work) -> Drawn:
    (done,) = stage.step([work])
    if done.error is not None:
        raise done.error
    if done.drawn is None:
        raise LocalProtocolError("a stage with all layers drew nothing")
    return done.drawn
