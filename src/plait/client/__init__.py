"""The client library: ``Client`` and ``AsyncClient``, their options and answers."""

from plait.client.answer import Answer, RouteStep, TextDelta
from plait.client.blocking import Client
from plait.client.client import AsyncClient, Options

__all__ = ["Answer", "AsyncClient", "Client", "Options", "RouteStep", "TextDelta"]
