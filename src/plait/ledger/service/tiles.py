"""The log in public: a folder of tiles that any web server can serve, and the same by gRPC.

The folder follows the checkpoints: what a checkpoint needs is there before it is. Tiles can
be made again from the ledger's file, so they are not forced to disk; instead a start
compares every tile with the books and writes what is missing or torn.
"""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from plait.ledger.merkle import Tree, leaf_hash
from plait.ledger.service.recorder import Recorder
from plait.ledger.tiles import (
    TILE_WIDTH,
    Tile,
    decode_entries,
    encode_entries,
    entry_tiles_of,
    parse_tile_path,
    tile_data,
    tiles_of,
)
from plait.logs import get_logger
from plait.v1 import log_pb2, log_pb2_grpc

log = get_logger(__name__)

CHECKPOINT_NAME = "checkpoint"
TILES_PER_STEP = 64
"""Written in one go, before others may run."""


class TileFolder:
    """The published log of one authority. ``publish`` is not called twice at a time."""

    def __init__(self, folder: Path, recorder: Recorder) -> None:
        self._folder = folder
        self._recorder = recorder
        self._size = 0
        self._note = ""

    @property
    def size(self) -> int:
        """Entries published since the start."""
        return self._size

    async def publish(self, size: int, note: str) -> None:
        """Publish a checkpoint of ``size`` entries and all that it needs.

        A disk that fails stops nothing but the publishing, which is tried again next time.
        """
        if note == self._note or size < self._size:
            return
        try:
            await self._publish(size, note)
        except OSError as error:
            log.warning("the log's tiles could not be written", reason=str(error))

    async def _publish(self, size: int, note: str) -> None:
        step: list[tuple[Tile, bytes]] = []
        tiles = [*tiles_of(size, self._size), *entry_tiles_of(size, self._size)]
        for tile in tiles if size > self._size else ():
            step.append((tile, tile_bytes(self._recorder, tile)))
            if len(step) == TILES_PER_STEP:
                await asyncio.to_thread(self._write, step)
                step = []
        await asyncio.to_thread(self._write, step)
        await asyncio.to_thread(_replace, self._folder / CHECKPOINT_NAME, note.encode())
        self._size, self._note = size, note

    def _write(self, step: list[tuple[Tile, bytes]]) -> None:
        for tile, data in step:
            path = self._folder / tile.path
            if _read(path) != data:
                _replace(path, data)
            if tile.width == TILE_WIDTH:
                shutil.rmtree(path.with_name(path.name + ".p"), ignore_errors=True)


class LogServicer(log_pb2_grpc.LogServiceServicer):
    """``plait.v1.LogService``: tiles out of the tree in memory and the entries on disk."""

    def __init__(self, recorder: Recorder, shown: Callable[[], tuple[int, str]]) -> None:
        self._recorder = recorder
        self._shown = shown

    async def GetTile(
        self, request: log_pb2.GetTileRequest, context: Any
    ) -> log_pb2.GetTileResponse:
        """A tile that the newest checkpoint needs, or the checkpoint itself."""
        size, note = self._shown()
        if request.path == CHECKPOINT_NAME:
            return log_pb2.GetTileResponse(data=note.encode())
        try:
            tile = parse_tile_path(request.path)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"malformed: {error}")
            raise AssertionError("abort raises") from error
        if not _within(tile, size):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no checkpoint covers this tile yet")
        return log_pb2.GetTileResponse(data=tile_bytes(self._recorder, tile))


def tile_bytes(recorder: Recorder, tile: Tile) -> bytes:
    """The content of a tile of hashes or of entries that are on disk."""
    if tile.level is not None:
        return tile_data(recorder.tree, tile)
    first = tile.index * TILE_WIDTH
    return encode_entries([entry.payload for entry in recorder.store.entries(first, tile.width)])


def tree_of_folder(folder: Path, size: int) -> Tree:
    """The tree of the entries in a folder of tiles; raises ``OSError`` or ``BadProof``."""
    tree = Tree()
    for payload in entries_of_folder(folder, size):
        tree.append(leaf_hash(payload))
    return tree


def entries_of_folder(folder: Path, size: int) -> Iterator[bytes]:
    """The first ``size`` entries in a folder of tiles; raises ``OSError`` or ``BadProof``."""
    for tile in entry_tiles_of(size):
        yield from decode_entries((folder / tile.path).read_bytes(), tile.width)


def _within(tile: Tile, size: int) -> bool:
    level = tile.level or 0
    return tile.index * TILE_WIDTH + tile.width <= size >> (8 * level)


def _read(path: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
