"""What an answer's headers tell: by whom, for how much, and where the evidence is."""

from collections.abc import Sequence
from typing import Any

from plait.client import Answer, RouteStep
from plait.gateway.frames import Result


def headers_of(answers: Sequence[Answer], cost: int) -> dict[str, str]:
    """Cost, receipts and the first route, as headers."""
    headers = {"x-plait-cost-microcredits": str(cost)}
    if answers:
        receipts = sum(answer.receipts_verified for answer in answers)
        headers["x-plait-receipts-verified"] = str(receipts)
        headers["x-plait-route"] = _written(answers[0].route)
    return headers


def stream_headers(result: Result) -> list[tuple[bytes, bytes]]:
    """Of a stream: what is known of its first answer when it begins."""
    headers = []
    if result.route:
        headers.append((b"x-plait-route", _written(result.route).encode()))
    if result.predicted_cost is not None:
        predicted = str(result.predicted_cost).encode()
        headers.append((b"x-plait-predicted-cost-microcredits", predicted))
    return headers


def whole_headers(
    results: Sequence[Result], answers: list[dict[str, Any]], cost: int
) -> dict[str, str]:
    """Of a whole answer; ``answers`` is Plait's account of each."""
    whole = [one.finished.answer for one in results if one.finished.answer is not None]
    headers = headers_of(whole, cost)
    if bundles := [answer["bundle"] for answer in answers if answer.get("bundle")]:
        headers["x-plait-bundle"] = bundles[0]
    return headers


def _written(route: Sequence[RouteStep]) -> str:
    return ",".join(f"{step.span}={step.peer}" for step in route)
