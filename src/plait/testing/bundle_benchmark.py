"""A long answer's bundle: how big it is and how long it takes to account for and to check."""

from dataclasses import dataclass, replace
from time import perf_counter, process_time

from plait.ledger.bundle import build_bundle
from plait.ledger.verify import verify_bundle
from plait.testing.accounting import PaperSession, Plot, key_of, paper_network


@dataclass(frozen=True, slots=True)
class BundleFigures:
    """Of one answer by three stages in chunks of 32 tokens. Nothing is computed by a model."""

    tokens: int
    bundle_bytes: int
    bundle_bytes_per_token: float
    accounting_us_per_token: float
    """Processor time of client and stages together: receipts, vouchers, commitments."""
    verify_s: float
    """The best of three."""


def make_bundle(tokens: int) -> tuple[bytes, float]:
    """The bundle of an answer of so many tokens, and the seconds its accounting took."""
    plot = replace(
        Plot(),
        prompt_ids=tuple(range(3, 259)),
        drawn_ids=tuple(10 + number % 40_000 for number in range(tokens)),
        max_tokens=tokens,
        chunk_tokens=32,
        prefill_chunk_tokens=256,
    )
    session = PaperSession(plot)
    start = process_time()
    session.play()
    accounting_s = process_time() - start
    return build_bundle(session.bundle_parts(), key_of("client")), accounting_s


def measure_bundle(tokens: int) -> BundleFigures:
    """Make and check a bundle; raises ``AssertionError`` if it does not verify."""
    data, accounting_s = make_bundle(tokens)
    seconds = []
    for _ in range(3):
        start = perf_counter()
        report = verify_bundle(data, paper_network())
        seconds.append(perf_counter() - start)
        if report.outcome != "verified":
            raise AssertionError(report.lines())
    return BundleFigures(
        tokens=tokens,
        bundle_bytes=len(data),
        bundle_bytes_per_token=round(len(data) / tokens, 1),
        accounting_us_per_token=round(1e6 * accounting_s / tokens, 1),
        verify_s=round(min(seconds), 3),
    )
