"""An in-memory gossip network for tests of anything built on ``plait.net``."""

from plait.net.memory import MemoryControlPlane, MemoryNetwork

__all__ = ["MemoryControlPlane", "MemoryNetwork"]
