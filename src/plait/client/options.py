"""How a request is generated and routed."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import get_args

from plait.client.prefix import Reuse
from plait.errors import ConfigError
from plait.router.request import RouteRequest, Sort
from plait.types import MILLION, Microcredits, PeerId, Qos, Sampling, Span, WireDtype

_WHOLE = (int,), "a whole number"
_NUMBER = (int, float), "a number"
_PEERS = (Set,), "a set of peer ids"
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "max_tokens": _WHOLE,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _WHOLE,
    "seed": _WHOLE,
    "sampling": ((Sampling,), "a Sampling"),
    "max_price": _WHOLE,
    "ttft_s": _NUMBER,
    "tpot_s": _NUMBER,
    "pin": ((tuple,), "a tuple of (span, peer id)"),
    "only": _PEERS,
    "ignore": _PEERS,
    "audited_min": _WHOLE,
    "sub_account": ((str,), "a name"),
    "hedge_share": _NUMBER,
    "replica_wait_s": _NUMBER,
    "tenant": ((str,), "a name"),
    "keep_alive_s": _WHOLE,
}
_OPTIONAL = frozenset({"seed", "sampling", "max_price", "ttft_s", "tpot_s"})
_WORDS: Mapping[str, tuple[str | None, ...]] = {
    "sort": get_args(Sort),
    "qos": get_args(Qos),
    "wire": (None, *get_args(WireDtype)),
}
_WAIT_S_MAX = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to generate and how to route. ``seed`` None draws a fresh one.

    Raises ``ConfigError`` for a value that cannot be.

    ``sampling`` gives every setting of the sampler and replaces temperature, top_p, top_k
    and seed; without end ids it ends where the model ends. ``max_price`` is microcredits for
    the whole request; ``pin`` keeps layers on a peer.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    sampling: Sampling | None = None
    raw: bool = False
    sort: Sort = "latency"
    max_price: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    pin: tuple[tuple[Span, PeerId], ...] = ()
    only: frozenset[PeerId] = frozenset()
    ignore: frozenset[PeerId] = frozenset()
    audited_min: int = 0
    """Use only peers that passed so many audited chunks in this account's own audits."""
    bundle: bool = False
    drafts: bool = True
    """Guess what follows from the text so far: faster where it repeats, never another text."""
    score_prompt: bool = False
    """Also give the log-probability of each of the prompt's tokens (``Answer.prompt_scores``)."""
    qos: Qos = "standard"
    sub_account: str = ""
    """The share of the account whose limits the ledger keeps for this request; empty: none."""
    hedge_share: float = 0.0
    """The share of the client's prompt tokens that may be asked of a second pipeline when the
    first token is late (0 to 1; 0: never). See ``client.hedging``."""
    wire: WireDtype | None = None
    """How activations cross hops; None: fp32 between stages that compute in fp32, else bf16, or
    int8 where a slow link is most of the time."""
    replica_wait_s: float = 20.0
    """How long to wait for a host when a stage is lost and nobody can take its place."""
    reuse: bool = True
    """Start from what the stages still have of earlier prompts and answers of this client, and
    let them keep this one's while they have room."""
    tenant: str = ""
    """For whom this client asks, if it serves several: nothing is shared between them. Empty:
    for who has the sub-account."""
    keep_alive_s: int = 0
    """Have prompt and answer kept so long even if the stages need their room, for the next
    turn of a conversation. Each stage has its own limit."""

    def __post_init__(self) -> None:
        for name, (kinds, what) in _KINDS.items():
            value = getattr(self, name)
            optional = name in _OPTIONAL and value is None
            if not optional and not isinstance(value, kinds):
                raise ConfigError(f"{name} is {what}, not {value!r}")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                known = ", ".join(str(word) for word in words)
                raise ConfigError(f"there is no {name} {getattr(self, name)!r}", remedy=known)
        if not 0 <= self.replica_wait_s < _WAIT_S_MAX:
            raise ConfigError("replica_wait_s is a number of seconds")
        self.route_request(1)
        self.reusing()
        self.drawing(())

    def route_request(self, prompt_tokens: int) -> RouteRequest:
        """The router's part of the options; raises ``ConfigError`` for one out of range."""
        if self.max_tokens < 1:
            raise ConfigError("max_tokens must be at least 1")
        if not 0 <= self.hedge_share <= 1:
            raise ConfigError("hedge_share must be from 0 to 1")
        try:
            return RouteRequest(
                prompt_tokens=prompt_tokens,
                max_tokens=self.max_tokens,
                max_price=None if self.max_price is None else Microcredits(self.max_price),
                ttft_s=self.ttft_s,
                tpot_s=self.tpot_s,
                sort=self.sort,
                pin=self.pin,
                only=self.only,
                ignore=self.ignore,
                wire=self.wire,
            )
        except ValueError as error:
            raise ConfigError(f"bad routing option: {error}") from error

    def reusing(self) -> Reuse | None:
        """What may be kept; raises ``ConfigError`` for a time that cannot be."""
        if not 0 <= self.keep_alive_s < 2**31:
            raise ConfigError("keep_alive_s is a number of seconds")
        if not self.reuse:
            return None
        return Reuse(
            hashlib.sha256((self.tenant or self.sub_account).encode()).digest(), self.keep_alive_s
        )

    def drawing(self, end_ids: Sequence[int]) -> Sampling:
        """The last stage's part; raises ``ConfigError`` for a value out of range."""
        if self.sampling is not None:
            return replace(self.sampling, end_ids=self.sampling.end_ids or tuple(end_ids))
        try:
            return Sampling(
                temperature_micros=round(self.temperature * MILLION),
                top_p_micros=round(self.top_p * MILLION),
                top_k=self.top_k,
                seed=secrets.randbits(63) if self.seed is None else self.seed,
                end_ids=tuple(end_ids),
            )
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"bad sampling: {error}") from error
