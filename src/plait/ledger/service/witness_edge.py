"""Witnesses over gRPC: the service of one, and the way of an authority to it.

Whoever submits needs no name: a witness looks only at checkpoints that a log of the network
file has signed, and everything else costs it one signature check.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from plait.errors import (
    ConfigError,
    DeadlineExceeded,
    LedgerError,
    PeerUnreachable,
    RemoteProtocolError,
)
from plait.identity import SigningKey
from plait.ledger.fork import LogFork, read_fork_proof, write_fork_proof
from plait.ledger.service.channels import pinned_channel, server_options
from plait.ledger.service.witness import LocalCosigner, WitnessFiles
from plait.ledger.witness import LogWitness, WitnessRefusal
from plait.logs import get_logger
from plait.network_file import NetworkFile, Witness
from plait.v1 import log_pb2, log_pb2_grpc

log = get_logger(__name__)

MESSAGE_BYTES_MAX = 64 * 1024
DEADLINE_S = 2.0
WAITING_MAX = 64
"""Submissions at one time; more are refused until some are answered."""
_OK = 200
_STOP_GRACE_S = 1.0


class WitnessServicer(log_pb2_grpc.WitnessServiceServicer):
    """``plait.v1.WitnessService``. ``on_fork`` is told of a log that forked."""

    def __init__(
        self, cosigner: LocalCosigner, on_fork: Callable[[LogFork], None] = lambda fork: None
    ) -> None:
        self._cosigner = cosigner
        self._on_fork = on_fork
        self._waiting = 0

    async def AddCheckpoint(
        self, request: log_pb2.AddCheckpointRequest, context: Any
    ) -> log_pb2.AddCheckpointResponse:
        """Cosign a checkpoint, or say by the specification's status why not."""
        if self._waiting >= WAITING_MAX:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "too many submissions wait")
        self._waiting += 1
        try:
            answer = await self._cosigner.add_checkpoint(
                request.old_size, list(request.proof), request.checkpoint
            )
        except LedgerError as error:
            log.error("the witness cosigns nothing more", reason=str(error))
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error)[:500])
            raise AssertionError("abort raises") from error
        finally:
            self._waiting -= 1
        if isinstance(answer, str):
            return log_pb2.AddCheckpointResponse(status=_OK, cosignature=answer)
        if answer.fork is not None:
            log.warning("a log forked", origin=answer.fork.origin)
            self._on_fork(answer.fork)
        return log_pb2.AddCheckpointResponse(
            status=answer.status,
            reason=answer.reason,
            size=answer.size,
            fork_proof=b"" if answer.fork is None else write_fork_proof(answer.fork),
        )


class RemoteCosigner:
    """The way to one witness of the network file, pinned to its certificate."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._channel = pinned_channel(
            witness.address, witness.certificate, message_bytes_max=MESSAGE_BYTES_MAX
        )
        self._stub = log_pb2_grpc.WitnessServiceStub(self._channel)

    @property
    def name(self) -> str:
        """The witness's name in the network file."""
        return self._witness.name

    async def add_checkpoint(
        self, old_size: int, proof: Sequence[bytes], note: str
    ) -> str | WitnessRefusal:
        """Ask for a cosignature; raises ``NetworkError`` or ``RemoteProtocolError``."""
        request = log_pb2.AddCheckpointRequest(old_size=old_size, proof=proof, checkpoint=note)
        try:
            answer = await self._stub.AddCheckpoint(request, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"the witness {self.name} did not answer") from error
            raise PeerUnreachable(f"the witness {self.name}: {error.details()}") from error
        return self._read(answer)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    def _read(self, answer: log_pb2.AddCheckpointResponse) -> str | WitnessRefusal:
        if answer.status == _OK:
            return answer.cosignature
        try:
            fork = read_fork_proof(answer.fork_proof) if answer.fork_proof else None
        except ValueError as error:
            raise RemoteProtocolError(
                f"the witness {self.name} sent no fork proof: {error}"
            ) from error
        size = answer.size if answer.HasField("size") else None
        found = fork if isinstance(fork, LogFork) else None
        return WitnessRefusal(answer.status, answer.reason[:200], size, found)


def make_witness(
    folder: Path,
    network: NetworkFile,
    key: SigningKey,
    *,
    on_fork: Callable[[LogFork], None] = lambda fork: None,
) -> WitnessServicer:
    """The witness of the network file that has this key, to be added to a server.

    Raises ``ConfigError`` if the file names none and ``LedgerError`` for an unusable folder.
    """
    name = _own_name(network, key)
    logs = {one.log_origin: one.log_key for one in network.authorities}
    witness = LogWitness(name, key, logs, WitnessFiles(folder))
    return WitnessServicer(LocalCosigner(witness), on_fork)


@asynccontextmanager
async def serve_witness(
    folder: Path,
    network: NetworkFile,
    key: SigningKey,
    address: tuple[str, int],
    tls: tuple[bytes, bytes],
    *,
    on_fork: Callable[[LogFork], None] = lambda fork: None,
) -> AsyncIterator[int]:
    """Serve as the witness of the network file that has this key; yields the port.

    Raises ``ConfigError`` if the file names no such witness or the port is taken, and
    ``LedgerError`` if the folder cannot be used.
    """
    servicer = make_witness(folder, network, key, on_fork=on_fork)
    server = grpc.aio.server(
        options=server_options(message_bytes_max=MESSAGE_BYTES_MAX, streams_max=64)
    )
    log_pb2_grpc.add_WitnessServiceServicer_to_server(servicer, server)
    host, port = address
    try:
        bound = server.add_secure_port(
            f"{host}:{port}", grpc.ssl_server_credentials([(tls[1], tls[0])])
        )
    except RuntimeError as error:
        raise ConfigError(f"the witness cannot listen on {host}:{port}: {error}") from error
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(_STOP_GRACE_S)


def _own_name(network: NetworkFile, key: SigningKey) -> str:
    for witness in network.witnesses:
        if witness.key == key.public:
            return witness.name
    raise ConfigError(
        "the network file names no witness with this node's witness key",
        remedy="let the founder add it, or run without the witness role",
    )
