"""Which faults, on which nodes, when: parsed, checked, or drawn from a seed. Pure.

A plan is judged before it runs by following it: a fault needs a node in the right condition,
and unless gaps are allowed every layer must keep a usable host throughout. A node counts as
usable again only some seconds after it came back.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import msgspec

from plait.errors import ConfigError
from plait.types import Span

Kind = Literal["kill", "hang", "slow", "cut", "drain", "fill", "restart", "resume", "heal"]
Direction = Literal["both", "in", "out"]

DISRUPTIVE: tuple[Kind, ...] = ("kill", "hang", "slow", "cut", "drain", "fill")
_CURE: dict[Kind, Kind] = {
    "kill": "restart",
    "drain": "restart",
    "hang": "resume",
    "slow": "heal",
    "cut": "heal",
    "fill": "heal",
}
SETTLE_S = 8.0
"""After it came back, until a node is counted on: it loads, is offered, and is measured."""

_HOLD_SHARE_MIN, _HOLD_SHARE_MAX = 0.5, 1.5
_SLOW_FACTOR = 5.0
_DURATION_S_MAX = 7 * 86_400.0


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing done to one node. ``factor`` is how much slower ``slow`` makes it.

    ``direction`` of a cut: what reaches the node ("in"), what leaves it ("out"), or both.
    """

    at_s: float
    kind: Kind
    node: str
    direction: Direction = "both"
    factor: float = _SLOW_FACTOR


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """Faults in order of time, over ``duration_s`` of load by ``load`` clients at once."""

    duration_s: float
    faults: tuple[Fault, ...]
    load: int = 4
    allow_gaps: bool = False


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    at_s: float
    kind: Kind
    node: str
    direction: Direction = "both"
    factor: float = _SLOW_FACTOR


class _File(msgspec.Struct, forbid_unknown_fields=True):
    duration_s: float
    fault: list[_Row] = msgspec.field(default_factory=list)
    load: int = 4
    allow_gaps: bool = False


def parse_plan(text: str) -> ChaosPlan:
    """Read a plan's TOML; raises ``ConfigError`` naming what is wrong in it."""
    try:
        file = msgspec.convert(tomllib.loads(text), _File, strict=False)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"not a chaos plan: {error}", remedy="docs/testnet.md has one") from error
    if not 0 < file.duration_s <= _DURATION_S_MAX or not 0 <= file.load <= 256:
        raise ConfigError("a plan lasts up to a week under a load of at most 256")
    faults = sorted(Fault(r.at_s, r.kind, r.node, r.direction, r.factor) for r in file.fault)
    for fault in faults:
        if not 0 <= fault.at_s <= file.duration_s:
            raise ConfigError(f"{fault.kind} of {fault.node} at {fault.at_s:g} s is not in the run")
        if not 1 < fault.factor <= 1000:
            raise ConfigError("slow needs a factor above 1 and at most 1000")
    return ChaosPlan(file.duration_s, tuple(faults), file.load, file.allow_gaps)


@dataclass(slots=True)
class _Course:
    """The condition of every node as a plan goes on: its disruption, or when it is usable."""

    hosts: Mapping[str, Span | None]
    troubled: dict[str, Kind] = field(default_factory=dict)
    usable_from_s: dict[str, float] = field(default_factory=dict)

    def usable(self, name: str, now_s: float) -> bool:
        return name not in self.troubled and self.usable_from_s.get(name, 0.0) <= now_s

    def uncovered(self, now_s: float, without: str = "") -> list[int]:
        """Layers that no usable node hosts."""
        spans = [span for span in self.hosts.values() if span is not None]
        covered = {
            layer
            for name, span in self.hosts.items()
            if span is not None and name != without and self.usable(name, now_s)
            for layer in range(span.start, span.end)
        }
        return [n for n in range(max((s.end for s in spans), default=0)) if n not in covered]

    def apply(self, fault: Fault) -> str:
        """Follow one fault; returns what is wrong with it, empty if nothing."""
        if fault.node not in self.hosts:
            return f"there is no node {fault.node}"
        trouble = self.troubled.get(fault.node)
        if fault.kind in DISRUPTIVE:
            if trouble is not None:
                return f"{fault.node} suffers a {trouble} already"
            self.troubled[fault.node] = fault.kind
            return ""
        if trouble is None and fault.kind == "restart":
            pass  # of a healthy node: allowed, it is away for a while
        elif trouble is None or _CURE[trouble] != fault.kind:
            return f"{fault.node} has nothing that a {fault.kind} ends"
        self.troubled.pop(fault.node, None)
        self.usable_from_s[fault.node] = fault.at_s + SETTLE_S
        return ""


