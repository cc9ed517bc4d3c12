"""A first look at the network, before a node joins it: who is there, and is it us?"""

from dataclasses import replace

import grpc
import grpc.aio

from plait.errors import ConfigError
from plait.net.tls import channel
from plait.net.watch import NetworkWatch
from plait.network_file import NetworkFile
from plait.router.view import Offer, View
from plait.types import PeerId
from plait.v1 import offer_pb2, offer_pb2_grpc

PROBE_TIMEOUT_S = 1.0


async def look_around(network: NetworkFile, peer: PeerId, own_address: str) -> View:
    """Return what the other bootstrap nodes know; empty if none answers.

    ``own_address`` is the public address this node is about to serve.

    Raises ``ConfigError`` if a node with our own identity runs already: its data folder was
    copied. Our own last offer may be in view after a restart, but then nobody answers at its
    address.
    """
    others = tuple(node for node in network.bootstrap if node.public_address != own_address)
    async with NetworkWatch(replace(network, bootstrap=others), peer) as watch:
        await watch.settled()
        view = watch.view()
    offer = view.offers.get(peer)
    if offer is not None and await _answers(offer):
        raise ConfigError(
            f"another node runs with the identity {peer} at {offer.public_address}: "
            "the data folder was copied",
            remedy="give this node a folder of its own: plait node run --data-dir NEW_FOLDER",
        )
    return view


async def _answers(offer: Offer) -> bool:
    async with channel(offer.public_address, offer.certificate) as public:
        stub = offer_pb2_grpc.DirectoryServiceStub(public)
        try:
            await stub.Probe(offer_pb2.ProbeRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
    return True
