"""The main job on a real testnet of separate processes, with random weights for speed."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plait.client import Answer, AsyncClient, Client, Options, TextDelta
from plait.ledger.verify import verify_bundle
from plait.network_file import load_network_file

MODEL = "tiny-random"
PROMPT = "Tell me about the sea and the sky."

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def plait(*arguments: str, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run a plait command in a process of its own."""
    command = [sys.executable, "-m", "plait", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


class Testnet:
    """A running testnet and its commands."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = str(folder / "network.toml")

    def up(self, *arguments: str) -> None:
        """Start it; returns once a complete route exists."""
        done = plait(
            "testnet", "up", "--detach", "--model", MODEL, "--dir", str(self.folder), *arguments
        )
        assert done.returncode == 0, done.stderr

    def run(self, *arguments: str) -> dict[str, Any]:
        """One generation."""
        done = plait("run", MODEL, PROMPT, "--json", "--network", self.network, *arguments)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def nodes(self) -> list[dict[str, Any]]:
        """What ``testnet status --json`` lists."""
        done = plait("testnet", "status", "--dir", str(self.folder), "--json")
        assert done.returncode == 0, done.stderr
        listed: list[dict[str, Any]] = json.loads(done.stdout)["nodes"]
        return listed

    def down(self) -> None:
        """Stop it."""
        done = plait("testnet", "down", "--dir", str(self.folder))
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def testnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testnet]:
    """Four nodes: three spans and a second host of the first."""
    subject = Testnet(tmp_path_factory.mktemp("testnet") / "net")
    subject.up()
    yield subject
    subject.down()


def test_status_lists_nodes_and_the_ledger(testnet: Testnet) -> None:
    nodes = testnet.nodes()
    assert [node["state"] for node in nodes] == ["ready"] * 5
    stages = [node for node in nodes if node["span"]]
    assert len(stages) == 4
    assert [node["roles"] for node in nodes if not node["span"]] == [["ledger"]]


def test_an_answer_crosses_three_stages_is_paid_and_verifies(
    testnet: Testnet, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.json"
    answer = testnet.run("--max-tokens", "40", "--bundle", str(bundle))
    assert len(answer["route"]) == 3
    assert answer["completion_tokens"] == len(answer["token_ids"]) <= 40
    assert answer["receipts_verified"] >= 6
    assert answer["cost_microcredits"] > 0
    verified = plait("verify", str(bundle), "--network", testnet.network, "--json")
    assert verified.returncode == 0, verified.stdout
    audit = plait("ledger", "audit", "--json", "--network", testnet.network)
    report = json.loads(audit.stdout.splitlines()[-1])
    assert report["balanced"] is True
    assert report["violations"] == []
    balance = plait("ledger", "balance", "--json", "--network", testnet.network)
    assert json.loads(balance.stdout)["available_microcredits"] < 10_000_000


def test_a_flipped_bit_makes_a_bundle_false(testnet: Testnet, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    testnet.run("--max-tokens", "8", "--bundle", str(bundle))
    data, network = bundle.read_bytes(), load_network_file(Path(testnet.network))
    assert verify_bundle(data, network).outcome == "verified"
    chance = random.Random(1)
    for _ in range(200):
        bit = chance.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        report = verify_bundle(bytes(flipped), network)
        assert report.outcome == "false", bit
        assert any(not claim.ok for claim in report.claims), bit
    bundle.write_bytes(data[:-1])
    assert plait("verify", str(bundle), "--network", testnet.network).returncode == 1


def test_seeds_repeat_and_greedy_is_the_default(testnet: Testnet) -> None:
    sampled = [
        testnet.run("--max-tokens", "12", "--temperature", "1", "--seed", seed)["token_ids"]
        for seed in ("7", "7", "8")
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    greedy = [testnet.run("--max-tokens", "12")["token_ids"] for _ in range(2)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["run", "no-such-model", "hello"], 4, "no-such-model"),
        (["run", MODEL, "  "], 3, "prompt is empty"),
        (["run", MODEL, "sea " * 4000], 3, "context ends"),
        (["run", MODEL, "hello", "--max-price", "0"], 7, "cheapest"),
        (["run", MODEL, "hello", "--temperature", "-1"], 3, "temperature"),
        (["run", MODEL, "hello", "--pin", "nonsense"], 3, "--pin"),
        (["run", MODEL, "hello", "--sort", "beauty"], 3, "sort"),
        (["verify", "/nonexistent/bundle.json"], 3, "bundle"),
    ],
)
def test_wrong_input_gets_one_clear_line(
    testnet: Testnet, arguments: list[str], exit_code: int, says: str
) -> None:
    done = plait(*arguments, "--network", testnet.network)
    assert done.returncode == exit_code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


async def test_cancelling_frees_everything_within_a_second(testnet: Testnet) -> None:
    async with AsyncClient(testnet.network) as client:
        await client.wait_settled()
        stream = client.stream(MODEL, PROMPT, Options(max_tokens=400, temperature=1.0, seed=3))
        async for item in stream:
            assert isinstance(item, TextDelta)
            break
        await stream.aclose()
        async with asyncio.timeout(5):
            # Another process's state: there is nothing of ours to wait on.
            while any(offer.sessions_active for offer in client.view().offers.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        answer = await client.generate(MODEL, PROMPT, Options(max_tokens=4))
        assert answer.completion_tokens >= 1


async def test_many_sessions_share_the_stages_and_agree(testnet: Testnet) -> None:
    async with AsyncClient(testnet.network) as client:
        options = Options(max_tokens=12)
        answers = await asyncio.gather(*(client.generate(MODEL, PROMPT, options) for _ in range(8)))
    assert len({answer.token_ids for answer in answers}) == 1


def test_the_blocking_client_streams_and_names_its_route(testnet: Testnet) -> None:
    with Client(testnet.network) as client:
        *deltas, answer = client.stream(MODEL, PROMPT, Options(max_tokens=12))
    assert isinstance(answer, Answer)
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    assert text == answer.text
    assert [step.span.start for step in answer.route] == [0, 3, 6]


def test_without_a_host_the_missing_layers_are_named(testnet: Testnet) -> None:
    stages = [node for node in testnet.nodes() if node["span"]]
    last = max(stages, key=lambda node: int(node["span"][1]))
    killed = plait("testnet", "kill", last["name"], "--dir", str(testnet.folder))
    assert killed.returncode == 0, killed.stderr
    done = plait("run", MODEL, "hello", "--json", "--network", testnet.network)
    assert done.returncode in (7, 8), done.stderr
    start, end = last["span"]
    assert f"{start}:{end}" in done.stderr or f"{start} to {end}" in done.stderr
    assert [n["state"] for n in testnet.nodes() if n["name"] == last["name"]] == ["dead"]
    restarted = plait("testnet", "restart", last["name"], "--dir", str(testnet.folder))
    assert restarted.returncode == 0, restarted.stderr
    assert testnet.run("--max-tokens", "4")["completion_tokens"] >= 1


def test_no_process_outlives_its_supervisor(tmp_path: Path) -> None:
    subject = Testnet(tmp_path / "net")
    subject.up("--stages", "1", "--replicas", "1")
    pids = [node["pid"] for node in subject.nodes()]
    subject.down()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
