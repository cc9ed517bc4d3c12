"""``/v1/embeddings``: one vector per input, as numbers or as base64 of little-endian floats."""

import asyncio
import base64
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.responses import Response

from plait.client import Embedding
from plait.errors import PlaitError, SessionLost
from plait.gateway.answering import Desk, too_many
from plait.gateway.budgets import Key
from plait.gateway.config import GatewayConfig
from plait.gateway.failure import invalid, json_response, refused
from plait.gateway.headers import headers_of
from plait.gateway.key_store import Spent
from plait.gateway.orders import Job, max_tokens, options_of, text_ids
from plait.gateway.port import Ask, Upstream
from plait.gateway.requests import EmbeddingRequest, texts_of
from plait.gateway.running import Events
from plait.gateway.shelf import Shelved
from plait.gateway.till import Till, permitted
from plait.task_scope import TaskScope
from plait.types import Sampling

_AT_ONCE = 4
"""Inputs of one request that are computed at the same time."""


async def embeddings(
    request: EmbeddingRequest, model: Shelved, desk: Desk, key: Key | None
) -> Response:
    """The response; raises ``ApiError`` or ``PlaitError``. What was computed is charged."""
    jobs = permitted(await _jobs(request, model, desk.config), key)
    till = Till(desk.cashier, desk.shares, key, desk.upstream)
    at_once = min(len(jobs), _AT_ONCE, desk.config.sessions_max)
    place = desk.in_progress.enter(Events(jobs), at_once)
    if place is None:
        raise too_many(desk.in_progress)
    found, errors = dict[int, Embedding](), list[PlaitError]()
    try:
        async with asyncio.timeout(desk.config.request_timeout_s):
            await place.open.wait()
            desk.count_sessions()
            held = await till.open(jobs)
            await _embed_all(desk.upstream, held, at_once, found, errors)
    finally:
        desk.in_progress.leave(place)
        spent = _spent(jobs, found, errors)
        till.close(spent)
        _note(desk, model.name, spent)
    return _response(request, model, jobs, found)


async def _jobs(request: EmbeddingRequest, model: Shelved, config: GatewayConfig) -> list[Job]:
    if request.dimensions is not None:
        raise refused("dimensions", "embeddings cannot be shortened: leave out dimensions")
    texts = texts_of(request.input, "input")
    if len(texts) > config.answers_max:
        raise invalid("input", f"more than {config.answers_max} inputs in one request")
    options = replace(options_of(1, request.provider, None), reuse=False)
    jobs = []
    for index, text in enumerate(texts):
        ids = await text_ids(model, text, "input")
        max_tokens(len(ids), None, model, config, "input")
        ask = Ask(model=model.name, prompt_ids=ids, sampling=Sampling(), options=options)
        jobs.append(Job(index=index, choice=0, model=model, ask=ask))
    return jobs


async def _embed_all(
    upstream: Upstream,
    jobs: list[Job],
    at_once: int,
    found: dict[int, Embedding],
    errors: list[PlaitError],
) -> None:
    waiting = iter(jobs)

    async def work() -> None:
        for job in waiting:
            if errors:
                return
            try:
                found[job.index] = await upstream.embed(job.ask)
            except PlaitError as error:
                # Noted, not raised: what the others compute meanwhile is paid for.
                errors.append(error)

    async with TaskScope() as tasks:
        for worker in [tasks.create_task(work()) for _ in range(at_once)]:
            await worker
    if errors:
        raise errors[0]


def _spent(
    jobs: list[Job], found: dict[int, Embedding], errors: Sequence[PlaitError] = ()
) -> Spent:
    prompt = sum(job.prompt_tokens for job in jobs if job.index in found)
    lost = sum(error.cost_microcredits for error in errors if isinstance(error, SessionLost))
    cost = lost + sum(one.answer.cost_microcredits for one in found.values())
    return Spent(prompt, len(found), cost)


def _note(desk: Desk, model: str, spent: Spent) -> None:
    desk.count_sessions()
    desk.metrics.add_spend(model, spent)


def _response(
    request: EmbeddingRequest, model: Shelved, jobs: list[Job], found: dict[int, Embedding]
) -> Response:
    spent = _spent(jobs, found)
    tokens = {"prompt_tokens": spent.prompt_tokens, "total_tokens": spent.prompt_tokens}
    body: dict[str, Any] = {
        "object": "list",
        "model": model.name,
        "data": [
            {
                "object": "embedding",
                "index": job.index,
                "embedding": _written(request, found[job.index].values),
            }
            for job in jobs
        ],
        "usage": tokens | {"cost": spent.cost},
    }
    return json_response(
        body, headers=headers_of([one.answer for one in found.values()], spent.cost)
    )


def _written(request: EmbeddingRequest, vector: Sequence[float]) -> list[float] | str:
    if request.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
