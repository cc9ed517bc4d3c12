"""Plait: pipelines of layer spans over a peer-to-peer network, paid and provable token by token.

Importing this package loads neither torch nor libp2p nor transformers.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Answer", "AsyncClient", "Client", "__version__"]

if TYPE_CHECKING:
    from plait.client import Answer, AsyncClient, Client


def __getattr__(name: str) -> Any:
    """Load the client library on first use, so that ``import plait`` stays light."""
    if name in __all__:
        from plait import client

        return getattr(client, name)
    raise AttributeError(f"module 'plait' has no attribute {name!r}")
