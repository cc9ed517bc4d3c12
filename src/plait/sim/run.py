"""Runs a scenario under a seed and says what came of it."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from plait.errors import ConfigError
from plait.sim.control import ControlWorld
from plait.sim.engine import Engine, Violation


class World(Protocol):
    """A scenario under way."""

    def run(self) -> None:
        """Let it happen and check it; raises ``Violation``."""


def _network(engine: Engine) -> World:
    from plait.sim.sessions import NetworkWorld

    return NetworkWorld(engine)


SCENARIOS: Mapping[str, Callable[[Engine], World]] = {
    "network": _network,
    "control": ControlWorld,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one run. ``rule`` is empty if every invariant held.

    ``recent`` are the last events before a violation, or all of them if that was asked.
    """

    scenario: str
    seed: int
    rule: str
    what: str
    steps: int
    virtual_s: float
    fingerprint: str
    recent: tuple[str, ...]


def check_scenario(scenario: str) -> None:
    """Raise ``ConfigError`` for a name that is not in ``SCENARIOS``."""
    if scenario not in SCENARIOS:
        raise ConfigError(f"no scenario {scenario!r}", remedy=f"one of {', '.join(SCENARIOS)}")


def run_seeds(part: tuple[str, range]) -> list["Outcome"]:
    """Run a scenario under several seeds: one process's part."""
    scenario, seeds = part
    return [run_seed(scenario, seed) for seed in seeds]


def run_seed(scenario: str, seed: int, *, keep_trace: bool = False) -> Outcome:
    """Run a scenario once. The same seed gives the same outcome, event for event."""
    check_scenario(scenario)
    engine = Engine(seed, keep_trace=keep_trace)
    rule, what = "", ""
    try:
        SCENARIOS[scenario](engine).run()
    except Violation as violation:
        rule, what = violation.rule, str(violation)
    except Exception as error:  # noqa: BLE001 - an unexpected error is what we look for
        rule, what = "exception", "".join(traceback.format_exception(error))
    return Outcome(
        scenario=scenario,
        seed=seed,
        rule=rule,
        what=what,
        steps=engine.steps,
        virtual_s=engine.now_us / 1_000_000,
        fingerprint=engine.fingerprint,
        recent=tuple(engine.recent) if rule or keep_trace else (),
    )
