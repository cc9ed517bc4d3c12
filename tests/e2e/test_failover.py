"""A node dies in the middle of an answer, and no token of the answer changes."""

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from plait.client import Answer, AsyncClient, Options, TextDelta
from plait.errors import SessionLost
from plait.ledger.verify import verify_bundle
from plait.testing.testnets import Testnet

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


StartNet = Callable[..., Testnet]

PROMPT = "Tell me about rivers."
TOKENS = 150
AT_TOKEN = 20
ATTEMPTS = 4
"""The answer may take another route than the one planned a moment before: then again."""


def asked(seed: int = 7) -> Options:
    return Options(max_tokens=TOKENS, temperature=0.8, seed=seed, bundle=True)


async def disturbed(
    net: Testnet, client: AsyncClient, positions: tuple[int, ...], blow: signal.Signals
) -> tuple[Answer, list[str]]:
    """One answer during which the nodes at these places of the planned route are hit."""
    names = {node["peer"]: name for name, node in net.nodes().items()}
    planned = [stage.offer.peer for stage in client.plan(net.model, 20, asked()).stages]
    hit = [names[planned[position]] for position in positions]
    pids = [net.nodes()[name]["pid"] for name in hit]
    tokens, answer = 0, None
    async for item in client.stream(net.model, PROMPT, asked()):
        if isinstance(item, TextDelta):
            before, tokens = tokens, tokens + len(item.token_ids)
            if before < AT_TOKEN <= tokens:
                for pid in pids:
                    os.kill(pid, blow)
        else:
            answer = item
    assert answer is not None
    return answer, hit


async def until_usable(client: AsyncClient, count: int) -> None:
    """Return once so many nodes are offered as ready."""
    async with asyncio.timeout(60):
        while sum(offer.state == "ready" for offer in client.view().offers.values()) < count:
            await client.changed()


@pytest.mark.parametrize(
    ("positions", "blow"),
    [
        ((0,), signal.SIGKILL),
        ((1,), signal.SIGKILL),
        ((2,), signal.SIGKILL),
        ((0, 2), signal.SIGKILL),
        ((1,), signal.SIGSTOP),
    ],
    ids=["first", "middle", "last", "first-and-last", "hung"],
)
def test_a_lost_node_changes_no_token(
    testnet: StartNet, positions: tuple[int, ...], blow: signal.Signals
) -> None:
    net = testnet(stages=3, replicas=2)

    async def scenario() -> None:
        async with AsyncClient(net.network, account=net.account) as client:
            await client.wait_ready(net.model)
            await until_usable(client, 6)
            wanted = await client.generate(net.model, PROMPT, asked())
            for _ in range(ATTEMPTS):
                answer, hit = await disturbed(net, client, positions, blow)
                for name in hit:
                    if blow == signal.SIGSTOP:
                        os.kill(net.nodes()[name]["pid"], signal.SIGCONT)
                    else:
                        net.control("restart", name)
                await until_usable(client, 6)
                assert answer.token_ids == wanted.token_ids
                assert answer.text == wanted.text
                report = verify_bundle(answer.bundle or b"", client.network)
                false = [claim for claim in report.claims if claim.ok is False]
                assert not false, false
                if answer.epochs > 1:
                    return
        pytest.fail("every answer took another route than the planned one")

    asyncio.run(scenario())


def test_without_a_replica_the_session_waits_and_then_says_so(own_testnet: StartNet) -> None:
    net = own_testnet()

    async def scenario() -> None:
        async with AsyncClient(net.network, account=net.account) as client:
            await client.wait_ready(net.model)
            last = next(name for name, node in net.nodes().items() if node["span"] == [6, 8])
            pid = net.nodes()[last]["pid"]
            options = Options(max_tokens=TOKENS, seed=1, replica_wait_s=1.0)
            delivered = 0
            with pytest.raises(SessionLost) as lost:
                async for item in client.stream(net.model, PROMPT, options):
                    if isinstance(item, TextDelta):
                        delivered += len(item.token_ids)
                        if delivered == AT_TOKEN:
                            os.kill(pid, signal.SIGKILL)
            assert lost.value.resumable_from >= AT_TOKEN
            assert lost.value.remedy

    asyncio.run(scenario())
    # The account has paid for what was delivered at most; nothing is short or left over.
    audit = net.json("ledger", "audit", "--network", str(net.network))
    assert audit["balanced"]
    assert audit["violations"] == []
