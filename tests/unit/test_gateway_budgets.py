"""Keys, holds and usage: nothing is overspent, and nothing is forgotten in a crash."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from plait.envelope import digest, encode, seal
from plait.errors import CapacityError, ConfigError, LedgerError, SessionLost
from plait.gateway.app import Gateway
from plait.gateway.budgets import Key, Rate, Share, Team, day_of, period_start
from plait.gateway.config import GatewayConfig
from plait.gateway.key_store import KEYS_FILE, Cashier, KeyStore, OverBudget, Spent, has_keys
from plait.gateway.port import Ask, Stream
from plait.gateway.upstream import limits_of
from plait.ledger.journal import Books, Command, Issue, Refusal, Reserve, SetSubAccount
from plait.ledger.sub_accounts import SubAccount, terms_message
from plait.model import catalog
from plait.testing.accounting import key_of
from plait.testing.upstream import FakeUpstream, peer_at
from plait.types import AccountId, Span
from plait.v1.ledger_pb2 import BudgetReservation, IssueOrder, PayeeAmount, SubAccountOrder

MODEL = "tiny-random"
WEDNESDAY_MS = 1_795_564_800_000  # 2026-11-25
DAY_MS = 86_400_000


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "client" / KEYS_FILE


@pytest.fixture
def store(path: Path) -> Iterator[KeyStore]:
    opened = KeyStore(path)
    yield opened
    opened.close()


def hold(store: KeyStore, key: Key, amount: int, now_ms: int = WEDNESDAY_MS) -> int | OverBudget:
    [found] = store.transact([lambda: store.hold(key, MODEL, amount, now_ms, 1_000)])
    return found


@pytest.mark.parametrize(
    ("period", "start"),
    [
        ("day", "2026-11-25"),
        ("week", "2026-11-23"),
        ("month", "2026-11-01"),
        ("total", "0000-00-00"),
    ],
)
def test_periods_begin_where_people_expect(period: Any, start: str) -> None:
    assert day_of(WEDNESDAY_MS) == "2026-11-25"
    assert period_start(period, WEDNESDAY_MS + DAY_MS - 1) == start


def test_a_rate_fills_evenly() -> None:
    rate = Rate.full(2, 0.0)
    assert [rate.take(0.0) for _ in range(3)] == [True, True, False]
    assert (rate.remaining, rate.next_s, rate.reset_s) == (0, 30.0, 60.0)
    assert rate.take(30.0)
    assert not rate.take(59.0)
    assert rate.take(10_000.0)
    assert rate.remaining == 1


def test_a_key_is_found_by_its_secret_until_it_is_revoked(path: Path, store: KeyStore) -> None:
    key = Key(
        id="key-1",
        label="editor",
        team="physics",
        budget=5,
        rate=9,
        models=frozenset({MODEL}),
        peers=frozenset({"p"}),
        qos="batch",
        created_ms=7,
    )
    secret = store.create(key)
    assert secret.encode() not in path.read_bytes() + Path(f"{path}-wal").read_bytes()
    assert path.stat().st_mode & 0o077 == 0
    assert store.find(secret) == key
    assert store.find(secret + "x") is None
    assert store.revoke("key-1", 8)
    assert not store.revoke("key-1", 9)
    assert store.find(secret) is None
    assert [known.revoked_ms for known in store.all_keys()] == [8]
    assert has_keys(path)


def test_holds_count_like_money_and_settle_to_what_was_used(store: KeyStore) -> None:
    key = Key(id="k", budget=100, period="day")
    first = hold(store, key, 60)
    assert isinstance(first, int)
    assert hold(store, key, 41) == OverBudget(41, 40, 100, "day")
    assert isinstance(hold(store, key, 40), int)
    store.transact([lambda: store.settle(first, Spent(3, 4, 10))])
    assert store.spent(key, WEDNESDAY_MS) == 50
    assert hold(store, key, 51) == OverBudget(51, 50, 100, "day")
    store.transact([lambda: store.settle(first, Spent(3, 4, 10))])  # twice is once
    assert store.spent(key, WEDNESDAY_MS) == 50


def test_a_hold_nobody_settles_is_charged_in_full(path: Path, store: KeyStore) -> None:
    key = Key(id="k", budget=100, period="day")
    store.create(key)
    hold(store, key, 60)
    other = KeyStore(path)  # another process, after a crash
    assert other.spent(key, WEDNESDAY_MS) == 60
    assert hold(other, key, 41, WEDNESDAY_MS + 2_000) == OverBudget(41, 40, 100, "day")
    [row] = other.usage()
    assert (row.cost, row.requests, row.day) == (60, 1, "2026-11-25")
    assert other.spent(key, WEDNESDAY_MS + DAY_MS) == 0
    assert isinstance(hold(other, key, 100, WEDNESDAY_MS + DAY_MS), int)
    other.close()


def test_a_failed_transaction_changes_nothing(store: KeyStore) -> None:
    key = Key(id="k", budget=100)

    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.transact([lambda: store.hold(key, MODEL, 50, WEDNESDAY_MS, 1), fail])
    assert store.spent(key, WEDNESDAY_MS) == 0


@pytest.mark.parametrize("gateways", [1, 3])
async def test_two_hundred_at_once_against_a_budget_for_twenty(path: Path, gateways: int) -> None:
    key = Key(id="k", budget=20 * 50 + 49)
    cashiers = [Cashier(path, lambda: WEDNESDAY_MS, 1_000) for _ in range(gateways)]
    held = await asyncio.gather(
        *(cashiers[number % gateways].hold(key, MODEL, 50) for number in range(200))
    )
    assert sum(isinstance(found, int) for found in held) == 20
    for cashier in cashiers:
        cashier.close()


# Through the gateway ------------------------------------------------------------------


class Served:
    """A gateway with managed keys."""

    def __init__(self, path: Path, upstream: FakeUpstream) -> None:
        self.upstream = upstream
        self.gateway = Gateway(upstream, "net", GatewayConfig(key_store=path))
        self.app = self.gateway.app()

    @property
    def cashier(self) -> Cashier:
        assert self.gateway.cashier is not None
        return self.gateway.cashier

    async def get(self, path: str, secret: str) -> tuple[int, dict[str, str], Any]:
        return await self.post(path, secret, None, method="GET")

    async def chat(
        self, secret: str, left: asyncio.Event | None = None, **fields: Any
    ) -> tuple[int, dict[str, str], Any]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields
        return await self.post("/v1/chat/completions", secret, body, left)

    async def post(
        self,
        path: str,
        secret: str,
        body: Any,
        left: asyncio.Event | None = None,
        method: str = "POST",
    ) -> tuple[int, dict[str, str], Any]:
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"x-api-key", secret.encode()),
            ],
        }
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
        status, headers, data = 0, {}, b""

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await (asyncio.Future() if left is None else left.wait())
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal status, headers, data
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {name.decode(): value.decode() for name, value in message["headers"]}
            data += message.get("body", b"")

        await self.app(scope, receive, send)
        return status, headers, json.loads(data) if data.startswith(b"{") else data


def made(path: Path, **terms: Any) -> str:
    store = KeyStore(path)
    secret = store.create(Key(id=f"key-{len(store.all_keys())}", **terms))
    store.close()
    return secret


def held(path: Path) -> int:
    store = KeyStore(path)
    [(amount,)] = store._rows("SELECT coalesce(sum(amount), 0) FROM holds")
    store.close()
    return int(amount)


def usage_of(path: Path) -> list[tuple[int, int, int]]:
    store = KeyStore(path)
    rows = [(row.requests, row.completion_tokens, row.cost) for row in store.usage()]
    store.close()
    return rows


async def test_a_budget_holds_against_many_requests_at_once(path: Path) -> None:
    upstream = FakeUpstream(gate=asyncio.Event())
    price = upstream.plan(MODEL, 18, _options(3)).predicted.price_microcredits
    most = round(1.5 * price) + 1
    upstream.cost = most
    secret = made(path, budget=20 * most, period="total")
    served = Served(path, upstream)

    refusals = 0

    async def ask() -> tuple[int, dict[str, str], Any]:
        nonlocal refusals
        reply = await served.chat(secret, max_tokens=3)
        refusals += reply[0] == 402
        if refusals == 180 and upstream.gate is not None:
            upstream.gate.set()  # the twenty run until all others were refused
        return reply

    async with asyncio.timeout(20):
        replies = await asyncio.gather(*(ask() for _ in range(200)))
    statuses = [status for status, _, _ in replies]
    assert (statuses.count(200), statuses.count(402)) == (20, 180)
    refused = next(body for status, _, body in replies if status == 402)
    assert refused["error"]["code"] == "insufficient_quota"
    assert len(upstream.asked) == 20
    assert {ask.options.max_price for ask in upstream.asked} == {most}
    assert (await served.chat(secret, max_tokens=3))[0] == 402
    served.gateway.close()
    assert usage_of(path) == [(20, 60, 20 * most)]


def _options(max_tokens: int) -> Any:
    from plait.client import Options

    return Options(max_tokens=max_tokens)


@pytest.mark.parametrize("error", [CapacityError("full"), SessionLost("gone")])
async def test_what_fails_is_charged_what_its_vouchers_promise(path: Path, error: Any) -> None:
    secret = made(path, budget=10**9)
    served = Served(path, FakeUpstream(error=error, after=2, vouched=4300, cut=21))
    assert (await served.chat(secret, n=2))[0] == 503
    served.gateway.close()
    [(requests, tokens, cost)] = usage_of(path)
    assert (requests, cost) == (1, 2 * 4321)
    assert tokens in range(2, 5)


async def test_what_used_nothing_leaves_no_trace(path: Path) -> None:
    secret = made(path, budget=10**9)
    served = Served(path, FakeUpstream(error=CapacityError("full")))
    assert (await served.chat(secret))[0] == 503
    served.gateway.close()
    assert usage_of(path) == []
    assert held(path) == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prefill", [False, True])
async def test_who_leaves_is_charged_what_the_vouchers_promise(
    path: Path, stream: bool, prefill: bool
) -> None:
    """Also in the prompt, where nothing came yet; and no more where stages had it cached."""
    never, left = asyncio.Event(), asyncio.Event()
    upstream = FakeUpstream(vouched=11, cut=2)
    upstream.hush, upstream.gate = (never, None) if prefill else (None, never)
    secret = made(path, budget=10**9)
    served = Served(path, upstream)
    async with asyncio.TaskGroup() as group:
        group.create_task(served.chat(secret, left, stream=stream))
        await upstream.started.wait()
        left.set()
    await served.cashier.flush()
    assert held(path) == 0
    assert usage_of(path) == [(1, 0 if prefill else 1, 13)]
    _, _, metrics = await served.get("/metrics", secret)
    text = metrics.decode()
    assert f'plait_gateway_cost_microcredits_total{{model="{MODEL}"}} 13.0' in text
    told = "200" if stream and not prefill else "499"
    assert f'endpoint="/v1/chat/completions",status="{told}"}} 1.0' in text
    served.gateway.close()


async def test_embeddings_are_held_and_charged(path: Path) -> None:
    secret = made(path, budget=10**9)
    served = Served(path, FakeUpstream(cost=11))
    body = {"model": MODEL, "input": ["a", "b"]}
    assert (await served.post("/v1/embeddings", secret, body))[0] == 200
    poor = made(path, budget=1)
    assert (await served.post("/v1/embeddings", poor, body))[0] == 402
    assert len(served.upstream.asked) == 2
    served.gateway.close()
    assert usage_of(path) == [(1, 2, 22)]


async def test_a_key_keeps_to_its_models_peers_and_rate(path: Path) -> None:
    here, there = str(peer_at(Span(0, 5))), str(peer_at(Span(5, 8)))
    served = Served(path, FakeUpstream())
    other = made(path, models=frozenset({"smollm2-135m"}))
    for path_, fields in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/quote", {"prompt_tokens": 5}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        status, _, body = await served.post(path_, other, {"model": MODEL} | fields)
        assert (status, body["error"]["code"]) == (403, "model_not_allowed")
    assert (await served.get("/v1/models", other))[2]["data"] == []
    assert (await served.get(f"/v1/models/{MODEL}", other))[0] == 403
    bound = made(path, peers=frozenset({here, there}), qos="batch")
    assert (await served.chat(bound))[0] == 200
    ask = served.upstream.asked[-1]
    assert (ask.options.only, ask.qos) == (frozenset({here, there}), "batch")
    assert (await served.chat(bound, provider={"only": ["x"]}))[0] == 403
    asked = {"model": MODEL, "prompt_tokens": 5}
    assert (await served.get("/v1/models", bound))[2]["data"][0]["id"] == MODEL
    assert (await served.post("/v1/quote", bound, asked | {"provider": {"only": ["x"]}}))[0] == 403
    half = made(path, peers=frozenset({here}))
    status, headers, body = await served.chat(half)
    assert (status, body["error"]["code"]) == (403, "peer_not_allowed")
    assert (await served.post("/v1/quote", half, asked))[0] == 403
    assert headers["x-should-retry"] == "false"
    assert len(served.upstream.asked) == 1
    rated = made(path, rate=2)
    replies = [await served.chat(rated) for _ in range(3)]
    assert [status for status, _, _ in replies] == [200, 200, 429]
    assert [headers["x-ratelimit-remaining-requests"] for _, headers, _ in replies] == [
        "1",
        "0",
        "0",
    ]
    assert int(replies[2][1]["retry-after"]) in range(1, 31)
    _, headers, _ = await served.get("/v1/models", rated)  # told, not counted
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert (await served.chat("plait-wrong"))[0] == 401
    served.gateway.close()


# At the ledger ------------------------------------------------------------------------

OWNER, PAYEE, ISSUER = key_of("owner"), key_of("payee"), key_of("issuer")
ACCOUNT = AccountId(OWNER.peer_id)


@dataclass
class Ledgered(FakeUpstream):
    """Every answer first reserves its limit in real books, which keep the shares' limits."""

    books: Books = field(default_factory=lambda: Books("net"))
    now_ms: int = WEDNESDAY_MS
    sessions: int = 0

    def fund(self, amount: int) -> None:
        order = IssueOrder(
            network_id="net",
            account=ACCOUNT,
            amount=amount,
            order_id=b"1",
            issued_ms=self.now_ms,
        )
        self.apply(Issue(order, digest(encode(seal(ISSUER, order)))))

    def apply(self, command: Command) -> None:
        outcome = self.books.apply(command, self.now_ms)
        if isinstance(outcome, Refusal):
            raise LedgerError(f"the ledger refused: {outcome.code}: {outcome.reason}")

    async def set_share(self, share: Share) -> None:
        await super().set_share(share)
        known = self.books.sub_accounts.of(ACCOUNT).get(share.name)
        number = known.sequence + 1 if known else 1
        terms = SubAccount(ACCOUNT, share.name, number, *limits_of(share))
        order = SubAccountOrder(network_id="net", terms=terms_message(terms))
        self.apply(SetSubAccount(order, digest(encode(order))))

    def stream(self, ask: Ask) -> Stream:
        self.sessions += 1
        amount = ask.options.max_price or 0
        message = BudgetReservation(
            network_id="net",
            account=ACCOUNT,
            sequence=self.books.next_sequence(ACCOUNT, 0),
            session_id=self.sessions.to_bytes(16),
            amount=amount,
            caps=[PayeeAmount(payee=PAYEE.peer_id, microcredits=amount)],
            issued_ms=self.now_ms,
            expires_ms=self.now_ms + 60_000,
            sub_account=ask.options.sub_account,
        )
        self.apply(Reserve(message, digest(encode(message))))
        return super().stream(ask)


