"""A gateway over an engine that obeys: for clients whose suites test the API, not a model.

It answers a forced format with the least instance of its schema, calls the first tool when
tools are offered and no result is there yet, repeats the result otherwise, and says a fixed
sentence to everything else, at a fixed rate. Run as

    python -m plait.testing.obedient [--port PORT] [--interval-ms MS] [--endless] [--bare]

``--bare`` serves the engine without the gateway, for proxies to stand in front of.
"""

import argparse
import asyncio
import json
import re
import time
from typing import Any

import uvicorn

from plait.client import Options, TextDelta
from plait.gateway.app import Gateway
from plait.gateway.benchmark import offset_s
from plait.gateway.config import GatewayConfig
from plait.gateway.port import Ask
from plait.gateway.server import listen, server_config
from plait.heap import freeze_heap
from plait.model import catalog
from plait.model.tokenizer import Tokenizer
from plait.testing.bare import bare_app
from plait.testing.upstream import FakeUpstream
from plait.types import Sampling

MODEL = "tiny-random"
_SENTENCE = ("The", " sky", " is", " blue", " because", " of", " Rayleigh", " scattering", ".")


class Engine:
    """The script: what to answer to a prompt."""

    def __init__(self, model: str) -> None:
        local = catalog.load(model)
        self._tokenizer = Tokenizer.load(local)
        raw = [self._tokenizer.token_bytes(i) for i in range(self._tokenizer.vocabulary_size)]
        self._bytes = raw

    def __call__(self, ask: Ask) -> tuple[str, ...]:
        """The pieces of an answer."""
        prompt = b"".join(self._bytes[token] for token in ask.prompt_ids).decode("utf-8", "replace")
        asked = prompt.rpartition("user\n")[2]
        grammar = ask.sampling.grammar
        if grammar is not None and grammar.kind == "json_schema":
            value = instance(json.loads(grammar.text), asked)
            return _split(json.dumps(value, ensure_ascii=False))
        if found := re.search(r"<tool_response>\n(.*?)\n</tool_response>", asked, re.DOTALL):
            return _split(f"It says: {found[1]}")
        tools = re.findall(r"<tools>\n(\{.*?)\n</tools>", prompt, re.DOTALL)
        if tools:
            return _split("".join(_call(line, asked) for line in tools[-1].splitlines()[:1]))
        return _SENTENCE


def instance(schema: dict[str, Any], asked: str, root: dict[str, Any] | None = None) -> Any:
    """The least value that a schema allows, with the first number or foreign word asked about;
    an object of no known members has those that are quoted."""
    root = schema if root is None else root
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        known = root.get("$defs") or root.get("definitions") or {}
        return instance(known[name], asked, root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return instance(schema[several][0], asked, root)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    number = re.search(r"\d+", asked)
    match kind if isinstance(kind, str) else kind[0]:
        case "object":
            words = re.findall(r"[`'\"](\w+)[`'\"]", asked)
            named = {word: {"type": "string"} for word in words}
            members = schema.get("properties", named)
            return {name: instance(member, asked, root) for name, member in members.items()}
        case "array":
            return [instance(schema.get("items", {}), asked, root)]
        case "integer" | "number":
            return int(number[0]) if number else schema.get("minimum", 1)
        case "boolean":
            return True
        case "null":
            return None
    foreign = re.search(r"[^\x00-\x7f]+", asked)
    return foreign[0] if foreign else "a word"


def _call(line: str, asked: str) -> str:
    tool = json.loads(line)
    arguments = instance(tool.get("parameters") or {"type": "object"}, asked)
    call = json.dumps({"name": tool["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _split(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r".{1,6}", text, re.DOTALL))


async def direct(options: argparse.Namespace) -> None:
    """Call the engine without a gateway; print seconds to each token of each stream."""
    upstream = _upstream(options)
    sampling, limits = Sampling(), Options(max_tokens=options.tokens)
    ask = Ask(model=MODEL, prompt_ids=(1,), sampling=sampling, options=limits)

    async def one(number: int) -> list[float]:
        await asyncio.sleep(offset_s(number, options.direct, options.tokens, options.interval_ms))
        return [await timed() for _ in range(3)][1]

    async def timed() -> list[float]:
        started_s = time.perf_counter()
        return [
            time.perf_counter() - started_s
            async for item in upstream.stream(ask)
            if isinstance(item, TextDelta)
        ]

    times = await asyncio.gather(*(one(number) for number in range(options.direct)))
    print(json.dumps(times), flush=True)


def _upstream(options: argparse.Namespace) -> FakeUpstream:
    return FakeUpstream(
        model=MODEL,
        script=None if options.endless else Engine(MODEL),
        pieces=_SENTENCE,
        endless=options.endless,
        interval_s=options.interval_ms / 1000,
    )


async def serve(options: argparse.Namespace, announce: Any = print) -> None:
    """Serve until cancelled."""
    upstream = _upstream(options)
    if options.bare:
        app = bare_app(upstream)
    else:
        app = Gateway(upstream, "conformance", GatewayConfig(version="conformance")).app()
    listener = listen("127.0.0.1", options.port)
    server = uvicorn.Server(server_config(app))
    freeze_heap()  # as `plait serve` does
    announce(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)
    await server.serve(sockets=[listener])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--interval-ms", type=float, default=0.0)
    parser.add_argument("--endless", action="store_true")
    parser.add_argument("--bare", action="store_true", help="the engine without the gateway")
    parser.add_argument("--direct", type=int, default=0, help="streams without a gateway")
    parser.add_argument("--tokens", type=int, default=50)
    options = parser.parse_args()
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(direct(options) if options.direct else serve(options))


if __name__ == "__main__":
    main()
