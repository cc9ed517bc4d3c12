"""Gossip of signed offers over real libp2p on loopback: who gets them, how late, at what cost.

Every host seals an offer per period and checks all others' with the membership rules.
Prints one JSON object. ``--processes`` gives each host a process of its own, as in real
life; otherwise they share one interpreter, which is faster to start and harsher.
"""

import argparse
import asyncio
import contextlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from plait.identity import SigningKey
from plait.net.gossip import offers_topic
from plait.net.libp2p import Libp2pControlPlane
from plait.net.membership import Membership
from plait.net.port import Validation
from plait.net.tls import create_identity
from plait.network_file import NetworkFile
from plait.router.view import Offer
from plait.router.wire import seal_offer
from plait.testing.offers import plain_offer
from plait.types import Digest, PeerId, Prices, Span

NETWORK_ID = "bench"
MODEL = Digest(b"m" * 32)
SETTLE_S = 3.0
DRAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run: offers per second and host, for so many seconds."""

    hosts: int
    rate: float
    seconds: float

    @property
    def offers_per_host(self) -> int:
        return max(1, round(self.rate * self.seconds))


class Host:
    """One member; ``delays_s`` has an entry for every offer of another that arrived."""

    def __init__(self, number: int, settings: Settings, bootstrap: tuple[str, ...]) -> None:
        self.number = number
        self.settings = settings
        self.key = SigningKey.from_seed(bytes([number + 1]) * 32)
        network = NetworkFile(NETWORK_ID, self.key.peer_id, "open", bytes(32), (), ())
        self.membership = Membership(network)
        self.plane = Libp2pControlPlane(self.key, bootstrap=bootstrap)
        self.offer = _offer(self.key)
        self.topic = offers_topic(NETWORK_ID, MODEL)
        self.delays_s: list[float] = []
        self.complete = asyncio.Event()

    def validate(self, data: bytes, forwarder: PeerId) -> Validation:
        """Judge an offer as a node would, and note how old it is."""
        verdict = self.membership.handle_envelope(data, time.time_ns() // 1_000_000, forwarder)
        offer = verdict.change.offer if verdict.change else None
        if offer is None:
            return verdict.outcome == "accept" or "ignore"
        self.delays_s.append(time.time() - offer.decode_us / 1e6)
        if len(self.delays_s) == (self.settings.hosts - 1) * self.settings.offers_per_host:
            self.complete.set()
        return True

    async def publish_all(self) -> None:
        """Publish at the given rate, hosts out of step, then wait for what is on its way."""
        period_s = 1 / self.settings.rate
        await asyncio.sleep(period_s * self.number / self.settings.hosts)
        started_s = time.monotonic()
        for sequence in range(1, self.settings.offers_per_host + 1):
            await self.plane.publish(self.topic, self._sealed(sequence))
            await asyncio.sleep(max(0, started_s + sequence * period_s - time.monotonic()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self.complete.wait()

    def _sealed(self, sequence: int) -> bytes:
        now_ns = time.time_ns()
        offer = replace(
            self.offer,
            sequence=sequence,
            issued_ms=now_ns // 1_000_000,
            expires_ms=now_ns // 1_000_000 + 60_000,
            decode_us=now_ns // 1000,
        )
        return seal_offer(self.key, offer, NETWORK_ID).SerializeToString()


def _offer(key: SigningKey) -> Offer:
    return plain_offer(
        key.peer_id,
        MODEL,
        Span(0, 12),
        incarnation=time.time_ns(),
        prices=Prices(prompt=5_000, output=20_000),
        region="eu",
        kv_tokens_total=16_384,
        kv_tokens_free=16_384,
        prefill_us_per_token=400,
        public_address="127.0.0.1:4001",
        peer_address="127.0.0.1:4002",
        certificate=create_identity(key.peer_id).cert_der,
        multiaddrs=(f"/ip4/127.0.0.1/tcp/4003/p2p/{key.peer_id}",),
    )


def summary(settings: Settings, delays_s: Sequence[float], cpu_s: float, rss_mb: float) -> str:
    """The result as JSON."""
    expected = settings.hosts * (settings.hosts - 1) * settings.offers_per_host
    ordered = sorted(delays_s)
    figures = {
        "hosts": settings.hosts,
        "rate_per_host": settings.rate,
        "seconds": settings.seconds,
        "delivered": round(len(ordered) / expected, 6) if expected else 1.0,
        "p50_s": round(ordered[len(ordered) // 2], 4) if ordered else None,
        "p99_s": round(ordered[int(len(ordered) * 0.99)], 4) if ordered else None,
        "cpu_percent_per_host": round(
            100 * cpu_s / settings.hosts / (settings.seconds + SETTLE_S), 1
        ),
        "rss_mb_per_process": round(rss_mb),
    }
    return json.dumps(figures)


def _used() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


async def in_one_process(settings: Settings) -> str:
    """Run all hosts in this process."""
    hosts: list[Host] = []
    for number in range(settings.hosts):
        known = [other.plane.multiaddrs[0] for other in (*hosts[:1], *hosts[-2:])]
        host = Host(number, settings, tuple(dict.fromkeys(known)))
        await host.plane.__aenter__()
        await host.plane.subscribe(host.topic, host.validate)
        hosts.append(host)
    cpu_before_s, _ = _used()
    await asyncio.sleep(SETTLE_S)
    await asyncio.gather(*(host.publish_all() for host in hosts))
    cpu_s, rss_mb = _used()
    for host in hosts:
        await host.plane.__aexit__(None, None, None)
    delays_s = [delay_s for host in hosts for delay_s in host.delays_s]
    return summary(settings, delays_s, cpu_s - cpu_before_s, rss_mb)


async def one_worker(settings: Settings, number: int, bootstrap: tuple[str, ...]) -> None:
    """Be one host: tell the address, wait for a line, publish, tell the result."""
    host = Host(number, settings, bootstrap)
    async with host.plane:
        await host.plane.subscribe(host.topic, host.validate)
        print(host.plane.multiaddrs[0], flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        cpu_before_s, _ = _used()
        await asyncio.sleep(SETTLE_S)
        await host.publish_all()
        cpu_s, rss_mb = _used()
    print(json.dumps([host.delays_s, cpu_s - cpu_before_s, rss_mb]), flush=True)


async def in_many_processes(settings: Settings) -> str:
    """Run each host in a process of its own."""
    workers: list[asyncio.subprocess.Process] = []
    addresses: list[str] = []
    for number in range(settings.hosts):
        known = dict.fromkeys((*addresses[:1], *addresses[-2:]))
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            *("--hosts", str(settings.hosts)),
            *("--rate", str(settings.rate)),
            *("--seconds", str(settings.seconds)),
            *("--worker", str(number)),
            *(part for address in known for part in ("--bootstrap", address)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**24,
        )
        workers.append(worker)
        addresses.append((await _line_of(worker)).strip())
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"go\n")
    results = [json.loads(await _line_of(worker)) for worker in workers]
    for worker in workers:
        await worker.wait()
    delays_s = [delay_s for delays_s, _, _ in results for delay_s in delays_s]
    cpu_s = sum(cpu_s for _, cpu_s, _ in results)
    return summary(settings, delays_s, cpu_s, max(rss_mb for _, _, rss_mb in results))


async def _line_of(worker: asyncio.subprocess.Process) -> str:
    assert worker.stdout is not None
    while line := (await worker.stdout.readline()).decode():
        if line.startswith(("/ip", "[[")):  # anything else is a log line
            return line
    raise RuntimeError("a worker ended early")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1.0, help="offers per second and host")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bootstrap", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = Settings(options.hosts, options.rate, options.seconds)
    if options.worker is not None:
        asyncio.run(one_worker(settings, options.worker, tuple(options.bootstrap)))
    elif options.processes:
        print(asyncio.run(in_many_processes(settings)))
    else:
        print(asyncio.run(in_one_process(settings)))


if __name__ == "__main__":
    main()
