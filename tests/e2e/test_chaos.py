"""A chaos run that is told to end heals and reports; a drained node is found and restarted."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from plait.testing.testnets import PLAIT, running_testnet

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PLAN = """
duration_s = 600
load = 1
allow_gaps = true
[[fault]]
at_s = 0
kind = "hang"
node = "node-2"
[[fault]]
at_s = 0
kind = "cut"
node = "node-1"
[[fault]]
at_s = 500
kind = "resume"
node = "node-2"
"""


def test_sigterm_heals_and_reports_and_a_drain_says_how_it_ended(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    wan = ("--wan", "lan", "--unprivileged")
    with running_testnet("tiny-random", "--stages", "2", *wan, folder=tmp_path) as net:
        command = ("testnet", "chaos", "--plan", str(tmp_path / "plan.toml"), "--json")
        with subprocess.Popen(
            [*PLAIT, *command, "--dir", str(net.directory)],
            env=os.environ | net.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as chaos:
            assert chaos.stdout is not None
            assert chaos.stderr is not None
            assert any("hang node-2: applied" in line for line in chaos.stderr)
            assert net.nodes()["node-2"]["hung"]
            chaos.send_signal(signal.SIGTERM)
            report = json.loads(chaos.stdout.read())
        assert chaos.returncode == 128 + signal.SIGTERM
        assert (report["interrupted"], report["signal"]) == (True, "SIGTERM")
        assert report["unhealed"] == []
        assert not net.nodes()["node-2"]["hung"]
        assert net.control("heal", as_json=True) == {"healed": [], "failed": []}

        folder = str(net.directory / "nodes" / "node-2")
        drained = net.json("node", "drain", "--data-dir", folder, "--wait-s", "60")
        assert (drained["state"], drained["sessions_ended"]) == ("stopped", 0)
        assert net.control("heal", as_json=True)["healed"] == ["node-2 is stopped"]
