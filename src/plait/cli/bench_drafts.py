"""What ``plait bench draft`` measures: answers with and without drafts, in turns, on a testnet.

Everything is real: node processes, links, receipts; with a delay, each hop goes through our
own forwarder and takes that long one way, S + 1 times a traversal of S stages. Drafts must
not change an answer. Compare figures of one run only.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from plait.cli.bench_network import testnet
from plait.client import Answer, Client, Options
from plait.testnet.control import request

Progress = Callable[[str], None]

_RESAMPLES = 2_000
_CONFIDENCE = 0.95
_WARM_UP_TOKENS = 40

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
_MINUTES = """On Monday the garden club met at the town hall. Mr Ellis reported that the new
greenhouse will open on 3 June. Mrs Okafor asked for more volunteers for the watering plan in July.
The members agreed to buy two rain barrels for 180 euros. The next meeting is on 14 May at seven in
the evening."""
_NOTICE = """The library will be closed from 2 to 9 August because the heating is being replaced.
Books that are due in this week may be returned until 16 August without a fee. The reading room on
the second floor stays open in the mornings. During the works the entrance is on Mill Street."""
_REPORT = """The ferry between the two islands was stopped on Tuesday after a fire in its engine
room. Nobody was hurt. The fifty passengers were taken to the harbour by two fishing boats. The
company said that the ferry will be repaired within ten days and that tickets already bought will
be paid back."""
_PRODUCT = """The lamp has a battery that lasts for twelve hours and is charged by a cable that
comes with it. It can be dimmed in five steps and folds flat for travelling. The foot is made of
recycled aluminium. It weighs 340 grams and is sold in black, white and green."""
_SCIENCE = """Bees tell each other where flowers are by dancing. The direction of the dance shows
the angle to the sun, and its length shows how far the flowers are away. Other bees follow the
dancer closely and feel its movements, since it is dark in the hive. On cloudy days bees see where
the sun is by the polarisation of the light."""
_PROSE = _PROSE.replace("\n", " ")
_SUMMARISED = [_LETTER, _PROSE, _MINUTES, _NOTICE, _REPORT, _PRODUCT, _SCIENCE]

TASKS: Mapping[str, Sequence[str]] = {
    "copy-edit": [
        "Rename the class to BankAccount and leave everything else as it is. "
        f"Repeat the whole code:\n\n```python\n{_CODE}```"
    ],
    "copy-edit-prose": [
        "Correct the spelling mistakes in this text and write out the whole text:"
        f"\n\n{_PROSE.replace('blue light', 'blew light').replace('almost', 'allmost')}"
    ],
    "summarise": [
        "Summarise this text in one or two sentences:\n\n" + text.replace("\n", " ")
        for text in _SUMMARISED
    ],
    "extract": [f"Make a list of the facts in this text:\n\n{_PROSE}"],
    "chat": ["Tell me something nice about an afternoon in the mountains."],
}
"""Prompts of each, put in the model's chat template, of which the rounds take one after the other.
Whether a small model keeps to a text's words when it summarises it, which is all that drafts from
the text live on, may turn on the last bit of a sum: so there are seven of them."""


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
        _warm_up(client, plan)
        for turn in range(plan.rounds):
            for task in plan.tasks:
                prompt = TASKS[task][turn % len(TASKS[task])]
                pair = _pair(client, plan, prompt, drafted_first=bool(turn % 2))
                found[task].append(pair)
                plain, drafted = (1e3 * one.tpot_s for one in pair)
                progress(f"{turn + 1}/{plan.rounds} {task} {plain:.1f} {drafted:.1f} ms")
    return [_figure(task, pairs) for task, pairs in found.items()]


def _warm_up(client: Client, plan: DraftPlan) -> None:
    """Have every prompt cached: below fp32 an answer behind a kept prompt may differ from the one
    behind the same prompt when it was new, which is not what is measured here."""
    for task in plan.tasks:
        for prompt in TASKS[task][: plan.rounds]:
            client.generate(plan.model, prompt, Options(max_tokens=_WARM_UP_TOKENS))


def _pair(
    client: Client, plan: DraftPlan, prompt: str, *, drafted_first: bool
) -> tuple[Answer, Answer]:
    """The answer without drafts and with them."""
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
        tokens=sum(plain.completion_tokens for plain, _ in pairs),
        tokens_per_traversal=round(1 + accepted / traversals, 2) if traversals else 1.0,
        acceptance=round(accepted / max(1, sum(one.drafted for one in counts)), 3),
        plain_tpot_ms=round(median(plain) * 1e3, 2),
        drafted_tpot_ms=round(median(drafted) * 1e3, 2),
        speedup=round(median(ratios), 3),
        low=round(low, 3),
        high=round(high, 3),
        same_tokens=all(plain.token_ids == drafted.token_ids for plain, drafted in pairs),
        plain_ms=[round(value * 1e3, 2) for value in plain],
        drafted_ms=[round(value * 1e3, 2) for value in drafted],
    )


def bootstrap_interval(values: Sequence[float], seed: int = 1) -> tuple[float, float]:
    """The percentile interval of the median of ``values``, by resampling from a seed."""
    draw = random.Random(seed)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    cut = round((1 - _CONFIDENCE) / 2 * (_RESAMPLES - 1))
    return medians[cut], medians[-1 - cut]
