"""The tree as tiles of 256 hashes (c2sp.org/tlog-tiles): names, contents, proofs from them.

A full tile never changes; a partial one belongs to the sizes whose checkpoint needs it.
Whoever reads tiles checks them against a checkpoint's root: a wrong tile gives another root.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from plait.errors import BadProof
from plait.ledger.merkle import Tree, node_hash
from plait.types import Digest

TILE_WIDTH = 256
TILE_HEIGHT = 8
LEVEL_MAX = 63
HASH_BYTES = 32
ENTRY_BYTES_MAX = 2**16 - 1
_INDEX_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """The name of a tile. ``level`` None is a bundle of entries, beside level 0."""

    level: int | None
    index: int
    width: int = TILE_WIDTH

    @property
    def path(self) -> str:
        """Its path below the log's prefix."""
        parts = [f"{self.index % 1000:03d}"]
        rest = self.index // 1000
        while rest:
            parts.append(f"x{rest % 1000:03d}")
            rest //= 1000
        suffix = "" if self.width == TILE_WIDTH else f".p/{self.width}"
        level = "entries" if self.level is None else str(self.level)
        return f"tile/{level}/{'/'.join(reversed(parts))}{suffix}"


def parse_tile_path(path: str) -> Tile:
    """The tile of a path; raises ``ValueError`` for anything but its one spelling."""
    try:
        head, level_text, rest = path[:128].split("/", 2)
        name, partial, width_text = rest.partition(".p/")
        index = int("".join(part.removeprefix("x") for part in name.split("/")))
        tile = Tile(
            None if level_text == "entries" else int(level_text),
            index,
            int(width_text) if partial else TILE_WIDTH,
        )
    except ValueError as error:
        raise ValueError(f"not a tile's path: {path[:128]!r}") from error
    valid = head == "tile" and 0 < tile.width <= TILE_WIDTH and 0 <= index <= _INDEX_MAX
    if not valid or not 0 <= (tile.level or 0) <= LEVEL_MAX or tile.path != path:
        raise ValueError(f"not a tile's path: {path[:128]!r}")
    return tile


def tiles_of(size: int, start: int = 0) -> Iterator[Tile]:
    """The tiles of hashes of a tree of ``size``, but for full ones of the tree of ``start``."""
    level = 0
    while count := size >> (TILE_HEIGHT * level):
        first = (start >> (TILE_HEIGHT * level)) // TILE_WIDTH
        full, width = divmod(count, TILE_WIDTH)
        yield from (Tile(level, index) for index in range(first, full))
        if width:
            yield Tile(level, full, width)
        level += 1


def entry_tiles_of(size: int, start: int = 0) -> Iterator[Tile]:
    """The bundles of entries of a log of ``size``, but for full ones of the log of ``start``."""
    full, width = divmod(size, TILE_WIDTH)
    yield from (Tile(None, index) for index in range(start // TILE_WIDTH, full))
    if width:
        yield Tile(None, full, width)


def tile_data(tree: Tree, tile: Tile) -> bytes:
    """The hashes in a tile; raises ``ValueError`` if the tree is too small for it."""
    if tile.level is None:
        raise ValueError("a bundle of entries is not made of hashes")
    first = tile.index * TILE_WIDTH
    hashes = tree.complete(tile.level * TILE_HEIGHT, first, first + tile.width)
    return b"".join(hashes)


def encode_entries(entries: Sequence[bytes]) -> bytes:
    """A bundle of entries, each after its length in 2 bytes; ``ValueError`` if one is too long."""
    if any(len(entry) > ENTRY_BYTES_MAX for entry in entries):
        raise ValueError(f"an entry is at most {ENTRY_BYTES_MAX} bytes long")
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def decode_entries(data: bytes, count: int) -> tuple[bytes, ...]:
    """The entries of a bundle of ``count``; raises ``BadProof`` if it is cut or padded."""
    entries, position = [], 0
    while position < len(data):
        start = position + 2
        position = start + int.from_bytes(data[position:start], "big")
        entries.append(data[start:position])
    if position != len(data) or len(entries) != count:
        raise BadProof(f"the bundle does not hold {count} entries")
    return tuple(entries)


class TileMissing(Exception):
    """A proof needs a tile that has not been read yet."""

    def __init__(self, tile: Tile) -> None:
        super().__init__(tile.path)
        self.tile = tile


class TileTree(Tree):
    """A tree that others keep: roots and proofs out of tiles, nothing else in memory.

    ``read`` gives a tile's bytes, or raises ``TileMissing``. Every method raises what it
    raises, and ``BadProof`` for a tile of the wrong length. Compare ``root`` with a
    checkpoint's before believing a proof.
    """

    def __init__(self, size: int, read: Callable[[Tile], bytes]) -> None:
        super().__init__()
        self._size = size
        self._read = read

    @property
    def size(self) -> int:
        """Number of leaves."""
        return self._size

    def append(self, hashed: bytes) -> int:
        """A tree of tiles is for reading: raises ``TypeError``."""
        raise TypeError("a tree of tiles cannot grow")

    def _complete(self, level: int, index: int) -> Digest:
        tile_level, height = divmod(level, TILE_HEIGHT)
        first = index << height
        whole = self._tile(tile_level, first // TILE_WIDTH)
        start = first % TILE_WIDTH * HASH_BYTES
        hashes = [
            Digest(whole[at : at + HASH_BYTES])
            for at in range(start, start + (HASH_BYTES << height), HASH_BYTES)
        ]
        while len(hashes) > 1:
            hashes = [node_hash(*hashes[at : at + 2]) for at in range(0, len(hashes), 2)]
        return hashes[0]

    def _tile(self, level: int, index: int) -> bytes:
        count = self._size >> (TILE_HEIGHT * level)
        tile = Tile(level, index)
        if index == count // TILE_WIDTH:
            tile = replace(tile, width=count % TILE_WIDTH)
        data = self._read(tile)
        if len(data) != tile.width * HASH_BYTES:
            raise BadProof(f"the tile {tile.path} has {len(data)} bytes")
        return data
