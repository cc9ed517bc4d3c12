"""``plait serve`` as a process on a real testnet, asked over plain HTTP."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from plait.client import Answer, AsyncClient, Client, Options, TextDelta
from plait.errors import ConfigError, LocalProtocolError
from plait.testing.testnets import ServedGateway, Testnet, serving
from plait.types import Sampling

MODEL = "tiny-random"
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "sea": {"type": "boolean"}},
    "required": ["name", "sea"],
    "additionalProperties": False,
}

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@dataclass(frozen=True, slots=True)
class Served:
    """A running gateway."""

    gateway: ServedGateway

    def connect(self) -> http.client.HTTPConnection:
        """A new connection to it."""
        return http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=60)

    def ask(
        self, method: str, path: str, body: object = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """One request and its whole response."""
        connection = self.connect()
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"content-type": "application/json"})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def chat(self, **fields: Any) -> tuple[http.client.HTTPResponse, bytes]:
        """A chat."""
        body = {"model": MODEL, "messages": MESSAGES, "temperature": 0} | fields
        return self.ask("POST", "/v1/chat/completions", body)


@contextmanager
def started(net: Testnet) -> Iterator[Served]:
    with serving("--network", str(net.network), environment=net.environment) as gateway:
        yield Served(gateway)


@pytest.fixture(scope="module")
def net(testnet: Callable[..., Testnet]) -> Testnet:
    """Four nodes: three spans and a second host of the first."""
    return testnet()


@pytest.fixture(scope="module")
def served(net: Testnet) -> Iterator[Served]:
    with started(net) as gateway:
        yield gateway


def test_models_and_readiness(served: Served) -> None:
    _, answer = served.chat(max_tokens=1)  # By then the network is known.
    assert "choices" in json.loads(answer)
    response, body = served.ask("GET", "/ready")
    assert (response.status, json.loads(body)["models"]) == (200, [MODEL])
    [model] = json.loads(served.ask("GET", "/v1/models")[1])["data"]
    assert (model["id"], model["coverage"]["hosts"]) == (MODEL, 4)


def test_an_answer_is_the_same_whole_streamed_and_from_the_command_line(
    net: Testnet, served: Served
) -> None:
    response, body = served.chat(max_tokens=12)
    whole = json.loads(body)
    text = whole["choices"][0]["message"]["content"]
    # Which hosts it goes through depends on how busy each is.
    route = response.headers["x-plait-route"].split(",")
    assert route[0].startswith("0:") and "=12D3" in route[0]
    assert whole["usage"]["cost"] > 0
    response, body = served.chat(max_tokens=12, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done = [part.removeprefix("data: ") for part in body.decode().strip().split("\n\n")]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    # What is cached, and so the cost, depends on the route that either took.
    for figure in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][figure] == whole["usage"][figure]
    assert chunks[-1]["usage"]["cost"] > 0
    printed = net.run(MESSAGES[0]["content"], "--max-tokens", "12")
    assert printed["text"] == text
    assert printed["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_bundle_can_be_fetched_and_verified(net: Testnet, served: Served, tmp_path: Path) -> None:
    response, _ = served.chat(max_tokens=8, plait={"bundle": True})
    response, bundle = served.ask("GET", response.headers["x-plait-bundle"])
    assert response.status == 200
    path = tmp_path / "bundle.json"
    path.write_bytes(bundle)
    report = net.json("verify", str(path), "--network", str(net.network))
    assert report["outcome"] == "verified"


def test_a_stop_sequence_ends_the_answer_early(served: Served) -> None:
    text = json.loads(served.chat(max_tokens=24)[1])["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    body = json.loads(served.chat(max_tokens=24, stop=[stop])[1])
    assert body["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_logprobs_and_a_schema_come_from_the_last_stage(served: Served) -> None:
    body = json.loads(served.chat(max_tokens=6, logprobs=True, top_logprobs=3)[1])
    known = body["choices"][0]["logprobs"]["content"]
    assert len(known) == body["usage"]["completion_tokens"]
    for token in known:
        tops = [top["logprob"] for top in token["top_logprobs"]]
        assert len(tops) == 3
        # Greedy: what was drawn is the likeliest.
        assert token["logprob"] == tops[0] == max(tops) < 0
    wanted = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    fields = {"max_tokens": 120, "temperature": 1, "seed": 4, "response_format": wanted}
    [choice] = json.loads(served.chat(**fields)[1])["choices"]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]).keys() == {"name", "sea"}


def test_embeddings_are_those_of_the_library(net: Testnet, served: Served) -> None:
    asked = {"model": MODEL, "input": ["The sea.", "The sky.", "The sea."]}
    response, body = served.ask("POST", "/v1/embeddings", asked)
    answer = json.loads(body)
    sea, sky, again = (item["embedding"] for item in answer["data"])
    assert sea == again != sky
    assert sum(value * value for value in sea) == pytest.approx(1)
    assert answer["usage"]["cost"] == int(response.headers["x-plait-cost-microcredits"]) > 0
    with Client(net.network, account=net.account) as client:
        found = client.embed(MODEL, "The sea.", Options(bundle=True))
        # Other work at the same time changes the last bits, at most.
        assert list(found.values) == pytest.approx(sea, abs=1e-4)
        assert len(found.answer.route) == 3
        assert found.answer.receipts_verified == 3
        assert found.answer.bundle is not None


def test_a_stream_of_the_library_is_finished_in_good_order(net: Testnet) -> None:
    sampling = Sampling(temperature_micros=900_000, seed=3, top_logprobs=2)
    with Client(net.network, account=net.account) as client:
        stream = client.stream(MODEL, [40, 41, 42], Options(max_tokens=400, sampling=sampling))
        deltas, answer = list[TextDelta](), None
        for item in stream:
            if isinstance(item, Answer):
                answer = item
                continue
            deltas.append(item)
            if len(deltas) == 3:
                stream.finish()
    assert answer is not None
    assert (answer.finish_reason, answer.prompt_tokens, answer.seed) == ("ended", 3, 3)
    ids = [token for delta in deltas for token in delta.token_ids]
    assert ids == list(answer.token_ids)
    assert 3 <= len(ids) < 400
    assert all(len(top) == 2 for delta in deltas for top in delta.top_logprobs)
    assert [one for delta in deltas for one in delta.logprobs] == list(answer.logprobs)
    assert answer.settled
    assert answer.cost_microcredits > 0


def test_layers_of_the_clients_own(net: Testnet) -> None:
    with Client(net.network, account=net.account) as client:
        plain = client.generate(MODEL, "The sea.", Options(max_tokens=8))
    with Client(net.network, account=net.account, host="0:2") as client:
        with pytest.raises(LocalProtocolError, match="wait_ready"):
            client.plan(MODEL, 3)
        answer = client.generate(MODEL, "The sea.", Options(max_tokens=8))
        assert (answer.text, str(answer.route[0].span)) == (plain.text, "0:2")
        ours = answer.route[0].peer
        assert ours not in {step.peer for step in plain.route}
        assert client.plan(MODEL, 3).stages[0].offer.peer == ours
        with pytest.raises(ConfigError, match="hosted here"):
            client.openai()


def test_openais_client_over_a_gateway_of_the_clients_own(net: Testnet) -> None:
    pytest.importorskip("openai")
    with Client(net.network, account=net.account) as client:
        openai = client.openai()
        answer = openai.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
        assert answer.usage.completion_tokens == 4


def test_examples_run(net: Testnet, served: Served, tmp_path: Path) -> None:
    account = {"PLAIT_URL": served.gateway.url}

    def example(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *arguments],
            env=os.environ | net.environment | account,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    form = json.loads(example("extract.py", "Ada Lovelace was 36 years old."))
    assert form.keys() == {"name", "age"}
    example("library.py", MODEL, "Why is the sky blue?")
    report = net.json("verify", str(tmp_path / "answer.json"), "--network", str(net.network))
    assert report["outcome"] == "verified"


async def test_leaving_a_stream_frees_the_stages(net: Testnet, served: Served) -> None:
    fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1500, "stream": True, "seed": 3}
    connection = served.connect()
    async with AsyncClient(net.network) as client, asyncio.timeout(20):
        await client.wait_settled()
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(fields), headers)
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        # Other processes' state: there is nothing of ours to wait on.
        while not busy(client):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        response.close()
        connection.close()
        while busy(client):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    metrics = served.ask("GET", "/metrics")[1].decode()
    assert "plait_gateway_sessions_active 0.0" in metrics


def busy(client: AsyncClient) -> bool:
    """Whether any stage says that it holds a session or its pages."""
    return any(
        offer.sessions_active or offer.kv_tokens_free < offer.kv_tokens_total
        for offer in client.view().offers.values()
    )


def test_a_bound_that_cannot_be_kept_and_a_model_that_is_unknown(served: Served) -> None:
    response, body = served.chat(provider={"max_price": 0})
    assert (response.status, response.headers["x-should-retry"]) == (400, "false")
    assert json.loads(body)["error"]["param"] == "provider.max_price"
    assert served.chat(model="none")[0].status == 404


def test_sigterm_ends_streams_and_the_process(net: Testnet) -> None:
    with started(net) as served:
        connection = served.connect()
        fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1500, "stream": True}
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(fields), headers)
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        served.gateway.process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
        assert json.loads(rest.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        connection.close()
        assert served.gateway.process.wait(20) == 0


def test_unsafe_and_impossible_addresses_are_refused(net: Testnet, served: Served) -> None:
    network = ("--network", str(net.network))
    refused = net.plait("serve", "--host", "0.0.0.0", *network, expect=3)
    assert "API keys" in refused.stderr
    refused = net.plait("serve", "--port", str(served.gateway.port), *network, expect=3)
    assert f"127.0.0.1:{served.gateway.port}" in refused.stderr
