"""How long planning takes: ``python benchmarks/router.py [--peers N] [--layers N] [--seed S]``.

Prints one JSON object: milliseconds by kind of request. Each repetition plans once for every
kind in turn on a fresh random swarm (so that a busy machine hurts all alike), first with a
view never planned on before (``cold``), then again on the same view (``warm``). Spans,
speeds, prices and round trips are random; each peer reports 16 links, and the driver has
measured every peer. ``limited`` halves the gap between the cheapest price and that of the
best route, the hardest kind.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from time import perf_counter

from plait.errors import NoRoute, RouteError
from plait.router.plan import plan
from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.testing.offers import plain_offer
from plait.types import Digest, Microcredits, ModelShape, PeerId, Prices, Span

NOW_MS = 1_000_000
DRIVER = PeerId("driver")
LINKS_PER_PEER = 16


def random_swarm(rng: random.Random, peers: int, layers: int) -> tuple[View, ModelShape]:
    """A swarm in which spans are 1/16 to 1/2 of the model and every layer is covered."""
    model = ModelShape("random", Digest(b"m" * 32), layers, 2, 4, bytes_per_row=16_384)
    names = [PeerId(f"peer{number:05}") for number in range(peers)]
    offers = {name: _random_offer(rng, name, model, at) for at, name in enumerate(names)}
    place = {name: (rng.random(), rng.random()) for name in [*names, DRIVER]}
    rtts: dict[tuple[PeerId, PeerId], int] = {}
    for name in names:
        others = rng.sample(names, min(LINKS_PER_PEER, peers - 1))
        for other in [*others, DRIVER]:
            if other != name:
                (x, y), (u, v) = place[name], place[other]
                rtts[name, other] = int(2_000 + 150_000 * ((x - u) ** 2 + (y - v) ** 2) ** 0.5)
    return View(offers, rtts), model


def _random_offer(rng: random.Random, peer: PeerId, model: ModelShape, at: int) -> Offer:
    length = rng.randint(max(1, model.layers // 16), model.layers // 2)
    start = rng.randint(0, model.layers - length)
    # The first peers tile the model, so that a route always exists.
    if at < 4:
        start, length = at * model.layers // 4, -(-model.layers // 4)
    span = Span(start, min(model.layers, start + length))
    layer_us = rng.choice([150, 400, 1200, 3000])
    layers = model.priced_layers(span)
    return plain_offer(
        peer,
        model.digest,
        span,
        issued_ms=NOW_MS,
        expires_ms=NOW_MS + 60_000,
        prices=Prices(prompt=rng.randint(1000, 9000), output=rng.randint(5000, 40_000)),
        kv_tokens_total=100_000,
        kv_tokens_free=100_000,
        sessions_active=rng.randint(0, 6),
        decode_us=layer_us * layers,
        prefill_us_per_token=layer_us * layers // 10,
    )


def requests_for(view: View, model: ModelShape) -> dict[str, RouteRequest]:
    """One request of each kind, the limited one fitted to the swarm."""
    base = RouteRequest(prompt_tokens=500, max_tokens=256)
    fastest = plan(view, model, base, source=DRIVER, now_ms=NOW_MS, alternates=0).predicted
    cheap = replace(base, sort="price")
    cheapest = plan(view, model, cheap, source=DRIVER, now_ms=NOW_MS, alternates=0).predicted
    limit = (fastest.price_microcredits + cheapest.price_microcredits) // 2
    return {
        "latency": base,
        "throughput": replace(base, sort="throughput"),
        "price": cheap,
        "weighted": replace(base, sort="weighted"),
        "limited": replace(base, max_price=Microcredits(limit), ttft_s=fastest.ttft_s * 2),
    }


def timed(view: View, model: ModelShape, request: RouteRequest, alternates: int) -> float:
    """Milliseconds of one plan; a refusal counts like an answer."""
    start_s = perf_counter()
    try:
        plan(view, model, request, source=DRIVER, now_ms=NOW_MS, alternates=alternates)
    except (NoRoute, RouteError) as error:
        print(error, file=sys.stderr)
    return (perf_counter() - start_s) * 1000


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile, rounded to microseconds."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=100)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--alternates", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    times: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        view, model = random_swarm(rng, options.peers, options.layers)
        for kind, request in requests_for(view, model).items():
            fresh = View(view.offers, view.rtt_us)
            for phase in ("cold", "warm"):
                spent_ms = timed(fresh, model, request, options.alternates)
                times.setdefault(f"{kind}_{phase}", []).append(spent_ms)
    summary = {
        kind: {"p50_ms": quantile(values, 0.5), "p99_ms": quantile(values, 0.99)}
        for kind, values in times.items()
    }
    print(json.dumps(vars(options) | {"plans": summary}, indent=2))


if __name__ == "__main__":
    main()
