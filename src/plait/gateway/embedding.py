"""``/v1/embeddings``: one vector per input, as numbers or as base64 of little-endian floats."""

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Any

from plait.gateway.config import GatewayConfig
from plait.gateway.failure import invalid, refused
from plait.gateway.orders import max_tokens, text_ids
from plait.gateway.port import Upstream
from plait.gateway.requests import EmbeddingRequest, texts_of
from plait.gateway.shelf import Shelved


async def embeddings(
    request: EmbeddingRequest, model: Shelved, upstream: Upstream, config: GatewayConfig
) -> dict[str, Any]:
    """The response; raises ``ApiError``, ``NotServed`` or ``PlaitError``."""
    if request.dimensions is not None:
        raise refused("dimensions", "embeddings cannot be shortened: leave out dimensions")
    texts = texts_of(request.input, "input")
    if len(texts) > config.answers_max:
        raise invalid("input", f"more than {config.answers_max} inputs in one request")
    inputs = [await text_ids(model, text, "input") for text in texts]
    for ids in inputs:
        max_tokens(len(ids), None, model, config, "input")
    async with asyncio.timeout(config.request_timeout_s):
        vectors = [await upstream.embed(model.name, ids) for ids in inputs]
    count = sum(map(len, inputs))
    return {
        "object": "list",
        "model": model.name,
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(request, vector)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _written(request: EmbeddingRequest, vector: Sequence[float]) -> list[float] | str:
    if request.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
