"""The drafting model on its thread: a tiny model drafts for itself, and for nobody else."""

import asyncio

import pytest

from plait.client.drafting import DraftModel
from plait.compute.drafts import Took
from plait.model import catalog
from plait.task_scope import TaskScope
from plait.types import Sampling

pytestmark = pytest.mark.slow

PROMPT = (40, 41, 42, 43)


@pytest.fixture(autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))


def test_a_model_drafts_what_it_would_draw_itself() -> None:
    async def drafts(sampling: Sampling) -> tuple[tuple[int, ...], tuple[int, ...]]:
        local = catalog.pull("tiny-random")
        async with TaskScope() as tasks:
            model = await DraftModel.load(local, tasks.create_task)
            assert model.fits(local)
            known = await first_ids(model, PROMPT, 6, sampling)
            again = await first_ids(model, (*PROMPT, *known[:2]), 4, sampling)
            model.close()
        return known, again

    for sampling in (Sampling(), Sampling(temperature_micros=900_000, seed=5)):
        known, again = asyncio.run(drafts(sampling))
        assert len(known) == 6
        assert again == known[2:]


async def first_ids(
    model: DraftModel, prompt: tuple[int, ...], count: int, sampling: Sampling
) -> tuple[int, ...]:
    """What the model drafts behind a prompt, all of it accepted, as if drafting cost nothing."""
    ready = asyncio.Event()
    drafter, end = model.drafter(prompt, 32, sampling, ready.set)
    found: tuple[int, ...] = ()
    while len(found) < count:
        drafter.observe(0, 0, Took(1e9))
        while (drafts := drafter.propose(1)) is None:
            ready.clear()
            await ready.wait()
        found += drafts
        drafter.extend(drafts)
    end()
    return found


def test_a_model_that_cannot_compute_ends_the_drafts_and_nothing_else() -> None:
    async def drafts() -> tuple[int, ...] | None:
        async with TaskScope() as tasks:
            model = await DraftModel.load(catalog.pull("tiny-random"), tasks.create_task)
            ready = asyncio.Event()
            drafter, end = model.drafter((1, 10**6), 32, Sampling(), ready.set)
            await ready.wait()
            drafter.observe(0, 0, Took(1e9))
            end()
            model.close()
            return drafter.propose(4)

    assert asyncio.run(drafts()) == ()
