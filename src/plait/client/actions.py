"""What a session core is told and what it asks for. Values only.

The shell performs actions in order and reports each outcome as an event with the epoch it
belongs to; a late report of an earlier epoch is dropped by the core.
"""

from dataclasses import dataclass
from typing import Literal

from plait.client.driver import NO_EXTRAS, Extra, Extras, FinishReason, SendFrame
from plait.errors import PlaitError
from plait.ledger.terms import SessionTerms
from plait.router.view import Offer, View
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope

Call = Literal["open", "confirm", "grant", "close-epoch"]

# What the shell reports -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The session may begin."""


@dataclass(frozen=True, slots=True)
class Viewed:
    """What the router sees now."""

    view: View


@dataclass(frozen=True, slots=True)
class StageOpened:
    """A stage holds the session; ``cert`` delegates to the key that signs its receipts."""

    epoch: int
    peer: PeerId
    cert: SignedEnvelope
    reusable_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StageConfirmed:
    """A stage is ready for frames of the epoch."""

    epoch: int
    peer: PeerId


@dataclass(frozen=True, slots=True)
class GrantShown:
    """A stage that started on bounded credit has seen the grant."""

    epoch: int
    peer: PeerId


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A stage refused a call or did not answer; ``gone`` tells the second from the first."""

    epoch: int
    peer: PeerId
    call: Call
    code: str
    reason: str
    gone: bool
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class EpochClosed:
    """A stage froze the epoch. It has computed the positions before ``positions`` and can
    replay its output of those before ``retained``; it received and sent traversals below
    the two numbers."""

    epoch: int
    peer: PeerId
    receipt: SignedEnvelope | None
    positions: int
    retained: int
    traversals_received: int
    traversals_sent: int


@dataclass(frozen=True, slots=True)
class ReservationSigned:
    """The reservation of the epoch is durable and on its way."""

    epoch: int
    reservation: SignedEnvelope


@dataclass(frozen=True, slots=True)
class Granted:
    """The ledger set the credit aside."""

    epoch: int
    grant: SignedEnvelope


@dataclass(frozen=True, slots=True)
class ReserveFailed:
    """The ledger refused, or stayed silent for too long."""

    epoch: int
    error: PlaitError


@dataclass(frozen=True, slots=True)
class Resulted:
    """The last stage answered a frame."""

    epoch: int
    traversal: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    receipts: tuple[SignedEnvelope, ...]
    statement: SignedEnvelope | None
    stage_us: tuple[int, ...] = ()
    extras: Extras = NO_EXTRAS


@dataclass(frozen=True, slots=True)
class Faulted:
    """A stage says that the session cannot go on, and which peer is to blame."""

    epoch: int
    sender: PeerId
    blamed: PeerId
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """Our own stream to a stage ended."""

    epoch: int
    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """The time asked for by ``SetTimer`` has come."""


@dataclass(frozen=True, slots=True)
class Drafted:
    """The drafter, for which the next frame may wait, may be ready."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The user has enough: end the answer, pay for what was delivered."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The user is gone."""


Event = (
    Started
    | Viewed
    | StageOpened
    | StageConfirmed
    | GrantShown
    | StageFailed
    | EpochClosed
    | ReservationSigned
    | Granted
    | ReserveFailed
    | Resulted
    | Faulted
    | LinkLost
    | Ticked
    | Drafted
    | Stopped
    | Cancelled
)

# What the core asks for -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskView:
    """Report ``Viewed``: at once, or with ``when_changed`` after the next change."""

    when_changed: bool = False


@dataclass(frozen=True, slots=True)
class OpenStages:
    """Open the epoch on every stage; each answers ``StageOpened`` or ``StageFailed``."""

    terms: SessionTerms
    opening: SignedEnvelope
    offers: tuple[Offer, ...]
    context_ids: tuple[int, ...]
    timeout_ms: int
    prefix: tuple[bytes, ...] = ()
    """Names of the prompt's full pages; see ``client.prefix``."""

    def neighbours(self, index: int) -> tuple[Offer, ...]:
        """The offers of the stages before and after one."""
        return self.offers[max(index - 1, 0) : index] + self.offers[index + 1 : index + 2]


@dataclass(frozen=True, slots=True)
class Reserve:
    """Sign, make durable and send the reservation of the epoch's entered stages.

    Answered by ``ReservationSigned``, then by ``Granted`` or ``ReserveFailed``.
    """

    terms: SessionTerms
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class ConfirmStage:
    """Make a stage ready; it answers ``StageConfirmed`` or ``StageFailed``."""

    epoch: int
    peer: PeerId
    reservation: SignedEnvelope | None
    grant: SignedEnvelope | None
    voucher: SignedEnvelope | None
    cached_tokens: int
    link: bool
    """Also open our own stream to it: it is the first or the last."""


@dataclass(frozen=True, slots=True)
class ShowGrant:
    """Show a stage that started on bounded credit the grant of the epoch it entered in.

    Answered by ``GrantShown`` or ``StageFailed``.
    """

    epoch: int
    peer: PeerId
    reservation: SignedEnvelope
    grant: SignedEnvelope


@dataclass(frozen=True, slots=True)
class CloseEpoch:
    """Freeze an epoch on these stages; each answers ``EpochClosed`` or ``StageFailed``.

    ``traversal`` is the last one accepted, ``position`` the next one to feed.
    """

    epoch: int
    peers: tuple[PeerId, ...]
    traversal: int | None
    position: int
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Send:
    """Push a frame to the first stage."""

    epoch: int
    frame: SendFrame
    voucher: SignedEnvelope | None
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class LeaveStages:
    """End the session on stages that are in it no more; nothing is reported."""

    epoch: int
    peers: tuple[PeerId, ...]
    voucher: SignedEnvelope | None


@dataclass(frozen=True, slots=True)
class CloseStages:
    """End the session on these stages, as far as they answer.

    Nothing is reported afterwards: neither this nor what is still under way.
    """

    epoch: int
    peers: tuple[PeerId, ...]
    voucher: SignedEnvelope | None
    reason: str
    last: bool = False
    """No more will be asked: the answer is over."""
    only_held: bool = False
    """Nothing ends but holds, which would expire by themselves: nobody waits for it."""
    prefix: tuple[bytes, ...] = ()
    """Names of the full pages of prompt and answer, to be kept for later sessions."""
    keep_alive_s: int = 0


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Report ``Ticked`` at this time; replaces the timer before, None removes it."""

    at_ms: int | None


@dataclass(frozen=True, slots=True)
class Note:
    """Something an operator may want to know; ``down`` peers should leave the view early."""

    event: Literal["rerouting", "rerouted", "waiting", "moving"]
    reason: str
    peers: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Failed:
    """The session is over without an answer."""

    error: PlaitError


Action = (
    AskView
    | OpenStages
    | Reserve
    | ConfirmStage
    | ShowGrant
    | CloseEpoch
    | Send
    | LeaveStages
    | CloseStages
    | SetTimer
    | Extra
    | Note
    | Finished
    | Failed
)
