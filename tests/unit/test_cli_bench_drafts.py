"""The figures of ``plait bench draft``; the testnet itself is measured by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.cli.bench_drafts import TASKS, bootstrap_interval
from plait.cli.root import invoke

ratios = st.lists(st.floats(0.1, 10), min_size=1, max_size=30)


@given(ratios)
def test_an_interval_is_within_what_was_measured(values: list[float]) -> None:
    low, high = bootstrap_interval(values)
    assert min(values) <= low <= high <= max(values)
    assert (low, high) == bootstrap_interval(values)


def test_more_rounds_make_the_interval_narrower() -> None:
    few, many = [0.9, 1.0, 1.2, 1.4], [0.9, 1.0, 1.2, 1.4] * 25
    assert bootstrap_interval(few)[1] - bootstrap_interval(few)[0] > 0.2
    assert bootstrap_interval(many)[1] - bootstrap_interval(many)[0] < 0.25


def test_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["bench", "draft", "--tasks", "copy-edit,poem"]) == 3
    said = capsys.readouterr().err
    assert all(task in said for task in ("poem", *TASKS))


@pytest.mark.parametrize("command", ["pipeline", "batch", "draft"])
def test_a_dtype_that_is_not_there_is_refused_before_anything_starts(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["bench", command, "--model", "tiny-random", "--dtype", "int4/gml"]) == 3
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("error: there is no dtype 'int4/gml'")
