"""A key with a budget on a real network: 200 requests at once, a budget for 20, a real ledger."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from plait.client import Client, Options
from plait.errors import LedgerError
from plait.testing.testnets import Testnet, serving

MODEL = "tiny-random"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "The sea."}], "max_tokens": 4}
REQUESTS = 200
WORTH = 20

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request gave."""

    status: int
    body: dict[str, Any]

    @property
    def cost(self) -> int:
        """Microcredits."""
        return int(self.body["usage"]["cost"]) if self.status == 200 else 0


def ask(url: str, path: str, body: object, secret: str) -> Asked:
    headers = {"content-type": "application/json", "authorization": f"Bearer {secret}"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return Asked(response.status, json.loads(response.read()))
    except urllib.error.HTTPError as error:
        return Asked(error.code, json.loads(error.read()))


@pytest.fixture(scope="module")
def net(own_testnet: Callable[..., Testnet]) -> Testnet:
    """One of its own: once there are keys, other gateways of the account want one."""
    return own_testnet()


@pytest.fixture
def serve(net: Testnet) -> Iterator[Callable[[], str]]:
    """Starts a gateway with the account's keys; gives its base URL."""
    with ExitStack() as running:

        def start() -> str:
            running.close()
            arguments = ("--network", str(net.network))
            return running.enter_context(serving(*arguments, environment=net.environment)).url

        yield start


def key_of(net: Testnet, *terms: str) -> tuple[str, str]:
    """A new key's id and secret."""
    made = net.json("keys", "create", "test", *terms, "--network", str(net.network))
    return made["id"], made["key"]


def shares(net: Testnet) -> dict[str, dict[str, Any]]:
    """Sub-accounts by name, as the ledger has them."""
    listed = net.json("ledger", "sub-accounts", "--network", str(net.network))
    return {share["name"]: share for share in listed["sub_accounts"]}


def test_many_requests_at_once_do_not_spend_more_than_the_budget(
    net: Testnet, serve: Callable[[], str]
) -> None:
    _, free = key_of(net)
    url = serve()
    assert ask(url, "/chat/completions", BODY, free).status == 200  # the network is known now
    price = ask(url, "/quote", BODY, free).body["price_microcredits"]
    budget = WORTH * (round(1.5 * price) + 1)
    name, secret = key_of(net, "--budget", str(budget), "--period", "total")

    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = list(
            pool.map(lambda _: ask(url, "/chat/completions", BODY, secret), range(REQUESTS))
        )

    assert {one.status for one in asked} <= {200, 402, 503}, asked
    assert any(one.status == 402 for one in asked)
    answered = [one for one in asked if one.status == 200]
    assert len(answered) >= WORTH // 2
    spent = sum(one.cost for one in answered)
    assert 0 < spent <= budget
    usage: Any = net.json("keys", "ls", "--network", str(net.network))
    [own] = [key for key in usage if key["id"] == name]
    assert own["spent"] == spent

    serve()  # ends the first one in good order: every session is settled by then
    share = shares(net)[name]
    assert share["pending_microcredits"] == 0
    assert share["used_microcredits"] == spent
    audit = net.json("ledger", "audit", "--network", str(net.network))
    assert audit["balanced"]
    assert audit["violations"] == []


def test_the_ledger_keeps_a_budget_that_the_gateway_does_not(
    net: Testnet, serve: Callable[[], str]
) -> None:
    """Who draws on the key's share behind the gateway's back meets the ledger's limit."""
    name, secret = key_of(net, "--budget", "200", "--period", "total")
    url = serve()
    assert ask(url, "/chat/completions", BODY, secret).status == 200
    options = Options(max_tokens=4, sub_account=name, reuse=False)
    with Client(net.network, account=net.account, audits=False) as client:
        answers = 0
        with pytest.raises(LedgerError):
            while answers < REQUESTS:
                client.generate(MODEL, "The sea.", options)
                answers += 1
    share = shares(net)[name]
    assert 0 < share["used_microcredits"] <= 200
    assert answers > 0
    # The gateway believes that there is something left; the ledger refuses all the same.
    after = ask(url, "/chat/completions", BODY, secret)
    assert (after.status, after.body["error"]["code"]) == (402, "insufficient_quota")
