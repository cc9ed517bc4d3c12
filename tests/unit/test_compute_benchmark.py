"""``plait bench compute``. Slow because torch takes seconds to import."""

import json

import pytest

from plait.cli.root import invoke
from plait.model import catalog

pytestmark = pytest.mark.slow

SMALL = ["bench", "compute", "--model", "tiny-random", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))


def test_it_measures_every_combination(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke([*SMALL, "--dtypes", "fp32,int4", "--batches", "1,3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ours = [figure for figure in report["decode"] if figure["dtype"] != "llama.cpp"]
    found = [(figure["dtype"], figure["threads"], figure["batch"]) for figure in ours]
    assert found == [("fp32", 1, 1), ("fp32", 1, 3), ("int4", 1, 1), ("int4", 1, 3)]
    for figure in ours:
        assert 0 < figure["step_ms_min"] <= figure["step_ms_median"]
        assert figure["tokens_per_s"] > 0
    assert {figure["dtype"] for figure in report["prefill"]} >= {"fp32", "int4"}
    assert report["model"] == "tiny-random"


def test_it_shows_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke([*SMALL, "--dtypes", "int8", "--batches", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Decoding" in shown
    assert "int8" in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtypes", "fp8"], "no dtype 'fp8'"),
        (["--batches", "0"], "--batches 0"),
        (["--threads", "two"], "--threads two"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke([*SMALL, *flags]) == 3
    assert said in capsys.readouterr().err


def test_quality_is_compared_with_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dtypes", "fp32,int8", "--batches", "1", "--quality", "300", "--json"]
    assert invoke([*SMALL, *flags]) == 0
    (figure,) = json.loads(capsys.readouterr().out)["quality"]
    assert (figure["dtype"], figure["tokens"]) == ("int8", 300)
    assert 0 < figure["kl_mean"] < figure["kl_max"]
