"""Tiles: the figures of the specification, names, and proofs made of nothing but tiles."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadProof
from plait.ledger.merkle import Tree, leaf_hash, verify_consistency, verify_inclusion
from plait.ledger.tiles import (
    Tile,
    TileMissing,
    TileTree,
    decode_entries,
    encode_entries,
    entry_tiles_of,
    parse_tile_path,
    tile_data,
    tiles_of,
)

LEAVES = [leaf_hash(str(number).encode()) for number in range(70_000)]
TREE = Tree(LEAVES)
TILES = {tile: tile_data(TREE, tile) for tile in tiles_of(len(LEAVES))}


def test_the_worked_figures_of_the_specification() -> None:
    full = Counter(tile.level for tile in TILES if tile.width == 256)
    partial = {tile.level: tile.width for tile in TILES if tile.width < 256}
    assert full == {0: 273, 1: 1}
    assert partial == {0: 112, 1: 17, 2: 1}
    assert list(tiles_of(256)) == [Tile(0, 0), Tile(1, 0, 1)]
    assert list(tiles_of(0)) == []
    assert Tile(0, 1234067).path == "tile/0/x001/x234/067"
    assert Tile(None, 273, 112).path == "tile/entries/273.p/112"


def test_each_hash_is_that_of_a_full_tile_below() -> None:
    below = Tree(LEAVES[256:512]).root()
    assert TILES[Tile(1, 0)][32:64] == below
    assert TILES[Tile(2, 0, 1)] == Tree(LEAVES[:65_536]).root()


@given(
    st.builds(
        Tile,
        st.none() | st.integers(0, 63),
        st.integers(0, 2**63 - 1),
        st.integers(1, 256),
    )
)
def test_a_path_is_read_back(tile: Tile) -> None:
    assert parse_tile_path(tile.path) == tile


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile/0",
        "tile/0/1",
        "tile/00/001",
        "tile/64/001",
        "tile/-1/001",
        "tile/0/x000/001",
        "tile/0/001/002",
        "tile/0/x001",
        "tile/0/001.p/0",
        "tile/0/001.p/256",
        "tile/0/001.p/01",
        "tile/0/001.p/",
        "tile/0/../../001",
        "tile/entries/001/",
        "tile/0/١٢٣",
        "TILE/0/001",
        "tile/0/" + "x999/" * 20 + "999",
    ],
)
def test_another_spelling_is_no_path(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        parse_tile_path(path)


def test_what_is_new_since_a_size() -> None:
    for start, size in ((0, 300), (255, 256), (256, 257), (69_888, 70_000), (70_000, 70_000)):
        before = {tile for tile in tiles_of(start) if tile.width == 256}
        assert set(tiles_of(size, start)) == set(tiles_of(size)) - before
        before = {tile for tile in entry_tiles_of(start) if tile.width == 256}
        assert set(entry_tiles_of(size, start)) == set(entry_tiles_of(size)) - before


@given(st.data())
def test_proofs_come_out_of_tiles_alone(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 3_000))
    first = data.draw(st.integers(1, size))
    index = data.draw(st.integers(0, size - 1))
    small = Tree(LEAVES[:size])
    kept = {tile: tile_data(small, tile) for tile in tiles_of(size)}
    tiled = TileTree(size, kept.__getitem__)
    assert tiled.root() == small.root()
    verify_inclusion(LEAVES[index], index, size, tiled.inclusion_proof(index, size), small.root())
    proof = tiled.consistency_proof(first, size)
    verify_consistency(first, size, tiled.root(first), small.root(), proof)


def test_a_large_tree_out_of_its_tiles() -> None:
    tiled = TileTree(len(LEAVES), TILES.__getitem__)
    assert tiled.root() == TREE.root()
    with pytest.raises(TypeError):
        tiled.append(LEAVES[0])


def test_a_wrong_tile_shows() -> None:
    tile = Tile(0, 273, 112)
    swapped = TILES | {tile: TILES[tile][::-1]}
    assert TileTree(len(LEAVES), swapped.__getitem__).root() != TREE.root()
    cut = TILES | {tile: TILES[tile][:-32]}
    with pytest.raises(BadProof):
        TileTree(len(LEAVES), cut.__getitem__).root()


def test_a_missing_tile_is_named() -> None:
    def read(tile: Tile) -> bytes:
        raise TileMissing(tile)

    with pytest.raises(TileMissing) as missing:
        TileTree(300, read).root(256)
    assert missing.value.tile == Tile(1, 0, 1)


@pytest.mark.parametrize(("level", "index", "width"), [(0, 1, 45), (1, 0, 2), (2, 0, 1)])
def test_no_tile_beyond_the_tree(level: int, index: int, width: int) -> None:
    with pytest.raises(ValueError, match="complete"):
        tile_data(Tree(LEAVES[:300]), Tile(level, index, width))


@given(st.lists(st.binary(max_size=40), max_size=256))
def test_bundles_of_entries(entries: list[bytes]) -> None:
    data = encode_entries(entries)
    assert decode_entries(data, len(entries)) == tuple(entries)
    with pytest.raises(BadProof):
        decode_entries(data + b"\0", len(entries))
    with pytest.raises(BadProof):
        decode_entries(data, len(entries) + 1)
    with pytest.raises(ValueError, match="entry"):
        encode_entries([b"x" * 65_536])
