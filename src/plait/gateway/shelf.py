"""The models that this machine can tokenize for, and which of them the network serves now."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from plait.client import Options
from plait.errors import ModelError, NetworkError, PlaitError, RouteError
from plait.gateway.port import Upstream
from plait.model import catalog
from plait.model.gguf_reader import GgufFile
from plait.model.local import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.router.plan import Plan
from plait.types import MILLION, TokenCounts

_NAME_SHOWN_MAX = 64


@dataclass(frozen=True, slots=True)
class Shelved:
    """A model with its tokenizer."""

    local: LocalModel
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """The model's name in the catalogue."""
        return self.local.name

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.local.manifest.context_length


@dataclass(slots=True)
class Shelf:
    """Loads models when first asked for; ``upstream`` knows who serves them."""

    upstream: Upstream
    _models: dict[str, Shelved] = field(default_factory=dict)

    async def get(self, name: str) -> Shelved:
        """A model by name; raises ``ModelError`` if it is unknown or not on this machine."""
        if not catalog.exists(name):
            served = ", ".join(ready for ready, _ in self.ready()) or "none"
            shown = name if len(name) <= _NAME_SHOWN_MAX else name[:_NAME_SHOWN_MAX] + "…"
            raise ModelError(f"there is no model {shown!r}; served now: {served}")
        if name not in self._models:
            # Building a tokenizer takes 0.2 s, in which other answers must go on.
            self._models[name] = await asyncio.to_thread(_load, name)
        return self._models[name]

    async def get_or_default(self, name: str | None) -> Shelved:
        """A model by name, or the first that the network serves; raises ``ModelError``."""
        if name is not None:
            return await self.get(name)
        for ready, _ in self.ready():
            return await self.get(ready)
        raise ModelError("no model is served now: name one", remedy="plait models ls")

    def ready(self) -> list[tuple[str, Plan]]:
        """Models with a complete pipeline now, each with the best one."""
        served = {offer.model_digest.hex() for offer in self.upstream.view().offers.values()}
        found = []
        for name in catalog.names(hidden=True):
            if catalog.usable(name) and catalog.entry(name).manifest_digest in served:
                try:
                    found.append((name, self.upstream.plan(name, 1, Options(max_tokens=1))))
                except (RouteError, NetworkError, ModelError):
                    continue
        return found

    def describe(self, model: Shelved, plan: Plan, created: int) -> dict[str, Any]:
        """A model as OpenAI lists it, and what Plait adds."""
        shape = model.local.manifest.shape
        offers = [
            offer
            for offer in self.upstream.view().offers.values()
            if offer.model_digest == shape.digest and offer.state == "ready"
        ]
        hosts = [
            sum(offer.span.start <= layer < offer.span.end for offer in offers)
            for layer in range(shape.layers)
        ]
        return {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "plait",
            "context_length": model.context_length,
            "max_model_len": model.context_length,
            "price": {
                "prompt_microcredits_per_million": _price(plan, TokenCounts(prompt=MILLION)),
                "completion_microcredits_per_million": _price(plan, TokenCounts(output=MILLION)),
            },
            "coverage": {
                "layers": shape.layers,
                "hosts": len(offers),
                "hosts_per_layer_min": min(hosts),
            },
            "digest": shape.digest.hex(),
        }


def cost_of(plan: Plan, counts: TokenCounts) -> int:
    """Microcredits that these tokens cost on a route."""
    return _price(plan, counts)


def facts_of(model: Shelved) -> dict[str, Any]:
    """What a remote tokenizer needs to know, from the weights file; blocking."""
    with GgufFile.open(model.local.weights_path) as gguf:
        names = gguf.texts("tokenizer.ggml.tokens")

        def name_of(key: str) -> str | None:
            token = gguf.integer(f"tokenizer.ggml.{key}_token_id", -1)
            return names[token] if 0 <= token < len(names) else None

        end = name_of("eos")
        return {
            "model": model.name,
            "bos_token": name_of("bos"),
            "eos_token": end,
            "pad_token": name_of("padding") or end,
            "chat_template": gguf.text("tokenizer.chat_template", "") or None,
            "add_bos_token": gguf.flag("tokenizer.ggml.add_bos_token", False),
            "end_ids": list(model.tokenizer.end_ids),
            "vocab_size": model.tokenizer.vocabulary_size,
            "max_model_len": model.context_length,
        }


def _price(plan: Plan, counts: TokenCounts) -> int:
    return sum(stage.offer.prices.amount(counts, stage.priced_layers) for stage in plan.stages)


def _load(name: str) -> Shelved:
    try:
        local = catalog.load(name)
    except ModelError:
        raise
    except PlaitError as error:
        raise ModelError(f"{name} cannot be used: {error}", remedy=error.remedy) from error
    return Shelved(local, Tokenizer.load(local))
