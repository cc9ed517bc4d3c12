"""The wide-area network between a testnet's nodes: profiles, addresses, who carries it. Pure.

Every node and the client is one *leg*. Two backends carry the traffic: ``tun`` gives each
leg a network namespace and moves IP packets between them; ``forwarder`` needs no privilege
and moves the bytes of TCP connections between loopback addresses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from plait.errors import ConfigError
from plait.net.shaping import Shape

Backend = Literal["tun", "forwarder"]
CLIENT_LEG = "client"
"""The host's own end, where commands and the client library run."""

_CLIENT_HOST_NUMBER = 254
_MEGABIT = 1e6


def _round_trip(
    ms: float, jitter_ms: float = 0.0, megabit: float = 0.0, loss: float = 0.0
) -> Shape:
    return Shape(ms / 2000, jitter_ms / 1000, megabit * _MEGABIT, loss)


PROFILES = {
    "lan": _round_trip(0),
    "metro": _round_trip(5, 0.2, 200),
    "continental": _round_trip(25, 1, 100),
    "global": _round_trip(100, 3, 100),
    "lossy": _round_trip(40, 5, 50, 0.01),
    "nat": _round_trip(5, 0.2, 200),
}
"""Per direction: half of the named round trip, jitter, rate, and the share of packets lost."""


@dataclass(frozen=True, slots=True)
class Wan:
    """How a testnet's legs are joined. ``why`` says what made us choose the backend.

    ``subnet`` is the third byte of the legs' addresses. ``behind_nat`` names the node behind
    address translation, empty for none. ``seed`` starts jitter and loss.
    """

    profile: str
    backend: Backend
    why: str
    subnet: int
    seed: int = 1
    behind_nat: str = ""

    def address(self, number: int) -> str:
        """Where leg ``number`` (from 1) is dialled."""
        network = "198.18" if self.backend == "tun" else "127.18"
        return f"{network}.{self.subnet}.{number}"

    @property
    def client_address(self) -> str:
        """The address of the host's own leg."""
        return self.address(_CLIENT_HOST_NUMBER)

    @property
    def shape(self) -> Shape:
        """What every link does at the start."""
        return profile_shape(self.profile)


def profile_shape(name: str) -> Shape:
    """The shape of a profile; raises ``ConfigError`` listing the profiles there are."""
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigError(
            f"there is no WAN profile {name!r}; there are {', '.join(PROFILES)}"
        ) from None


def private_address(wan: Wan, number: int) -> str:
    """The address that a leg behind translation has on its own side."""
    return f"10.18.{wan.subnet}.{number}"


def translated_node(names: Sequence[str], spans: Sequence[object]) -> str:
    """The node that ``nat`` puts behind translation: the last whose span has another host.

    Nobody can dial it there, so every layer must have a host elsewhere. Raises
    ``ConfigError`` if none has.
    """
    for name, span in reversed(list(zip(names, spans, strict=True))):
        if spans.count(span) > 1:
            return name
    raise ConfigError(
        "the nat profile needs a span with two hosts: nobody can dial a node behind NAT",
        remedy="--replicas 2",
    )