def price_of(upstream: FakeUpstream) -> int:
    price = upstream.plan(MODEL, 18, _options(3)).predicted.price_microcredits
    return round(1.5 * price) + 1


async def test_the_ledger_keeps_a_budget_that_two_gateways_do_not_know_of(tmp_path: Path) -> None:
    """The same key on two machines: each file allows all of it, the ledger allows it once."""
    upstream = Ledgered()
    most = upstream.cost = price_of(upstream)
    upstream.fund(10_000 * most)
    one, other = tmp_path / "one" / KEYS_FILE, tmp_path / "other" / KEYS_FILE
    secret = made(one, budget=20 * most, period="month")
    other.parent.mkdir()
    shutil.copy(one, other)
    gateways = [Served(one, upstream), Served(other, upstream)]
    replies = await asyncio.gather(
        *(gateways[number % 2].chat(secret, max_tokens=3) for number in range(200))
    )
    statuses = [status for status, _, _ in replies]
    assert (statuses.count(200), statuses.count(402)) == (20, 180)
    by_ledger = [body for status, _, body in replies if status == 402 and "ledger" in str(body)]
    assert by_ledger
    assert all(body["error"]["code"] == "insufficient_quota" for body in by_ledger)
    use = upstream.books.sub_accounts.used(ACCOUNT, "key-0", upstream.now_ms)
    assert (use.period_used, use.terms.period_limit) == (20 * most, 20 * most)
    # The next month has its own.
    upstream.now_ms += 31 * DAY_MS
    assert upstream.books.sub_accounts.used(ACCOUNT, "key-0", upstream.now_ms).period_used == 0
    for gateway in gateways:
        gateway.gateway.close()


