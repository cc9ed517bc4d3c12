"""Stages that lie, for tests and benchmarks of audits. Nothing of this is in a real node.

Each wraps an honest torch stage of the fp32 class and claims its numeric class. As a
testnet's supervisor, with one liar among the hosts of the span that starts at LAYER, whose
process id is then in the file MARK:

    python -m plait.testing.dishonest CHEAT LAYER MARK DIRECTORY …
"""

import copy
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import plait.compute.load
from plait.compute.layers import TorchLayer
from plait.compute.linear import Fp32Linear, Linear
from plait.compute.load import load_stage
from plait.compute.port import Done, Work
from plait.compute.stage import TorchStage
from plait.model.local import LocalModel
from plait.types import Sampling, SessionId, Span

CHUNK_TOKENS = 32


class Dishonest:
    """A stage that is honest but for what a subclass changes."""

    def __init__(self, honest: TorchStage) -> None:
        self.honest = honest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.honest, name)

    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Compute, more or less."""
        return self.honest.step(batch)


class OtherWeights(Dishonest):
    """Claims the class of one stage and computes with another."""

    def __init__(self, honest: TorchStage, used: TorchStage) -> None:
        super().__init__(used)
        self._claimed = honest.numeric_class()

    def numeric_class(self) -> str:
        """The class of the honest stage."""
        return self._claimed


class CopiesInput(Dishonest):
    """Sends on what it received, as if its layers did nothing."""

    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Compute for the cache's sake, and send the neighbour's output."""
        done = self.honest.step(batch)
        return [
            one if one.drawn is not None else replace(one, hidden=work.hidden)
            for work, one in zip(batch, done, strict=True)
        ]


class OtherSeed(Dishonest):
    """Draws with another seed than the client asked for."""

    def reserve(
        self,
        session: SessionId,
        tokens: int,
        sampling: Sampling,
        span: Span | None = None,
        context_ids: Sequence[int] = (),
        prompt_tokens: int = 0,
    ) -> None:
        """Hold pages, and forget the seed."""
        other = replace(sampling, seed=sampling.seed ^ 1)
        self.honest.reserve(session, tokens, other, span, context_ids, prompt_tokens)


class OtherPrompt(Dishonest):
    """Feeds other ids than it was given at the start: another template, another system prompt."""

    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Compute from changed ids."""
        return self.honest.step([self._changed(work) for work in batch])

    def _changed(self, work: Work) -> Work:
        if work.ids is None or work.first_position > 0:
            return work
        return replace(
            work, ids=tuple(token ^ 1 if i < 3 else token for i, token in enumerate(work.ids))
        )


class Sometimes(Dishonest):
    """Lies in one chunk of ``period``, and is honest in the others."""

    def __init__(self, honest: TorchStage, lying: TorchStage, period: int = 10) -> None:
        super().__init__(honest)
        self._lying, self._period = lying, period

    def reserve(self, *arguments: Any) -> None:
        """Hold pages in both."""
        self.honest.reserve(*arguments)
        self._lying.reserve(*arguments)

    def free(self, session: SessionId) -> None:
        """Free both."""
        self.honest.free(session)
        self._lying.free(session)

    def step(self, batch: Sequence[Work]) -> list[Done]:
        """Both caches go on; which answer counts depends on the position."""
        honest, lying = self.honest.step(batch), self._lying.step(batch)
        return [
            b if work.first_position // CHUNK_TOKENS % self._period == 1 else a
            for work, a, b in zip(batch, honest, lying, strict=True)
        ]


class _Nothing:
    """A matrix of zeros."""

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Linear.rows``."""
        return torch.zeros(len(rows), self._outputs)

    item = rows


def skips_layer(honest: TorchStage) -> TorchStage:
    """The same stage without the layer in its middle."""
    nothing = _Nothing(honest.width)
    return _with_middle(honest, attention_output=nothing, down=nothing)


def changes_matrix(honest: TorchStage) -> TorchStage:
    """The same stage with one matrix 1 % off."""
    model: Any = honest._model
    layer: TorchLayer = model._layers[len(model._layers) // 2]
    return _with_middle(honest, down=_off(layer.down, model.config.feed_forward_size))


def changes_head(honest: TorchStage) -> TorchStage:
    """The same stage with the head's matrix 1 % off: the hidden states are right."""
    model: Any = copy.copy(honest._model)
    model._head = _off(model._head, honest.width)
    return _sharing(honest, model)


def _off(matrix: Linear, inputs: int) -> Linear:
    """The matrix with 1 % of noise."""
    weight = matrix.rows(torch.eye(inputs)).t().contiguous()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return Fp32Linear(weight + 0.01 * weight.square().mean().sqrt() * noise)


def _with_middle(honest: TorchStage, **changes: Linear) -> TorchStage:
    """The same stage with other matrices in the layer in its middle."""
    model: Any = copy.copy(honest._model)
    layers = list(model._layers)
    layers[len(layers) // 2] = replace(layers[len(layers) // 2], **changes)
    model._layers = layers
    return _sharing(honest, model)


def _sharing(honest: TorchStage, model: Any) -> TorchStage:
    """A stage with its own cache; all weights that are not changed are shared."""
    return TorchStage(
        model,
        honest.shape,
        kv_tokens_max=honest.kv_tokens_total,
        threads=honest._threads,
        vocabulary=honest._vocabulary,
    )


def _int8(honest: TorchStage, local: LocalModel) -> Dishonest:
    threads = honest._threads
    return OtherWeights(honest, load_stage(local, honest.span, "int8", threads))


CHEATS: dict[str, Callable[[TorchStage, LocalModel], Any]] = {
    "int8": _int8,
    "skipped-layer": lambda honest, _: skips_layer(honest),
    "matrix": lambda honest, _: changes_matrix(honest),
    "head": lambda honest, _: changes_head(honest),
    "copied-output": lambda honest, _: CopiesInput(honest),
    "seed": lambda honest, _: OtherSeed(honest),
    "prompt": lambda honest, _: OtherPrompt(honest),
    "sometimes": lambda honest, _: Sometimes(honest, skips_layer(honest)),
}


def main() -> int:
    """Start a testnet's supervisor, of whose nodes one cheats; see the module's docstring."""
    cheat, layer, mark = CHEATS[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])
    del sys.argv[1:4]

    def lying_stage(local: LocalModel, span: Span, *arguments: Any, **options: Any) -> Any:
        honest = load_stage(local, span, *arguments, **options)
        if span.start != layer:
            return honest
        try:
            with mark.open("x") as file:  # the first of them, in whatever process
                file.write(str(os.getpid()))
        except FileExistsError:
            return honest
        return cheat(honest, local)

    plait.compute.load.load_stage = lying_stage
    from plait.testnet.supervisor import main as supervise

    return supervise()


if __name__ == "__main__":
    sys.exit(main())
