"""The error tree. Every error a user can meet is one of these.

PlaitError
 ├─ ConfigError                 a flag, file, variable or argument is wrong
 │   └─ BadSampling             sampling values out of range (a ValueError, too)
 ├─ ModelError                  unknown model, corrupt or missing weights
 ├─ NetworkError
 │   ├─ PeerUnreachable         no answer from an address
 │   └─ DeadlineExceeded        an answer came too late
 ├─ ProtocolError
 │   ├─ LocalProtocolError      our own bug
 │   └─ RemoteProtocolError     a peer broke the rules
 ├─ RouteError
 │   └─ NoRoute                 no pipeline satisfies the request
 ├─ CapacityError               a peer is full; try again later
 ├─ LedgerError                 credit is missing or a ledger rule refuses
 ├─ SessionLost                 a session ended before its answer did
 └─ VerificationError
     ├─ BadSignature
     ├─ BadProof
     └─ Overspend

Each class has a stable ``code`` for machines, an ``exit_code`` for shells, and each
instance says what happened (the message) and what to try (``remedy``). A remedy names an option
of a request in back-ticks, as the library spells it: see ``reworded``.
"""

import re
from collections.abc import Callable, Sequence

_OPTION = re.compile(r"`(\w+)`")


class PlaitError(Exception):
    """Base of all errors; ``remedy`` is the one thing to try, possibly empty."""

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class ConfigError(PlaitError):
    """A flag, environment variable or file holds a bad value."""

    code = "config"
    exit_code = 3


class BadSampling(ConfigError, ValueError):
    """A sampler cannot draw with these values."""

    code = "bad-sampling"


class ModelError(PlaitError):
    """A model is unknown, or its weights are missing or corrupt."""

    code = "model"
    exit_code = 4


class NetworkError(PlaitError):
    """The network did not do what was asked."""

    code = "network"
    exit_code = 5


class PeerUnreachable(NetworkError):
    """Nobody answered at an address."""

    code = "peer-unreachable"


class DeadlineExceeded(NetworkError):
    """An answer came too late."""

    code = "deadline"


class ProtocolError(PlaitError):
    """A rule of the protocol was broken."""

    code = "protocol"
    exit_code = 6


class LocalProtocolError(ProtocolError):
    """We broke a rule: a bug of ours, never a reason to blame a peer."""

    code = "protocol-local"


class RemoteProtocolError(ProtocolError):
    """A peer broke a rule. ``peer`` is its id where known."""

    code = "protocol-remote"

    def __init__(self, message: str, *, peer: str = "", remedy: str = "") -> None:
        super().__init__(f"{peer}: {message}" if peer else message, remedy=remedy)
        self.peer = peer


class RouteError(PlaitError):
    """The router could not serve the request."""

    code = "route"
    exit_code = 7


class NoRoute(RouteError):
    """No pipeline satisfies the request.

    ``missing`` names the layers without a host, as half-open ranges; empty when a bound
    (price, pin, …) is what failed. ``cheapest`` is the lowest possible price in
    microcredits when the price bound is what failed. ``options`` are the request's own that no
    route keeps, as ``client.Options`` spells them: asking again in a moment does not help.
    """

    code = "no-route"

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[tuple[int, int]] = (),
        cheapest: int | None = None,
        options: Sequence[str] = (),
        remedy: str = "",
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.missing = tuple(missing)
        self.cheapest = cheapest
        self.options = tuple(options)


class CapacityError(PlaitError):
    """A peer is full; ``retry_after_s`` says when to ask again."""

    code = "capacity"
    exit_code = 8

    def __init__(self, message: str, *, retry_after_s: float = 1.0, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class LedgerError(PlaitError):
    """Credit is missing, or a rule of the ledger refuses the request."""

    code = "ledger"
    exit_code = 9


class SessionLost(PlaitError):
    """A session ended early; ``resumable_from`` counts the tokens already delivered.

    ``cost_microcredits`` is what its vouchers promise for them.
    """

    code = "session-lost"
    exit_code = 10

    def __init__(
        self,
        message: str,
        *,
        resumable_from: int = 0,
        cost_microcredits: int = 0,
        remedy: str = "",
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.resumable_from = resumable_from
        self.cost_microcredits = cost_microcredits


class VerificationError(PlaitError):
    """Evidence is false."""

    code = "verification"
    exit_code = 1


class BadSignature(VerificationError):
    """A signature, or the key behind it, is not acceptable."""

    code = "bad-signature"


class BadProof(VerificationError):
    """A Merkle proof, a hash or a count does not hold."""

    code = "bad-proof"


class Overspend(VerificationError):
    """Somebody was charged or would be paid beyond what was signed."""

    code = "overspend"


def reworded(remedy: str, name: Callable[[str], str]) -> str:
    """A remedy for an interface that spells options in its own way, which ``name`` gives."""
    return _OPTION.sub(lambda found: name(found[1]), remedy)
