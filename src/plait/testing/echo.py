"""A process of its own that echoes a stream over TLS, to be hung or killed by a test.

    python -m plait.testing.echo

Prints one JSON object, ``port`` and ``certificate`` (hex), and serves until it is ended.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import grpc.aio

from plait.identity import SigningKey
from plait.net import tls

METHOD = "/plait.test/EchoAll"


class EchoStream(grpc.GenericRpcHandler):
    """Answers each message with itself."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The one method."""
        return grpc.stream_stream_rpc_method_handler(cast(Any, _echo_all))


async def _echo_all(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def serve() -> None:
    """Serve on a free port of the loopback."""
    identity = tls.create_identity(SigningKey.generate().peer_id)
    server = grpc.aio.server(options=tls.server_options())
    server.add_generic_rpc_handlers((EchoStream(),))
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials_public(identity))
    await server.start()
    print(json.dumps({"port": port, "certificate": identity.cert_der.hex()}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
