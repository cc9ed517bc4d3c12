"""The benchmark runs and its figures are of what it says; how large they are is not tested."""

import json
from pathlib import Path

import pytest

from plait.cli.root import invoke


@pytest.mark.slow
@pytest.mark.e2e
def test_bench_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--settlements", "64", "--tokens", "64", "--dir", str(tmp_path), "--json"]
    assert invoke(["bench", "ledger", *arguments]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["tokens"] == 64
    assert figures["bundle_bytes"] == pytest.approx(
        64 * figures["bundle_bytes_per_token"], rel=0.01
    )
    assert all(value > 0 for value in figures.values())
    assert list(tmp_path.iterdir()) == []
