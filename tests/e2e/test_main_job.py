"""The main job on a real testnet of separate processes, with random weights for speed."""

import asyncio
import json
import os
import random
import select
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from plait.client import Answer, AsyncClient, Client, Options, TextDelta
from plait.ledger.verify import verify_bundle
from plait.network_file import load_network_file
from plait.testing.testnets import Testnet

PROMPT = "Tell me about the sea and the sky."
MODEL = "tiny-random"

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def net(testnet: Callable[..., Testnet]) -> Testnet:
    """Four nodes: three spans and a second host of the first."""
    return testnet()


def assert_covers(spans: list[tuple[int, int]]) -> None:
    """Three stages or more (the two hosts of the first span may share it) cover all layers."""
    assert len(spans) >= 3
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == 8


def test_status_lists_nodes_and_the_ledger(net: Testnet) -> None:
    nodes = net.nodes().values()
    assert [node["state"] for node in nodes] == ["ready"] * 5
    assert len([node for node in nodes if node["span"]]) == 4
    assert [node["roles"] for node in nodes if not node["span"]] == [["ledger"]]


def test_an_answer_crosses_three_stages_is_paid_and_verifies(net: Testnet, tmp_path: Path) -> None:
    bundle = str(tmp_path / "bundle.json")
    answer = net.run(PROMPT, "--max-tokens", "40", "--bundle", bundle)
    assert_covers([(stage["start"], stage["end"]) for stage in answer["route"]])
    assert answer["completion_tokens"] == len(answer["token_ids"]) <= 40
    assert answer["receipts_verified"] >= 6
    assert answer["cost_microcredits"] > 0
    network = ("--network", str(net.network))
    assert net.json("verify", bundle, *network)["outcome"] == "verified"
    report = net.json("ledger", "audit", *network)
    assert (report["balanced"], report["violations"]) == (True, [])
    balance = net.json("ledger", "balance", *network)
    assert balance["available_microcredits"] < 10_000_000


def test_a_flipped_bit_makes_a_bundle_false(net: Testnet, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    net.run(PROMPT, "--max-tokens", "8", "--bundle", str(bundle))
    data, network = bundle.read_bytes(), load_network_file(net.network)
    assert verify_bundle(data, network).outcome == "verified"
    chance = random.Random(1)
    for _ in range(200):
        bit = chance.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        report = verify_bundle(bytes(flipped), network)
        assert report.outcome == "false", bit
        assert any(claim.ok is False for claim in report.claims), bit
    bundle.write_bytes(data[:-1])
    net.plait("verify", str(bundle), "--network", str(net.network), expect=1)


def test_seeds_repeat_and_greedy_is_the_default(net: Testnet) -> None:
    sampled = [
        net.run(PROMPT, "--max-tokens", "12", "--temperature", "1", "--seed", seed)["token_ids"]
        for seed in ("7", "7", "8")
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    greedy = [net.run(PROMPT, "--max-tokens", "12")["token_ids"] for _ in range(2)]
    assert greedy[0] == greedy[1]


async def test_cancelling_frees_everything(net: Testnet) -> None:
    async with AsyncClient(net.network) as client:
        await client.wait_settled()
        stream = client.stream(MODEL, PROMPT, Options(max_tokens=400, temperature=1.0, seed=3))
        assert isinstance(await anext(stream), TextDelta)
        await stream.aclose()
        async with asyncio.timeout(5):
            # Another process's state: there is nothing of ours to wait on.
            while any(offer.sessions_active for offer in client.view().offers.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        answer = await client.generate(MODEL, PROMPT, Options(max_tokens=4))
        assert answer.completion_tokens >= 1


async def test_many_sessions_share_the_stages_and_agree(net: Testnet) -> None:
    async with AsyncClient(net.network) as client:
        options = Options(max_tokens=12)
        answers = await asyncio.gather(*(client.generate(MODEL, PROMPT, options) for _ in range(8)))
    assert len({answer.token_ids for answer in answers}) == 1


def test_the_blocking_client_streams_and_names_its_route(net: Testnet) -> None:
    with Client(net.network) as client:
        *deltas, answer = client.stream(MODEL, PROMPT, Options(max_tokens=12))
    assert isinstance(answer, Answer)
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    assert text == answer.text
    assert_covers([(step.span.start, step.span.end) for step in answer.route])


def test_route_says_why_each_peer_won_or_lost(net: Testnet) -> None:
    network = ("--network", str(net.network))
    account = net.json("route", MODEL, "--explain", *network)
    assert_covers([(stage["start"], stage["end"]) for stage in account["route"]])
    chosen = {stage["peer"] for stage in account["route"]}
    assert all(entry["reason"] for entry in account["rejected"])
    assert len(chosen | {entry["peer"] for entry in account["rejected"]}) == 4
    first = account["route"][0]["peer"]
    ignored = net.json("route", MODEL, "--explain", *network, "--ignore", first)
    assert [stage["start"] for stage in ignored["route"]] == [0, 3, 6]
    assert [(e["peer"], e["code"]) for e in ignored["rejected"]] == [(first, "ignored")]


def test_a_dead_node_is_named_by_its_layers_and_comes_back(net: Testnet) -> None:
    stages = [node for node in net.nodes().values() if node["span"]]
    last = max(stages, key=lambda node: int(node["span"][1]))
    net.control("kill", last["name"])
    refused = net.json("run", MODEL, "hello", "--network", str(net.network), expect=7)
    start, end = last["span"]
    assert f"{start}:{end}" in refused["error"]["message"]
    assert net.nodes()[last["name"]]["state"] == "dead"
    net.control("restart", last["name"])
    assert net.run(PROMPT, "--max-tokens", "4")["completion_tokens"] >= 1


def test_no_process_outlives_its_supervisor(own_testnet: Callable[..., Testnet]) -> None:
    net = own_testnet(stages=1)
    status = net.json("testnet", "status", "--dir", str(net.directory))
    pids = [node["pid"] for node in status["nodes"]]
    handles = [os.pidfd_open(pid) for pid in pids]
    os.kill(status["supervisor_pid"], signal.SIGKILL)
    for pid, handle in zip(pids, handles, strict=True):
        # A handle is readable once its process has ended, zombie or not.
        ended, _, _ = select.select([handle], [], [], 10.0)
        os.close(handle)
        assert ended, f"process {pid} outlived its supervisor"
    assert json.loads((net.directory / "testnet.json").read_text())
