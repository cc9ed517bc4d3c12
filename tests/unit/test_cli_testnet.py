"""``plait testnet`` from start to end, with nodes that only pretend."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plait.testnet.control import is_live

pytestmark = pytest.mark.slow

# The command as users run it, but for the daemon and what needs its services.
SCRIPT = """
import sys
from functools import partial
from plait.testnet import launch
command = (sys.executable, "-P", "-m", "plait.testing.standin")
launch.start = partial(launch.start, command=command)
launch.issue_credit = lambda directory: None
launch.wait_until_routable = lambda directory, model, timeout_s: None
from plait.cli import main
sys.exit(main())
"""

Plait = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    xdg = {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("STATE", "CONFIG", "DATA")}
    return os.environ | xdg | {"PLAIT_MODELS_DIR": str(tmp_path / "models")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "net"


@pytest.fixture
def plait(environment: dict[str, str], folder: Path) -> Iterator[Plait]:
    def run(*arguments: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        finished = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == code, finished.stderr
        return finished

    yield run
    if is_live(folder):
        run("testnet", "down", "--dir", str(folder))


def up(plait: Plait, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return plait(
        "testnet", "up", "--model", "tiny-random", "--detach", "--dir", str(folder), *options
    )


def test_up_status_kill_restart_stop_down(plait: Plait, folder: Path) -> None:
    started = json.loads(up(plait, folder, "--json").stdout)
    assert started["network"] == str(folder / "network.toml")
    assert [(node["name"], node["span"], node["state"]) for node in started["nodes"]] == [
        ("node-1", [0, 3], "ready"),
        ("node-2", [3, 6], "ready"),
        ("node-3", [6, 8], "ready"),
        ("node-4", [0, 3], "ready"),
        ("ledger-1", None, "ready"),
    ]
    assert {"name", "peer", "roles", "model", "span", "state", "pid"} <= started["nodes"][0].keys()
    network = json.loads(plait("net", "show", "--json").stdout)
    assert network["path"] == str(folder / "network.toml"), "the last testnet is the default"

    assert json.loads(plait("testnet", "kill", "node-1", "--json").stdout)["state"] == "dead"
    assert "dead" in plait("testnet", "status").stdout
    assert "node-1: ready" in plait("testnet", "restart", "node-1").stderr
    assert json.loads(plait("testnet", "stop", "node-2", "--json").stdout)["state"] == "stopped"
    assert "there are node-1, " in plait("testnet", "kill", "node-9", code=3).stderr

    plait("testnet", "down")
    assert not is_live(folder)
    assert "no testnet is running" in plait("testnet", "down", code=3).stderr
    assert "no network is known" in plait("net", "show", code=3).stderr


def test_spans_and_replicas_are_as_asked(plait: Plait, folder: Path) -> None:
    started = json.loads(up(plait, folder, "--stages", "2", "--replicas", "2", "--json").stdout)
    spans = [node["span"] for node in started["nodes"] if node["span"]]
    assert spans == [[0, 4], [4, 8], [0, 4], [4, 8]]
    refused = plait(
        "testnet", "up", "--model", "tiny-random", "--dir", str(folder), "--detach", code=3
    )
    assert "already running" in refused.stderr


def test_a_failed_start_leaves_nothing_behind(
    plait: Plait, folder: Path, environment: dict[str, str]
) -> None:
    environment["PLAIT_STANDIN_CRASH"] = "node-2"
    arguments = ("testnet", "up", "--model", "tiny-random", "--detach", "--dir", str(folder))
    failed = plait(*arguments, "--json", code=5)
    assert "error: node-2 ended while starting" in failed.stderr
    assert "no luck today" in failed.stderr
    assert json.loads(failed.stdout.splitlines()[-1])["error"]["code"] == "node-failed"
    assert not is_live(folder)
    assert "no testnet is running" in plait("testnet", "status", code=3).stderr


def test_wrong_numbers_and_models_start_nothing(plait: Plait, folder: Path) -> None:
    at = ("--dir", str(folder))
    model = ("--model", "tiny-random")
    refused = plait("testnet", "up", *model, *at, "-n", "3", "--stages", "2", code=3)
    assert "-n cannot be combined" in refused.stderr
    assert "no model" in plait("testnet", "up", *at, "--model", "nonesuch", code=4).stderr
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_foreground_it_lasts_until_interrupted(
    plait: Plait, folder: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    arguments = ["testnet", "up", "--model", "tiny-random", "-n", "1", "--dir", str(folder)]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as command:
        assert command.stderr is not None
        assert any("press Ctrl-C" in line for line in command.stderr)
        assert is_live(folder)
        command.send_signal(number)
        assert "Traceback" not in command.stderr.read()
    assert command.returncode == 0
    assert not is_live(folder)


def test_a_wan_is_named_shaped_and_measured_by_command(plait: Plait, folder: Path) -> None:
    started = up(plait, folder, "--wan", "metro", "--unprivileged", "--json")
    assert "carried by a forwarder between loopback addresses (asked for)" in started.stderr
    assert json.loads(started.stdout)["wan"]["backend"] == "forwarder"
    changed = plait("testnet", "shape", "--to", "node-2", "--delay-ms", "40", "--cut", "--json")
    assert "5 links changed" in changed.stderr
    links = json.loads(changed.stdout)["links"]
    assert {link["target"] for link in links if link["cut"]} == {"node-2"}
    assert {link["delay_s"] for link in links if link["cut"]} == {0.04}
    both = plait("testnet", "shape", "--to", "node-2", "--cut", "--heal", code=3)
    assert "cut and healed at once" in both.stderr
    assert "node-9" in plait("testnet", "shape", "--to", "node-9", "--heal", code=3).stderr

    assert json.loads(plait("testnet", "hang", "node-1", "--json").stdout)["hung"] is True
    assert "ready (hung)" in plait("testnet", "status").stdout
    assert json.loads(plait("testnet", "resume", "node-1", "--json").stdout)["hung"] is False
    assert "hung" not in plait("testnet", "status").stdout
    plait("testnet", "hang", "node-3")
    healed = json.loads(plait("testnet", "heal", "--json").stdout)
    assert {"node-3 is hung", "the link from client to node-2 is cut"} <= set(healed["healed"])
    assert len(healed["healed"]) == 6
    assert healed["failed"] == []
    assert "nothing was wrong" in plait("testnet", "heal").stderr


def test_chaos_says_what_it_cannot_do(plait: Plait, folder: Path, tmp_path: Path) -> None:
    up(plait, folder)
    assert "--random SEED" in plait("testnet", "chaos", code=3).stderr
    plan = tmp_path / "plan.toml"
    plan.write_text('duration_s = 9\n[[fault]]\nat_s = 1\nkind = "kill"\nnode = "node-2"\n')
    plait("testnet", "stop", "node-1")
    refused = plait("testnet", "chaos", "--plan", str(plan), code=3)
    assert "the testnet is not whole: node-1 is stopped" in refused.stderr
    assert "healed: node-1 is stopped" in plait("testnet", "heal").stderr
    refused = plait("testnet", "chaos", "--plan", str(plan), code=3)
    assert "layer 3 would have no usable host" in refused.stderr
    assert (
        "choose among" in plait("testnet", "chaos", "--random", "1", "--kind", "x", code=3).stderr
    )
