"""A flood of sessions: the node's memory and its KV cache stay within their limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "flood.py"
CANNOT = 77


def test_a_flood_stays_within_a_memory_group_and_others_are_answered() -> None:
    command = [sys.executable, str(SCRIPT), "--model", "tiny-random"]
    sizes = ["--sessions", "60", "--tokens", "400"]
    finished = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=240)
    if finished.returncode == CANNOT:
        pytest.skip("memory groups cannot be made here")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = json.loads(finished.stdout.splitlines()[-1])
    flood, most = figures["flood"], figures["most"]
    assert flood["answered"] + flood["refused"] == 60
    assert flood["refused"] > 0  # it asked for three times the cache
    assert 0 < most["kv_tokens_used"] <= most["kv_tokens_total"]
    assert most["group_bytes"] <= figures["limit_bytes"]
    assert figures["honest_answers"] >= 3
    assert figures["wrong"] == 0
