"""What ``plait bench draft`` measures: answers with and without drafts, in turns, on a testnet.

Everything is real: node processes, links, receipts; with a delay, each hop goes through our
own forwarder and takes that long one way, S + 1 times a traversal of S stages. Drafts must
not change an answer. Compare figures of one run only.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from plait.cli.bench_network import testnet
from plait.client import Answer, Client, Options
from plait.testnet.control import request

Progress = Callable[[str], None]

_RESAMPLES = 2_000
_CONFIDENCE = 0.95

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

    def report(self):
        return "The balance of " + self.owner + " is " + str(self.balance)
"""
_LETTER = """Dear Ms Carter, thank you for your letter of 12 May. We have looked at the invoice and
found that the amount of 240 euros was charged twice. We are sorry for the mistake. The second
amount will be paid back to your account by 30 May. Please write to Tom Baker,
tom.baker@example.com, if you have any questions. Yours sincerely, Anna Weber, Northwind
Trading, Hamburg."""
_PROSE = """The sky looks blue because the air scatters short waves of light more than long
ones. On its way through the air, blue light is thrown from molecule to molecule and reaches
the eye from every side, while red light passes almost straight. At sunset the path through
the air is longer: most of the blue has been scattered out of it before it arrives, and what
is left is orange and red."""
_LETTER = _LETTER.replace("\n", " ")
_PROSE = _PROSE.replace("\n", " ")

TASKS = {
    "copy-edit": "Rename the class to BankAccount and leave everything else as it is. "
    f"Repeat the whole code:\n\n```python\n{_CODE}```",
    "copy-edit-prose": "Correct the spelling mistakes in this text and write out the whole text:"
    f"\n\n{_PROSE.replace('blue light', 'blew light').replace('almost', 'allmost')}",
    "summarise": f"Summarise this letter in one or two sentences:\n\n{_LETTER}",
    "summarise-prose": f"Summarise this text in two sentences:\n\n{_PROSE}",
    "extract": f"Make a list of the facts in this text:\n\n{_PROSE}",
    "chat": "Tell me something nice about an afternoon in the mountains.",
}
"""Prompts, put in the model's chat template. A small model keeps to the letter's words when it
summarises it, and to its own with the prose: the two ends of what drafts from the text give."""


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What to measure: ``rounds`` pairs of answers of at most ``tokens`` for each task.

    ``delay_ms`` is one way, per hop; 0 is loopback without a forwarder. ``draft``
    names a local model that drafts; without it the text alone does.
    """

    model: str
    dtype: str
    stages: int
    delay_ms: float
    rounds: int
    tokens: int
    tasks: tuple[str, ...]
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class DraftFigure:
    """One task. ``speedup`` is the median over pairs of plain over drafted time per token,
    ``low`` and ``high`` its bootstrap interval of 95 %; ``acceptance`` the part of all drafts
    that were right."""

    task: str
    tokens: int
    tokens_per_traversal: float
    acceptance: float
    plain_tpot_ms: float
    drafted_tpot_ms: float
    speedup: float
    low: float
    high: float
    same_tokens: bool
    plain_ms: list[float]
    drafted_ms: list[float]


def measure_drafts(plan: DraftPlan, progress: Progress) -> list[DraftFigure]:
    """Measure every task, plain and drafted in turns; minutes."""
    wan = "lan" if plan.delay_ms else ""
    found: dict[str, list[tuple[Answer, Answer]]] = {task: [] for task in plan.tasks}
    with (
        testnet(plan.model, plan.stages, plan.dtype, wan) as net,
        Client(net.network, audits=False, draft=plan.draft) as client,
    ):
        if plan.delay_ms:
            request(net.directory, "shape", change={"delay_s": plan.delay_ms / 1000})
        for turn in range(1 + plan.rounds):
            for task in plan.tasks:
                pair = _pair(client, plan, task, drafted_first=bool(turn % 2))
                if turn:  # the first round warms up
                    found[task].append(pair)
                    plain, drafted = (1e3 * one.tpot_s for one in pair)
                    progress(f"{turn}/{plan.rounds} {task} {plain:.1f} {drafted:.1f} ms")
    return [_figure(task, pairs) for task, pairs in found.items()]


def _pair(
    client: Client, plan: DraftPlan, task: str, *, drafted_first: bool
) -> tuple[Answer, Answer]:
    """The task's answer without drafts and with them."""
    prompt = TASKS[task]
    plain = Options(max_tokens=plan.tokens, drafts=False)
    drafted = replace(plain, drafts=True)
    turns = (drafted, plain) if drafted_first else (plain, drafted)
    answers = {options.drafts: client.generate(plan.model, prompt, options) for options in turns}
    return answers[False], answers[True]


def _figure(task: str, pairs: Sequence[tuple[Answer, Answer]]) -> DraftFigure:
    plain = [plain.tpot_s for plain, _ in pairs]
    drafted = [drafted.tpot_s for _, drafted in pairs]
    ratios = [slow / fast for slow, fast in zip(plain, drafted, strict=True)]
    low, high = bootstrap_interval(ratios)
    counts = [answer.draft_counts for _, answer in pairs]
    traversals = sum(one.traversals for one in counts)
    accepted = sum(one.accepted for one in counts)
    return DraftFigure(
        task=task,
        tokens=pairs[0][0].completion_tokens,
        tokens_per_traversal=round(1 + accepted / traversals, 2) if traversals else 1.0,
        acceptance=round(accepted / max(1, sum(one.drafted for one in counts)), 3),
        plain_tpot_ms=round(median(plain) * 1e3, 2),
        drafted_tpot_ms=round(median(drafted) * 1e3, 2),
        speedup=round(median(ratios), 3),
        low=round(low, 3),
        high=round(high, 3),
        same_tokens=len({answer.token_ids for pair in pairs for answer in pair}) == 1,
        plain_ms=[round(value * 1e3, 2) for value in plain],
        drafted_ms=[round(value * 1e3, 2) for value in drafted],
    )


def bootstrap_interval(values: Sequence[float], seed: int = 1) -> tuple[float, float]:
    """The percentile interval of the median of ``values``, by resampling from a seed."""
    draw = random.Random(seed)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    cut = round((1 - _CONFIDENCE) / 2 * (_RESAMPLES - 1))
    return medians[cut], medians[-1 - cut]
