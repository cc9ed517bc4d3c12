"""``plait sim``: exit codes, JSON, traces, several processes."""

import json
from dataclasses import replace

import pytest

from plait.cli import sim
from plait.cli.root import invoke
from plait.sim import run
from plait.sim.run import Outcome, run_seed


@pytest.mark.slow
def test_a_clean_run_exits_0_and_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["sim", "run", "--scenario", "control", "--seeds", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["seeds"] == 2
    assert shown["violations"] == []
    assert shown["events"] > 1_000


def broken(scenario: str, seed: int, *, keep_trace: bool = False) -> Outcome:
    """A run that ends in a violation when the seed is odd."""
    recent = ("0.1 something happened",)
    outcome = Outcome(scenario, seed, "", "", 5, 1.0, "00", recent)
    return replace(outcome, rule="tokens", what="tokens: one changed") if seed % 2 else outcome


def test_a_violation_exits_1_and_names_the_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_seed", broken)
    assert invoke(["sim", "run", "--scenario", "control", "--seeds", "4", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)["violations"]
    assert [(one["seed"], one["rule"]) for one in found] == [(1, "tokens"), (3, "tokens")]
    assert "seed 1, event 5: tokens: one changed" in captured.err
    assert "plait sim run --scenario control --seed 1 --trace" in captured.err
    assert "something happened" in captured.err


def test_a_trace_is_of_one_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_seed", broken)
    assert invoke(["sim", "run", "--scenario", "control", "--seed", "2", "--trace"]) == 0
    assert "something happened" in capsys.readouterr().out
    assert invoke(["sim", "run", "--trace"]) == 3


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", "3", "--seeds", "10"),
        ("--seed", "3", "--first", "0"),
        ("--seed", "3", "--trace", "--json"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "run_seed", broken)
    assert invoke(["sim", "run", "--scenario", "control", *options]) == 3
    assert "try: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seeds", "jobs", "cores", "processes"),
    [
        (3, 500, 8, 1),
        (100, 500, 8, 7),
        (1000, 500, 8, 8),
        (1000, 2, 8, 2),
        (1000, 0, 8, 8),
        (20, 0, 8, 1),
        (20, 2, 8, 2),
    ],
)
def test_there_are_no_more_processes_than_cores_and_work(
    seeds: int, jobs: int, cores: int, processes: int
) -> None:
    assert sim.processes_for(seeds, jobs, cores) == processes


def test_an_unknown_scenario_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["sim", "run", "--scenario", "weather"]) == 3
    assert "control" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_give_what_one_gives() -> None:
    alone = {seed: run_seed("control", seed) for seed in range(20)}
    spread = sim._outcomes("control", range(20), 2, False)
    assert {outcome.seed: outcome for outcome in spread} == alone
