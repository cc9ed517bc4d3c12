"""What a generation gives back."""

import html
from dataclasses import asdict, dataclass
from typing import Any, Literal

from plait.client.driver import NO_DRAFTS, DraftCounts, Top
from plait.router.cost import Prediction
from plait.types import Microcredits, PeerId, Span


@dataclass(frozen=True, slots=True)
class RouteStep:
    """One stage of the route taken."""

    peer: PeerId
    span: Span


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A token of the answer as it streams, and the text that it makes complete.

    The text of a token that only begins a character is empty; the last delta may hold text
    that no further token completed. ``logprobs`` has one for each token, as the model gave it
    before any temperature; so has ``top_logprobs``, if the sampling asks for them: (id,
    log-probability) of the likeliest tokens, most likely first.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Top, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """A token, the log-probability that the model gave it, before any temperature, and the
    likeliest tokens in its place, if the sampling asks for them."""

    token_id: int
    logprob: float
    top: Top = ()


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text as a vector: the model's final hidden state at its last token, of length 1.

    ``answer`` has route, cost and evidence: it is the session's one token, which is drawn
    (and paid for) so that the receipts cover the computation.
    """

    values: tuple[float, ...]
    answer: "Answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer with its route, cost and evidence.

    ``token_ids`` excludes the end token; ``bundle`` is the canonical JSON that
    ``plait verify`` checks, None when not asked for. Times are in seconds. ``prompt_scores``
    has one for each token of the prompt but the first, if the options ask for it; no receipt
    covers them. ``end`` is the end token that was drawn, if one was.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    finish_reason: Literal["stop", "length", "ended"]
    """An end token, the limit of tokens, or the client's own wish."""
    route: tuple[RouteStep, ...]
    epochs: int
    ttft_s: float
    tpot_s: float
    predicted: Prediction
    cost_microcredits: Microcredits
    receipts_verified: int
    seed: int
    draft_counts: DraftCounts = NO_DRAFTS
    """Traversals behind the prompt, ids that were guessed, and guesses that were right."""
    cached_tokens: int = 0
    """Of the prompt's tokens, those that every stage still had in its cache."""
    settled: bool = False
    """Whether every stage has presented the last voucher to the ledger."""
    bundle: bytes | None = None
    prompt_scores: tuple[Score, ...] = ()
    end: Score | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens delivered."""
        return len(self.token_ids)

    def to_json(self) -> dict[str, Any]:
        """The object that ``plait run --json`` prints, its ``bundle`` member aside."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reason": self.finish_reason,
            "route": [
                {"peer": step.peer, "start": step.span.start, "end": step.span.end}
                for step in self.route
            ],
            "epochs": self.epochs,
            "ttft_s": round(self.ttft_s, 6),
            "tpot_s": round(self.tpot_s, 6),
            "predicted": {
                "ttft_s": round(self.predicted.ttft_s, 6),
                "tpot_s": round(self.predicted.tpot_s, 6),
                "price_microcredits": self.predicted.price_microcredits,
            },
            "cost_microcredits": self.cost_microcredits,
            "receipts_verified": self.receipts_verified,
            "seed": self.seed,
            "settled": self.settled,
            "drafts": asdict(self.draft_counts),
        }

    def _repr_html_(self) -> str:
        steps = " → ".join(f"{step.peer[-6:]} {step.span}" for step in self.route)
        return (
            f'<div><p style="white-space: pre-wrap">{html.escape(self.text)}</p>'
            f"<p><small>{html.escape(steps)} · "
            f"{self.completion_tokens} tokens · {self.cost_microcredits} microcredits · "
            f"{self.receipts_verified} receipts verified</small></p></div>"
        )
