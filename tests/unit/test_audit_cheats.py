"""Dishonest stages of a real (tiny) model in fp32: an audit exposes each where it can be."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from plait.compute.load import load_stage
from plait.compute.port import StageCompute, Work
from plait.ledger.audit_rules import TOLERANCES, Step, judge
from plait.ledger.handoff import ids_payload
from plait.model import catalog
from plait.model.local import LocalModel
from plait.node.replaying import replay
from plait.node.wire import payload_of, state_of
from plait.testing.dishonest import CHEATS
from plait.testing.reference import equal_spans
from plait.types import MILLION, Sampling, SessionId

STAGES, TOKENS = 3, 12
SESSION, AUDIT = SessionId(b"s" * 16), SessionId(b"a" * 16)
PROMPT = tuple(range(40, 90))
SAMPLED = Sampling(temperature_micros=MILLION, seed=11)
BIASED = Sampling(seed=11, presence_penalty_micros=MILLION // 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        return catalog.load("tiny-random")


@pytest.fixture(scope="module")
def honest(tiny: LocalModel) -> list[Any]:
    torch.set_num_threads(1)
    return [load_stage(tiny, span, "fp32", 1) for span in equal_spans(tiny.manifest.layers, STAGES)]


def frames(stages: Sequence[StageCompute], sampling: Sampling) -> list[list[Step]]:
    """One generation: what each stage received, sent and drew from."""
    steps: list[list[Step]] = [[] for _ in stages]
    for stage in stages:
        stage.reserve(SESSION, len(PROMPT) + TOKENS, sampling, stage.span, PROMPT, len(PROMPT))
    position, ids = 0, PROMPT
    for _ in range(TOKENS):
        work = Work(SESSION, position, ids, None, sample=True)
        for own, stage in zip(steps, stages, strict=True):
            received = ids_payload(ids) if work.hidden is None else payload_of(work.hidden)
            [done] = stage.step([work])
            assert done.error is None
            assert done.hidden is not None
            drawn = done.drawn.ids if done.drawn is not None else ()
            last = done.drawn is not None
            sent = ids_payload(drawn) if last else payload_of(done.hidden)
            rows = len(drawn) if last else work.rows
            state = state_of(done) if last else b""
            own.append(Step(position, work.rows, received, last, 0, rows, sent, state))
            work = Work(SESSION, position, None, done.hidden, sample=True)
        position, ids = position + work.rows, drawn
    for stage in stages:
        stage.free(SESSION)
    return steps


def exposed(auditor: StageCompute, steps: Sequence[Step], sampling: Sampling) -> bool:
    findings = replay(auditor, AUDIT, steps, auditor.span, sampling)
    return judge(findings, TOLERANCES["fp32"]) is not None


@pytest.mark.parametrize("index", range(STAGES))
def test_honest_stages_are_consistent_bit_by_bit(honest: list[Any], index: int) -> None:
    steps = frames(honest, SAMPLED)[index]
    found = replay(honest[index], AUDIT, steps, honest[index].span, SAMPLED)
    assert {one.distance for one in found} == {0.0}
    assert max(one.margin for one in found) < 1e-5


@pytest.mark.parametrize(
    ("cheat", "index"),
    [
        *((cheat, index) for cheat in ("int8", "skipped-layer", "matrix") for index in range(3)),
        ("head", 2),
        ("seed", 2),
        ("prompt", 0),
        ("copied-output", 1),
        ("sometimes", 1),
    ],
)
def test_a_cheat_is_exposed_and_the_stages_beside_it_are_not(
    tiny: LocalModel, honest: list[Any], cheat: str, index: int
) -> None:
    stages = list(honest)
    stages[index] = CHEATS[cheat](honest[index], tiny)
    steps = frames(stages, SAMPLED)
    for other, auditor in enumerate(honest):
        assert exposed(auditor, steps[other], SAMPLED) == (other == index), other


def test_a_whole_opening_cannot_be_replaced_by_silence(honest: list[Any]) -> None:
    steps = frames(honest, SAMPLED)[2]
    for state in (b"", steps[-1].state[:-1], steps[-1].state + bytes(4)):
        short = [*steps[:-1], replace(steps[-1], state=state)]
        assert exposed(honest[2], short, SAMPLED)


def test_penalised_draws_are_judged_by_their_logits(tiny: LocalModel, honest: list[Any]) -> None:
    blind = [
        [replace(step, judge_draws=False) for step in own]
        for own in (
            frames(honest, BIASED)[2],
            frames([*honest[:2], CHEATS["head"](honest[2], tiny)], BIASED)[2],
        )
    ]
    assert [exposed(honest[2], own, Sampling()) for own in blind] == [False, True]
