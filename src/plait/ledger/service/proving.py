"""Fetching a proof that a log holds an entry, out of its tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc.aio

from plait.errors import BadProof, PeerUnreachable
from plait.ledger.checkpoint import Checkpoint, open_checkpoint
from plait.ledger.log_proof import LogProof
from plait.ledger.service.notices import DEADLINE_S, Post, post_channel
from plait.ledger.tiles import TILE_WIDTH, Tile, TileMissing, TileTree, decode_entries
from plait.network_file import Authority
from plait.types import Digest
from plait.v1.log_pb2 import GetTileRequest
from plait.v1.log_pb2_grpc import LogServiceStub

ResultT = TypeVar("ResultT")

TILES_MAX = 64


async def fetch_proof(authority: Authority, index: int) -> LogProof:
    """The proof of one entry, with the entry as its extra data, under the newest checkpoint.

    Raises ``VerificationError`` if the log serves what it did not sign, or has no such entry,
    and ``PeerUnreachable``.
    """
    async with post_channel(Post(authority.address, authority.certificate)) as channel:
        stub = LogServiceStub(channel)
        note = (await _get(stub, "checkpoint")).decode(errors="replace")
        checkpoint = open_checkpoint(note, authority.log_origin, authority.log_key)
        if not 0 <= index < checkpoint.size:
            raise BadProof(f"the log has {checkpoint.size} entries, none at {index}")
        hashes = await _from_tiles(
            stub, checkpoint, lambda tree: tree.inclusion_proof(index, checkpoint.size)
        )
        entry = await _entry(stub, index, checkpoint.size)
        return LogProof(index, tuple(hashes), note, entry)


@dataclass(frozen=True, slots=True)
class AnchorProof:
    """An entry's inclusion proof at the size just behind it, and the log's growth since."""

    path: tuple[Digest, ...]
    growth: tuple[Digest, ...]
    checkpoint: str


async def fetch_anchor(authority: Authority, index: int) -> AnchorProof:
    """What ``lottery.anchor_of`` needs of an entry. Raises as ``fetch_proof``."""
    async with post_channel(Post(authority.address, authority.certificate)) as channel:
        stub = LogServiceStub(channel)
        note = (await _get(stub, "checkpoint")).decode(errors="replace")
        checkpoint = open_checkpoint(note, authority.log_origin, authority.log_key)
        if not 0 <= index < checkpoint.size:
            raise BadProof(f"the log has {checkpoint.size} entries, none at {index}")
        path, growth = await _from_tiles(
            stub,
            checkpoint,
            lambda tree: (
                tree.inclusion_proof(index, index + 1),
                tree.consistency_proof(index + 1, checkpoint.size),
            ),
        )
        return AnchorProof(tuple(path), tuple(growth), note)


async def _from_tiles(
    stub: LogServiceStub, checkpoint: Checkpoint, ask: Callable[[TileTree], ResultT]
) -> ResultT:
    """Ask a tree that is fetched as far as needed, and is the checkpoint's."""
    tiles: dict[Tile, bytes] = {}

    def read(tile: Tile) -> bytes:
        if tile not in tiles:
            raise TileMissing(tile)
        return tiles[tile]

    tree = TileTree(checkpoint.size, read)
    while len(tiles) < TILES_MAX:
        try:
            if tree.root() != checkpoint.root:
                raise BadProof("the tiles are not those of the checkpoint")
            return ask(tree)
        except TileMissing as missing:
            tiles[missing.tile] = await _get(stub, missing.tile.path)
    raise BadProof("too many tiles are needed")


async def _entry(stub: LogServiceStub, index: int, size: int) -> bytes:
    number, place = divmod(index, TILE_WIDTH)
    tile = Tile(None, number, min(TILE_WIDTH, size - number * TILE_WIDTH))
    return decode_entries(await _get(stub, tile.path), tile.width)[place]


async def _get(stub: LogServiceStub, path: str) -> bytes:
    try:
        response = await stub.GetTile(GetTileRequest(path=path), timeout=DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        raise PeerUnreachable(f"{path}: {error.details()}") from error
    return bytes(response.data)