async def test_a_share_is_ordered_once_and_again_when_the_budget_changes(path: Path) -> None:
    upstream = FakeUpstream()
    secret = made(path, team="physics")
    served = Served(path, upstream)
    assert (await served.chat(secret))[0] == 200
    assert (upstream.shares, upstream.asked[-1].options.sub_account) == ([], "")
    store = KeyStore(path)
    for budget in (10**9, 10**8):
        store.set_team(Team("physics", budget, "week"))
        for _ in range(2):
            assert (await served.chat(secret))[0] == 200
    assert [(share.budget, share.period) for share in upstream.shares] == [
        (10**9, "week"),
        (10**8, "week"),
    ]
    name = upstream.shares[0].name
    assert "physics" not in name  # the log is public
    assert {ask.options.sub_account for ask in upstream.asked} == {"", name}
    own = made(path, team="physics", budget=10**7, period="day")
    assert (await served.chat(own))[0] == 200
    assert upstream.shares[-1] == Share("key-1", 10**7, "day")
    store.close()
    served.gateway.close()


def test_a_team_budget_bounds_all_its_keys_together(path: Path, store: KeyStore) -> None:
    store.set_team(Team("physics", 100, "day"))
    secrets = [
        store.create(Key(id="a", team="physics")),
        store.create(Key(id="b", team="physics", budget=90, period="day")),
        store.create(Key(id="c", team="maths")),
    ]
    first, second, third = (store.find(secret) for secret in secrets)
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.pool, third.pool) == (Team("physics", 100, "day"), None)
    number = hold(store, first, 60)
    assert isinstance(number, int)
    assert hold(store, second, 41) == OverBudget(41, 40, 100, "day", "the key's team")
    assert hold(store, second, 91) == OverBudget(91, 90, 90, "day")
    assert isinstance(hold(store, third, 10**6), int)
    store.revoke("a", WEDNESDAY_MS)
    store.transact([lambda: store.settle(number, Spent(1, 1, 50))])
    assert hold(store, second, 51) == OverBudget(51, 50, 100, "day", "the key's team")
    assert isinstance(hold(store, second, 50), int)
    # A new day, but what is held still counts.
    assert store.spent_by_team(Team("physics", 100, "day"), WEDNESDAY_MS + DAY_MS) == 50


