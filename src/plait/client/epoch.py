"""What a session is asked to do, and what each of its epochs leaves behind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from plait.client.actions import ConfirmStage
from plait.client.driver import Accounting, SendFrame
from plait.client.prefix import Reuse, Warm
from plait.client.reroute import stage_terms
from plait.identity import SigningKey
from plait.ledger.certs import NOTHING_REVOKED
from plait.ledger.client_books import EpochEvidence
from plait.ledger.terms import SessionTerms
from plait.network_file import Authority
from plait.router.plan import Plan
from plait.router.request import RouteRequest
from plait.router.view import Offer
from plait.router.wire_choice import choose_wire
from plait.types import ModelShape, PeerId, Qos, Sampling, SessionId, Span, WireDtype
from plait.v1.identity_pb2 import SignedEnvelope

RESERVATION_TTL_MS_MIN = 300_000
RESERVATION_TTL_MS_MAX = 12 * 3_600_000
"""Credit stays set aside for as long, if a stage vanishes without releasing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """Who asks and pays, on which network; ``revoked`` tells which certificates are void."""

    network_id: str
    authorities: tuple[Authority, ...]
    peer: PeerId
    ledger_key: SigningKey
    revoked: Callable[[], Mapping[PeerId, int]] = lambda: NOTHING_REVOKED


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked: token ids in, at most ``route.max_tokens`` out.

    If a stage is lost and nobody can take its place, the session waits ``replica_wait_ms``
    for one before it gives up. ``embed`` asks for the prompt's final hidden state, too,
    ``score`` for the log-probabilities of the prompt's ids.
    ``sub_account`` is the share of the client's account that pays; empty: none.
    ``wire`` None leaves it to the route what crosses its hops.
    ``reuse`` says what may be kept of the session for later ones; None: nothing, and nothing
    that was kept is used. ``warm`` are stages that may have the prompt's beginning.
    """

    model: ModelShape
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    route: RouteRequest
    vocabulary_size: int
    manifest: bytes
    want_bundle: bool
    embed: bool = False
    score: bool = False
    qos: Qos = "standard"
    wire: WireDtype | None = None
    replica_wait_ms: int = 20_000
    sub_account: str = ""
    may_audit: bool = True
    """Not where the user chose the peers: an auditor sees what crossed a stage."""
    reuse: Reuse | None = None
    warm: Warm | None = None
    accounting: Accounting = field(default_factory=Accounting)

    @property
    def prefix(self) -> tuple[bytes, ...]:
        """Names of the prompt's pages to use if a stage has them kept.

        There are none where the prompt is to be scored: every position must be computed.
        """
        if self.reuse is None or self.score:
            return ()
        return self.reuse.names(self.prompt_ids)


@dataclass(slots=True)
class Epoch:
    """One pipeline of a session; ``evidence`` is set once it is closed.

    ``plan`` is what the router chose it by; a stage that stayed keeps the offer it came with.
    """

    terms: SessionTerms
    opening: SignedEnvelope
    offers: tuple[Offer, ...]
    plan: Plan
    certs: tuple[SignedEnvelope, ...] = ()
    reservation: SignedEnvelope | None = None
    grant: SignedEnvelope | None = None
    frames: tuple[SendFrame, ...] = ()
    evidence: EpochEvidence | None = None

    @property
    def number(self) -> int:
        """1 for the first."""
        return self.terms.epoch

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The stages' peers, in order."""
        return tuple(stage.peer for stage in self.terms.stages)

    @property
    def stages(self) -> tuple[tuple[Span, PeerId], ...]:
        """Who runs which layers."""
        return tuple((stage.span, stage.peer) for stage in self.terms.stages)

    @property
    def entered(self) -> tuple[PeerId, ...]:
        """The stages that are new in this epoch."""
        return tuple(
            stage.peer for stage in self.terms.stages if stage.entered_epoch == self.terms.epoch
        )

    @property
    def expected_us(self) -> list[float]:
        """Each stage's decode step by its own offer, for its part of the offered span."""
        model = self.plan.model
        return [
            offer.decode_us * stage.priced_layers / model.priced_layers(offer.span)
            for stage, offer in zip(self.terms.stages, self.offers, strict=True)
        ]

    def confirmations(
        self, voucher: SignedEnvelope | None, cached_tokens: int = 0
    ) -> list[ConfirmStage]:
        """What makes each stage ready: credit for those that enter, the best voucher for others.

        The prompt's first ``cached_tokens`` are in every stage's cache.
        """
        entered, ends = set(self.entered), (self.peers[0], self.peers[-1])
        return [
            ConfirmStage(
                self.number,
                peer,
                self.reservation if peer in entered else None,
                self.grant if peer in entered else None,
                None if peer in entered else voucher,
                cached_tokens=cached_tokens,
                link=peer in ends,
            )
            for peer in self.peers
        ]

    def incarnation(self, peer: PeerId) -> int:
        """Of the offer a stage came with; 0 for a peer that is not in the route."""
        return next((offer.incarnation for offer in self.offers if offer.peer == peer), 0)


def first_terms(
    order: Order, party: Party, chosen: Plan, entropy: Callable[[int], bytes]
) -> SessionTerms:
    """The terms of a new session; ``entropy`` gives its id and salt.

    Raises ``ConfigError`` for a wire dtype that the route's stages do not take.
    """
    return SessionTerms(
        network_id=party.network_id,
        session_id=SessionId(entropy(16)),
        epoch=1,
        client=party.peer,
        client_ledger_key=party.ledger_key.public,
        model_digest=order.model.digest,
        stages=tuple(stage_terms(stage) for stage in chosen.stages),
        prompt_tokens=len(order.prompt_ids),
        max_tokens=order.route.max_tokens,
        chunk_tokens=order.accounting.chunk_tokens,
        prefill_chunk_tokens=order.accounting.prefill_chunk_tokens,
        handoff_salt=entropy(32),
        qos=order.qos,
        wire_dtype=choose_wire(chosen, order.wire),
    )


def session_ms_max(chosen: Plan) -> int:
    """How long the session may take: three times the prediction, and some minutes."""
    predicted = chosen.predicted
    predicted_s = predicted.ttft_s + predicted.tpot_s * chosen.request.max_tokens
    return min(RESERVATION_TTL_MS_MIN + round(3_000 * predicted_s), RESERVATION_TTL_MS_MAX)
