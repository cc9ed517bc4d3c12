"""Bad input on a real testnet: one clear line, the right exit code, nobody harmed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plait.model.catalog import load
from plait.testing.testnets import Testnet

MODEL = "tiny-random"

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def net(testnet: Callable[..., Testnet]) -> Testnet:
    """The default testnet, shared with the other tests."""
    return testnet()


def one_clear_line(finished: "subprocess.CompletedProcess[str]", says: str) -> None:
    """Exactly one error line, with the words expected, and no traceback."""
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, finished.stderr
    assert says in errors[0]
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["run", "no-such-model", "hello"], 4, "no-such-model"),
        (["run", MODEL, "  "], 3, "prompt is empty"),
        (["run", MODEL, "sea " * 4000], 3, "context ends"),
        (["run", MODEL, "hello", "--max-price", "0"], 7, "cheapest"),
        (["run", MODEL, "hello", "--max-tokens", "0"], 3, "max_tokens"),
        (["run", MODEL, "hello", "--temperature", "-1"], 3, "temperature"),
        (["run", MODEL, "hello", "--pin", "nonsense"], 3, "--pin"),
        (["run", MODEL, "hello", "--sort", "beauty"], 3, "sort"),
        (["run", MODEL, "hello", "--bundle", "/nonexistent/b.json"], 3, "/nonexistent"),
        (["run", MODEL, "hello", "--only", "nobody"], 7, "layers"),
        (["verify", "/nonexistent/bundle.json"], 3, "/nonexistent"),
        (["ledger", "issue", "nobody", "5"], 3, "nobody"),
    ],
)
def test_wrong_arguments(net: Testnet, arguments: list[str], exit_code: int, says: str) -> None:
    finished = net.plait(*arguments, "--network", str(net.network), expect=exit_code)
    one_clear_line(finished, says)


def start_node(net: Testnet, data_dir: Path, *arguments: str, **environment: str) -> Any:
    """Run a node that is expected to refuse to start."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "plait", "node", "run", "--model", MODEL),
            *("--network", str(net.network), "--data-dir", str(data_dir), *arguments),
        ],
        env=os.environ | net.environment | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_copied_identity_folder_is_named(net: Testnet, tmp_path: Path) -> None:
    own_files = shutil.ignore_patterns("*.sock")
    shutil.copytree(net.directory / "nodes" / "node-1", tmp_path / "copy", ignore=own_files)
    finished = start_node(net, tmp_path / "copy", "--span", "0:3")
    assert finished.returncode == 3
    one_clear_line(finished, "data folder was copied")


def test_a_port_in_use_is_named(net: Testnet, tmp_path: Path) -> None:
    view = net.json("peers", "--network", str(net.network))
    port = view["peers"][0]["public_address"].rpartition(":")[2]
    finished = start_node(net, tmp_path / "node", "--span", "0:3", "--public-port", port)
    assert finished.returncode == 3
    one_clear_line(finished, f":{port}")


def test_corrupt_weights_name_the_tensor(net: Testnet, tmp_path: Path) -> None:
    local = load(MODEL)
    copy = tmp_path / "models" / MODEL
    shutil.copytree(local.weights_path.parent, copy)
    weights = copy / "weights.gguf"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    finished = start_node(
        net, tmp_path / "node", "--span", "0:8", PLAIT_MODELS_DIR=str(tmp_path / "models")
    )
    assert finished.returncode == 4
    one_clear_line(finished, "weight")


def test_a_span_outside_the_model_is_refused(net: Testnet, tmp_path: Path) -> None:
    finished = start_node(net, tmp_path / "node", "--span", "0:99")
    assert finished.returncode == 3
    one_clear_line(finished, "0:8")


@pytest.mark.parametrize(("device", "says"), [("cuda:99", "CUDA cards"), ("gpu", "'gpu'")])
def test_a_device_that_is_not_there_is_named(
    net: Testnet, tmp_path: Path, device: str, says: str
) -> None:
    finished = start_node(net, tmp_path / "node", "--span", "0:3", "--device", device)
    assert finished.returncode == 3
    one_clear_line(finished, says)


def test_a_dead_network_is_not_a_missing_layer(own_testnet: Callable[..., Testnet]) -> None:
    net = own_testnet(stages=1)
    net.control("down")
    finished = net.plait("run", MODEL, "hello", "--network", str(net.network), expect=5)
    one_clear_line(finished, "no bootstrap node")


def test_nobody_was_harmed(net: Testnet) -> None:
    assert [node["state"] for node in net.nodes().values()] == ["ready"] * 5
    assert net.run("hello", "--max-tokens", "2")["completion_tokens"] >= 1
