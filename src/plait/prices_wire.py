"""Prices from and to their protobuf message."""

from plait.types import Prices
from plait.v1 import offer_pb2


def prices_to_message(prices: Prices) -> offer_pb2.Prices:
    """Prices as their protobuf message."""
    return offer_pb2.Prices(
        prompt=prices.prompt,
        cached_prompt=prices.cached_prompt,
        output=prices.output,
        rejected_draft=prices.rejected_draft,
        replayed=prices.replayed,
    )


def prices_from_message(message: offer_pb2.Prices) -> Prices:
    """Prices from their protobuf message."""
    return Prices(
        prompt=message.prompt,
        cached_prompt=message.cached_prompt,
        output=message.output,
        rejected_draft=message.rejected_draft,
        replayed=message.replayed,
    )