def check_plan(plan: ChaosPlan, hosts: Mapping[str, Span | None]) -> None:
    """Raise ``ConfigError`` for the first fault that cannot be, or leaves a layer without host.

    ``hosts`` names every node and its span, None for one that hosts no layer.
    """
    course = _Course(hosts)
    for fault in plan.faults:
        where = f"{fault.kind} of {fault.node} at {fault.at_s:g} s"
        if wrong := course.apply(fault):
            raise ConfigError(f"{where}: {wrong}")
        if not plan.allow_gaps and (layers := course.uncovered(fault.at_s)):
            raise ConfigError(
                f"{where}: layer {layers[0]} would have no usable host",
                remedy=f"leave {SETTLE_S:g} s after a recovery, or set allow_gaps = true",
            )


def random_plan(
    draw: Callable[[], float],
    hosts: Mapping[str, Span | None],
    *,
    duration_s: float,
    every_s: float,
    load: int,
    kinds: Sequence[Kind] = DISRUPTIVE,
    allow_gaps: bool = False,
) -> ChaosPlan:
    """Draw a fault every ``every_s`` and its end a while later; ``draw`` returns [0, 1).

    Only nodes with layers are hit, and only while every layer keeps another usable host
    (unless gaps are allowed); a moment when none may be hit is passed over. Raises
    ``ConfigError`` for times that cannot be and for kinds that are no faults.
    """
    if every_s <= 0 or not 0 < duration_s <= _DURATION_S_MAX:
        raise ConfigError("the time between faults and the duration must be positive")
    if not kinds or set(kinds) - set(DISRUPTIVE):
        raise ConfigError(f"choose among {', '.join(DISRUPTIVE)}")
    course, faults, cures = _Course(hosts), list[Fault](), list[Fault]()
    number = 1
    while (at_s := round(number * every_s, 3)) < duration_s:
        number += 1
        for cure in sorted(c for c in cures if c.at_s <= at_s):
            course.apply(cure)
            cures.remove(cure)
            faults.append(cure)
        victims = [
            name
            for name, span in hosts.items()
            if span is not None
            and course.usable(name, at_s)
            and (allow_gaps or not course.uncovered(at_s, without=name))
        ]
        if not victims:
            continue
        fault = _drawn(draw, victims, kinds, at_s)
        course.apply(fault)
        faults.append(fault)
        share = _HOLD_SHARE_MIN + draw() * (_HOLD_SHARE_MAX - _HOLD_SHARE_MIN)
        end_s = min(duration_s, round(at_s + share * every_s, 3))
        cures.append(Fault(end_s, _CURE[fault.kind], fault.node))
    return ChaosPlan(duration_s, tuple(sorted([*faults, *cures])), load, allow_gaps)


def _drawn(
    draw: Callable[[], float], victims: Sequence[str], kinds: Sequence[Kind], at_s: float
) -> Fault:
    kind = kinds[int(draw() * len(kinds))]
    node = victims[int(draw() * len(victims))]
    directions: tuple[Direction, ...] = get_args(Direction)
    direction = directions[int(draw() * len(directions)) if kind == "cut" else 0]
    return Fault(at_s, kind, node, direction)
