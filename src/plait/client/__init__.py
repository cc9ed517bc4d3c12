"""The client library: ``Client`` and ``AsyncClient``, their options and answers."""

from plait.client.answer import Answer, Embedding, RouteStep, Score, TextDelta
from plait.client.blocking import BlockingStream, Client
from plait.client.client import AsyncClient
from plait.client.driver import Top
from plait.client.options import Options
from plait.client.settings import ClientSettings
from plait.client.streaming import TextStream

__all__ = [
    "Answer",
    "AsyncClient",
    "BlockingStream",
    "Client",
    "ClientSettings",
    "Embedding",
    "Options",
    "RouteStep",
    "Score",
    "TextDelta",
    "TextStream",
    "Top",
]
