"""Keys and certificates of simulated hosts: they follow from names, and are made once."""

from functools import cache

from plait.identity import SigningKey
from plait.testing import accounting
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope


@cache
def key_of(name: str) -> SigningKey:
    """The key of a name."""
    return accounting.key_of(name)


@cache
def peer_of(name: str) -> PeerId:
    """The peer id of a host."""
    return key_of(name).peer_id


@cache
def cert_of(name: str) -> SignedEnvelope:
    """A host's certificate for its ledger key."""
    return accounting.cert_of(name)
