"""What a party makes of a log that does not show its tiles."""

from typing import Any, cast

import grpc
import grpc.aio
import pytest

from plait.errors import BadProof, PeerUnreachable, PlaitError
from plait.ledger.service.notices import _fetch
from plait.ledger.tiles import Tile
from plait.v1 import log_pb2
from plait.v1.log_pb2_grpc import LogServiceStub


class Refusing:
    """A log that answers every call with one status."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    async def GetTile(self, request: log_pb2.GetTileRequest, *, timeout: float) -> Any:
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(self._code, nothing, nothing, details="no")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, PeerUnreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, BadProof),
        (grpc.StatusCode.NOT_FOUND, BadProof),
    ],
)
async def test_a_log_that_is_down_withholds_nothing(
    code: grpc.StatusCode, error: type[PlaitError]
) -> None:
    with pytest.raises(error, match="no"):
        await _fetch(cast("LogServiceStub", Refusing(code)), Tile(0, 0))
