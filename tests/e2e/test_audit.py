"""Audits on a live testnet with one dishonest node: it is exposed, honest ones are not.

The dishonest node is planted by ``plait.testing.dishonest``; every chunk is audited here.
"""

import asyncio
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from plait.client import AsyncClient, Options
from plait.client.audit_spool import TRUST_AFTER_MS, AuditRecord
from plait.client.lottery_keeper import LotteryKeeper
from plait.model import catalog
from plait.network_file import NetworkFile
from plait.testing.testnets import run_plait
from plait.testnet import cluster, launch
from plait.testnet.layout import place
from plait.types import PeerId

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
TINY = "tiny-random"
STAGES, LAYER = 3, 3
TOKENS = 40
ATTEMPTS = 6


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the testnet lives, who hosts the second span, and one host of each other span."""

    directory: Path
    liar: PeerId
    honest: PeerId
    auditors: frozenset[PeerId]

    def ignored(self, peer: PeerId) -> frozenset[PeerId]:
        """A route without these goes through ``peer``, has one host of each span, and leaves the
        other to audit it."""
        return self.auditors | ({self.liar, self.honest} - {peer})

    def bundle(self, peer: PeerId, name: str) -> Path:
        """The bundle of a generation whose second stage is ``peer``."""
        path = self.directory / name

        async def generate() -> bytes:
            async with AsyncClient(self.directory / "network.toml") as client:
                # A route is there before all hosts are in view; those needed here must be.
                async with asyncio.timeout(launch.ROUTE_TIMEOUT_S):
                    while len(client.view().offers) < 2 * STAGES:
                        await client.changed()
                ignore = self.ignored(peer)
                options = Options(max_tokens=TOKENS, bundle=True, ignore=ignore, raw=True)
                # A session that moved on a busy machine leaves no host that took no part.
                for _ in range(ATTEMPTS):
                    answer = await client.generate(TINY, "The sky is blue and", options)
                    if answer.epochs == 1:
                        break
                assert answer.bundle is not None
                return answer.bundle

        path.write_bytes(asyncio.run(generate()))
        return path

    def balance(self, *account: str) -> dict[str, int]:
        """``plait ledger balance``."""
        network = str(self.directory / "network.toml")
        done = run_plait("ledger", "balance", *account, "--network", network, "--json")
        assert done.returncode == 0, done.stderr
        figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return figures

    def audit(self, *arguments: str) -> tuple[int, dict[str, object]]:
        """``plait audit``: its exit code and its object."""
        network = str(self.directory / "network.toml")
        done = run_plait("audit", *arguments, "--network", network, "--json")
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    def request(self, bundle: Path, folder: Path) -> tuple[int, dict[str, object]]:
        """``plait audit request``, again while there was nobody to look at some lot.

        On a busy machine hosts fall out of view until their next offer.
        """
        for _ in range(ATTEMPTS):
            code, found = self.audit("request", str(bundle), "--evidence", str(folder))
            lots = found["lots"]
            assert isinstance(lots, list)
            if all(one["outcome"] != "unaudited" for one in lots):
                break
        return code, found


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("audited")
    mark = tmp_path_factory.mktemp("mark") / "liar"
    layers = catalog.load(TINY).manifest.layers
    liar = (sys.executable, "-P", "-m", "plait.testing.dishonest", "skipped-layer", str(LAYER))
    with pytest.MonkeyPatch.context() as patched:
        audited = functools.partial(NetworkFile, audit_rate_percent=100)
        patched.setattr(cluster, "NetworkFile", audited)
        process = launch.start(
            directory,
            place(layers, nodes=None, stages=STAGES, replicas=2),
            model=TINY,
            with_parent=True,
            command=(*liar, str(mark)),
        )
    try:
        launch.wait_until_ready(
            directory, process, timeout_s=launch.START_TIMEOUT_S, tell=lambda text: None
        )
        launch.issue_credit(directory)
        launch.wait_until_routable(directory, TINY, timeout_s=launch.ROUTE_TIMEOUT_S)
        status = run_plait("testnet", "status", "--dir", str(directory), "--json")
        nodes = json.loads(status.stdout.splitlines()[-1])["nodes"]
        hosts = [node for node in nodes if node["span"] and node["span"][0] == LAYER]
        [lying] = [node["peer"] for node in hosts if str(node["pid"]) == mark.read_text()]
        [honest] = [node["peer"] for node in hosts if node["peer"] != lying]
        auditors = {node["span"][0]: PeerId(node["peer"]) for node in nodes if node["span"]}
        del auditors[LAYER]
        yield Stage(directory, PeerId(lying), PeerId(honest), frozenset(auditors.values()))
    finally:
        launch.abandon(directory, process)


def test_the_dishonest_node_is_exposed_and_anybody_can_judge_again(net: Stage) -> None:
    bundle, folder = net.bundle(net.liar, "lie.json"), net.directory / "evidence"
    code, found = net.request(bundle, folder)
    lots = found["lots"]
    assert isinstance(lots, list)
    assert {one["stage"] for one in lots} == set(range(STAGES)) and len(lots) >= 2 * STAGES
    for one in lots:
        assert one["outcome"] == ("exposed" if one["stage"] == 1 else "consistent"), one
    assert code == 1
    exposed = [one for one in lots if one["outcome"] == "exposed"]
    assert {one["peer"] for one in exposed} == {net.liar}
    code, judged = net.audit("check", exposed[0]["evidence"])
    assert (code, judged["outcome"], judged["peer"]) == (1, "exposed", net.liar)

    # The testnet's one judge computes it once more; the ledger forfeits on its signature.
    judgement = net.directory / "judgement"
    judge = ("--key", str(net.directory / "issuer" / "judge.key"), "--out", str(judgement))
    code, found = net.audit("judge", exposed[0]["evidence"], *judge)
    assert (code, found["outcome"]) == (0, "exposed")
    before, escrow = net.balance(), net.balance(net.liar)["escrow_microcredits"]
    code, filed = net.audit("file", str(judgement))
    assert (code, filed.get("payee")) == (0, net.liar), filed
    amount = filed["forfeited_microcredits"]
    assert isinstance(amount, int) and 0 < amount <= escrow
    assert net.balance(net.liar)["escrow_microcredits"] == escrow - amount
    assert net.balance()["available_microcredits"] == before["available_microcredits"] + amount
    code, again = net.audit("file", str(judgement))
    assert (code, again["forfeited_microcredits"]) == (0, 0)
    audited = run_plait("ledger", "audit", "--network", str(net.directory / "network.toml"))
    assert audited.returncode == 0, audited.stdout + audited.stderr
    # Of an honest stage there is nothing that a judge would sign.
    honest = next(one for one in lots if one["outcome"] == "consistent")
    judge = (*judge[:-1], str(net.directory / "nothing"))
    code, _ = net.audit("judge", honest["evidence"], *judge, "--model", TINY)
    assert code == 1 and not (net.directory / "nothing").exists()


def stages_of(records: tuple[AuditRecord, ...]) -> dict[str, int]:
    """How many stages of each session were audited."""
    stages = {(one.session, one.stage) for one in records}
    return Counter(session for session, _ in stages)


def test_the_lottery_is_held_without_being_asked(net: Stage) -> None:
    """A client leaves a session behind; the next one of its account has it audited."""
    network = net.directory / "network.toml"

    async def play() -> tuple[AuditRecord, ...]:
        options = Options(max_tokens=TOKENS, ignore=net.ignored(net.liar), raw=True)
        async with AsyncClient(network) as client:
            for _ in range(ATTEMPTS):
                answer = await client.generate(TINY, "The sky is blue and", options)
                if answer.epochs == 1:
                    break
        async with AsyncClient(network, audits=False) as client:
            ahead_ms = 10_000
            spool, audit = client.audit_spool, client.audit
            keeper = LotteryKeeper(spool, audit, lambda: time.time_ns() // 10**6 + ahead_ms)
            while STAGES not in stages_of(spool.records()).values() and ahead_ms < TRUST_AFTER_MS:
                # On a busy machine an auditor may have been out of reach: it is asked again, later.
                if not await keeper.look_once():
                    ahead_ms += 10_000
            return spool.records()

    records = asyncio.run(play())
    assert STAGES in stages_of(records).values(), records
    for one in records:
        expected = "exposed" if one.peer == net.liar else "consistent"
        assert one.outcome == expected, one
    exposed = [one for one in records if one.outcome == "exposed"]
    code, judged = net.audit("check", exposed[0].evidence, "--model", TINY)
    assert (code, judged["outcome"], judged["peer"]) == (1, "exposed", net.liar)
    code, listed = net.audit("ls")
    assert code == 1 and listed["passed"] == {}, "nothing counts before the window is over"


def test_a_lying_auditor_accuses_an_honest_stage_in_vain(net: Stage) -> None:
    bundle, folder = net.bundle(net.honest, "honest.json"), net.directory / "accusations"
    _, found = net.request(bundle, folder)
    lots = found["lots"]
    assert isinstance(lots, list)
    for one in lots:
        assert one["outcome"] in ("consistent", "exposed"), str(one)
        if one["auditor"] != net.liar:
            assert one["outcome"] == "consistent", one
        code, judged = net.audit("check", one["evidence"], "--model", TINY)
        assert (code, judged["outcome"]) == (0, "consistent"), judged