# The commands -------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.cli import keys
    from plait.cli import usage as usage_command

    opened = tmp_path / KEYS_FILE
    monkeypatch.setattr(keys, "open_store", lambda network: KeyStore(opened))
    monkeypatch.setattr(usage_command, "open_store", lambda network: KeyStore(opened))
    runner = CliRunner()
    made_key = json.loads(
        runner.invoke(
            keys.app, ["create", "editor", "--team", "a", "--budget", "9", "--json"]
        ).stdout
    )
    peer = str(peer_at(Span(0, 5)))
    for wrong in ([""], ["x", "--model", "nope"], ["x", "--peer", "nope"]):
        assert isinstance(runner.invoke(keys.app, ["create", *wrong]).exception, ConfigError)
    terms = ["--model", MODEL, "--peer", peer, "--json"]
    bound = json.loads(runner.invoke(keys.app, ["create", "bound", *terms]).stdout)
    assert (bound["models"], bound["peers"]) == ([MODEL], [peer])
    assert runner.invoke(keys.app, ["revoke", bound["id"]]).exit_code == 0
    store = KeyStore(opened)
    found = store.find(made_key["key"])
    assert found is not None
    assert (found.id, found.budget, found.team) == (made_key["id"], 9, "a")
    number = hold(store, found, 5)
    assert isinstance(number, int)
    store.transact([lambda: store.settle(number, Spent(1, 2, 3))])
    store.close()
    listed, other = json.loads(runner.invoke(keys.app, ["ls", "--json"]).stdout)
    assert (listed["budget"], "key" in listed, other["peers"]) == (9, False, [peer])
    shown = runner.invoke(keys.app, ["ls"]).stdout
    assert "editor" in shown
    assert peer in shown
    told = runner.invoke(keys.app, ["team", "a", "--budget", "70", "--period", "week", "--json"])
    assert json.loads(told.stdout) == {"team": "a", "budget": 70, "period": "week"}
    listed, _ = json.loads(runner.invoke(keys.app, ["ls", "--json"]).stdout)
    assert (listed["team_budget"], listed["team_period"]) == (70, "week")
    assert "a of 70/week" in runner.invoke(keys.app, ["ls"]).stdout
    app = _as_app(usage_command.usage)
    [row] = json.loads(runner.invoke(app, ["--by", "team,day", "--json"]).stdout)
    assert row == {
        "team": "a",
        "day": "2026-11-25",
        "requests": 1,
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "cost": 3,
    }
    csv = runner.invoke(app, ["--csv", "-"]).stdout.splitlines()
    assert csv[0] == "key,day,model,requests,prompt_tokens,completion_tokens,cost"
    assert csv[1].endswith(f",2026-11-25,{MODEL},1,1,2,3")
    for wrong in (["--by", "moon"], ["--since", "monday"], ["--until", "20261125"], ["--csv", "/"]):
        assert isinstance(runner.invoke(app, wrong).exception, ConfigError)
    late = runner.invoke(app, ["--json", "--since", "2026-11-26"]).stdout
    assert json.loads(late) == []
    assert runner.invoke(keys.app, ["revoke", made_key["id"]]).exit_code == 0
    assert runner.invoke(keys.app, ["revoke", made_key["id"]]).exit_code != 0


def _as_app(function: Any) -> Any:
    import typer

    app = typer.Typer()
    app.command()(function)
    return app
