"""``plait sim``: the network under faults, simulated from seeds."""

from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.output import emit_json, status
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.sim.run import Outcome

app = typer.Typer(help="The network under faults, simulated from seeds.", no_args_is_help=True)

SEEDS = 100
SPREAD_SEEDS_MIN = 64
"""From so many seeds on, every core takes a part of them."""
_PART = 16
_PROGRESS_S = 5.0
_TOLD_LINES = 40


@app.callback()
def sim() -> None:
    """The network under faults, simulated from seeds."""


@app.command()
def run(
    seeds: Annotated[int | None, typer.Option(help="How many; default 100.", min=1)] = None,
    first: Annotated[int | None, typer.Option(help="The first seed; default 0.", min=0)] = None,
    scenario: Annotated[str, typer.Option(help="What is simulated.")] = "network",
    seed: Annotated[
        int | None, typer.Option(help="Run this seed alone.", min=0, show_default=False)
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show every event of the seed.")] = False,
    jobs: Annotated[
        int, typer.Option(help="Processes; 0 and at most: one per core, if that pays.", min=0)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run a scenario once per seed and check every invariant. Exit code 1: one is broken.

    Example: plait sim run --seeds 1000; plait sim run --seed 17 --trace
    """
    if trace and seed is None:
        raise ConfigError("--trace shows one seed", remedy="name it with --seed")
    if trace and as_json:
        raise ConfigError("a trace is no JSON", remedy="--trace or --json")
    numbers = _numbers(seed, first, seeds)
    started_s = monotonic()
    done = steps = 0
    virtual_s = 0.0
    broken: list[Outcome] = []
    told_s = started_s
    for outcome in _outcomes(scenario, numbers, jobs, trace):
        done, steps, virtual_s = done + 1, steps + outcome.steps, virtual_s + outcome.virtual_s
        if outcome.rule:
            broken.append(outcome)
            _tell(outcome, len(outcome.recent) if trace else _TOLD_LINES)
        elif trace and not as_json:
            typer.echo("\n".join(outcome.recent))
        if monotonic() - told_s > _PROGRESS_S:
            told_s = monotonic()
            status(f"{done} of {len(numbers)} seeds, {len(broken)} with a violation")
    elapsed_s = monotonic() - started_s
    status(
        f"{done} seeds of {scenario}: {len(broken)} with a violation; {steps} events, "
        f"{virtual_s:.0f} s of virtual time in {elapsed_s:.1f} s"
    )
    if as_json:
        emit_json(
            {
                "scenario": scenario,
                "first": numbers.start,
                "seeds": done,
                "violations": sorted(broken, key=lambda outcome: outcome.seed),
                "events": steps,
                "virtual_s": round(virtual_s, 3),
                "elapsed_s": round(elapsed_s, 3),
            }
        )
    raise typer.Exit(1 if broken else 0)


def _numbers(seed: int | None, first: int | None, seeds: int | None) -> range:
    if seed is None:
        start = first or 0
        return range(start, start + (SEEDS if seeds is None else seeds))
    if first is not None or seeds is not None:
        raise ConfigError("--seed is one seed alone", remedy="--seed, or --first and --seeds")
    return range(seed, seed + 1)


def processes_for(seeds: int, jobs: int, cores: int) -> int:
    """How many processes simulate so many seeds: no more than cores, and none without work."""
    wanted = jobs or (cores if seeds >= SPREAD_SEEDS_MIN else 1)
    return min(wanted, cores, -(-seeds // _PART))


def _outcomes(scenario: str, seeds: range, jobs: int, trace: bool) -> "Iterator[Outcome]":
    """Outcomes as they come, from several processes if that pays."""
    import multiprocessing
    import os

    from plait.sim.run import check_scenario, run_seed, run_seeds

    check_scenario(scenario)
    processes = processes_for(len(seeds), jobs, len(os.sched_getaffinity(0)))
    if processes == 1:
        for seed in seeds:
            yield run_seed(scenario, seed, keep_trace=trace)
        return
    parts = [
        (scenario, range(start, min(start + _PART, seeds.stop)))
        for start in range(seeds.start, seeds.stop, _PART)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for outcomes in pool.imap_unordered(run_seeds, parts):
            yield from outcomes


def _tell(outcome: "Outcome", lines: int) -> None:
    """Show a violation with the events that led to it, and what to type to see it again."""
    status("\n".join(f"  {line}" for line in outcome.recent[-lines:]))
    status(f"seed {outcome.seed}, event {outcome.steps}: {outcome.what.strip()}")
    status(f"again: plait sim run --scenario {outcome.scenario} --seed {outcome.seed} --trace")
