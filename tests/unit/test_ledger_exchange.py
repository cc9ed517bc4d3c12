"""The log in public over real gRPC: tiles, remote witnesses, notices, a lying authority."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio
import pytest

from plait.envelope import seal
from plait.errors import BadProof, BadSignature, ConfigError, LedgerError
from plait.ledger.balances import entry_from_payload
from plait.ledger.certs import make_key_cert, make_revocation
from plait.ledger.checkpoint import open_checkpoint, sign_checkpoint
from plait.ledger.cosignature import open_cosignatures
from plait.ledger.log_proof import check_log_proof, read_log_proof, write_log_proof
from plait.ledger.merkle import Tree, leaf_hash, verify_consistency
from plait.ledger.notices import NoticeBoard, Told
from plait.ledger.policy import policy_of, read_policy
from plait.ledger.service.notices import (
    CALLS_BURST,
    NoticeExchange,
    NoticeFile,
    Post,
    post_channel,
    posts_of,
)
from plait.ledger.service.proving import fetch_proof
from plait.ledger.service.remote import RemoteLedger
from plait.ledger.service.serving import AuthorityKeys, RunningAuthority, serve_authority
from plait.ledger.service.tiles import TileFolder, entries_of_folder
from plait.ledger.service.witness import WitnessFiles
from plait.ledger.service.witness_edge import RemoteCosigner, serve_witness
from plait.ledger.tiles import Tile, TileTree, tile_data
from plait.ledger.witness import LogWitness, WitnessRefusal
from plait.net.tls import create_identity
from plait.network_file import Authority, NetworkFile, Witness
from plait.testing.accounting import key_of
from plait.v1 import ledger_pb2 as pb
from plait.v1 import log_pb2, log_pb2_grpc

NETWORK_ID, ORIGIN, NOW_MS = "net-1", "net-1/ledger", 1_700_000_000_000
PEER, LEDGER, LOG, ISSUER = (key_of(name) for name in ("peer", "ledger", "log", "issuer"))
AUTHORITY = Authority(PEER.peer_id, "127.0.0.1:1", LEDGER.public, LOG.public, ORIGIN, b"")
NETWORK = NetworkFile(NETWORK_ID, PEER.peer_id, "open", ISSUER.public, (AUTHORITY,), ())
WITNESS_TLS = create_identity(key_of("witness peer").peer_id)


@dataclass
class Served:
    """An authority, and the network file as its clients have it."""

    running: RunningAuthority
    network: NetworkFile
    remote: RemoteLedger
    folder: Path

    async def issue(self, *names: str) -> None:
        for name in names:
            order = pb.IssueOrder(
                network_id=NETWORK_ID,
                account=key_of(name).peer_id,
                amount=100,
                order_id=name.encode(),
                issued_ms=self.running.recorder.clock_ms(),
            )
            await self.remote.issue(seal(ISSUER, order))


@asynccontextmanager
async def authority(
    folder: Path, network: NetworkFile = NETWORK, cosigners: Sequence[RemoteCosigner] = ()
) -> AsyncIterator[Served]:
    tls = create_identity(PEER.peer_id)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            serve_authority(
                folder / "journal.db",
                network,
                network.authorities[0],
                AuthorityKeys(LEDGER, LOG),
                "127.0.0.1",
                0,
                (tls.cert_pem, tls.key_pem),
                cosigners=cosigners,
            )
        )
        own = replace(AUTHORITY, address=f"127.0.0.1:{running.port}", certificate=tls.cert_der)
        remote = RemoteLedger(own)
        stack.push_async_callback(remote.close)
        yield Served(running, replace(network, authorities=(own,)), remote, folder)


async def tile_from(served: Served, path: str) -> bytes:
    own = served.network.authorities[0]
    async with post_channel(Post(own.address, own.certificate)) as channel:
        stub = log_pb2_grpc.LogServiceStub(channel)
        response = await stub.GetTile(log_pb2.GetTileRequest(path=path), timeout=5)
        return bytes(response.data)


async def test_the_log_as_tiles(tmp_path: Path) -> None:
    async with authority(tmp_path) as served:
        await served.issue("a", "b", "c")
        note = await served.remote.checkpoint()
        checkpoint = open_checkpoint(note, ORIGIN, LOG.public)
        published = tmp_path / "log"
        assert (published / "checkpoint").read_text() == note
        assert await tile_from(served, "checkpoint") == note.encode()
        read = (published / "tile/0/000.p/3").read_bytes()
        assert TileTree(3, lambda tile: read).root() == checkpoint.root
        assert await tile_from(served, "tile/0/000.p/3") == read
        assert await tile_from(served, "tile/0/000.p/2") == read[:64]
        payloads = list(entries_of_folder(published, 3))
        assert Tree(map(leaf_hash, payloads)).root() == checkpoint.root
        bundle = (published / "tile/entries/000.p/3").read_bytes()
        assert await tile_from(served, "tile/entries/000.p/3") == bundle
        for path in ("tile/0/000", "tile/0/000.p/4", "tile/entries/001.p/1", "tile/1/000.p/1"):
            with pytest.raises(grpc.aio.AioRpcError, match="no checkpoint covers"):
                await tile_from(served, path)
        with pytest.raises(grpc.aio.AioRpcError, match="malformed"):
            await tile_from(served, "tile/0/../../../journal.db")


async def test_a_proof_out_of_tiles_convinces_by_a_policy(tmp_path: Path) -> None:
    async with authority(tmp_path) as served:
        await served.issue("a", "b", "c")
        await served.remote.checkpoint()
        own = served.network.authorities[0]
        policy = read_policy(policy_of(served.network).encode())
        for index in range(3):
            proof = read_log_proof(write_log_proof(await fetch_proof(own, index)))
            assert proof.extra is not None
            assert check_log_proof(proof, proof.extra, policy).size == 3
            assert entry_from_payload(proof.extra).index == index
        with pytest.raises(BadProof, match="none at 3"):
            await fetch_proof(own, 3)
        with pytest.raises(BadSignature):
            await fetch_proof(replace(own, log_key=key_of("x").public), 0)


async def test_a_start_mends_what_was_torn(tmp_path: Path) -> None:
    async with authority(tmp_path) as served:
        await served.issue("a", "b")
        await served.remote.checkpoint()
    tile = tmp_path / "log" / "tile/0/000.p/2"
    whole = tile.read_bytes()
    tile.write_bytes(whole[:40])
    (tmp_path / "log" / "tile/entries/000.p/2").unlink()
    async with authority(tmp_path) as served:
        await served.remote.checkpoint()
        assert tile.read_bytes() == whole
        assert len(list(entries_of_folder(tmp_path / "log", 2))) == 2


class FakeRecorder:
    """A recorder of as many entries as wanted."""

    def __init__(self, size: int) -> None:
        self.tree = Tree(leaf_hash(b"%d" % number) for number in range(size))
        self.store = self

    def entries(self, first: int, limit: int) -> Iterator["Stored"]:
        return (Stored(b"%d" % number) for number in range(first, first + limit))


@dataclass
class Stored:
    """An entry."""

    payload: bytes


async def test_partial_tiles_go_when_the_full_one_is_there(tmp_path: Path) -> None:
    folder = TileFolder(tmp_path, FakeRecorder(1_000))  # type: ignore[arg-type]
    for size in (100, 255, 256, 300, 1_000):
        await folder.publish(size, f"note {size}")
        assert (tmp_path / "checkpoint").read_text() == f"note {size}"
        tree = Tree(map(leaf_hash, entries_of_folder(tmp_path, size)))
        tiled = TileTree(size, lambda tile: (tmp_path / tile.path).read_bytes())
        assert tiled.root() == tree.root()
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    full = {f"tile/{level}/{index:03d}" for level in ("0", "entries") for index in range(3)}
    partial = {"tile/0/003.p/232", "tile/entries/003.p/232", "tile/1/000.p/3"}
    assert files - {"tile/1/000.p/1"} == {"checkpoint"} | full | partial
    await folder.publish(300, "an older one")
    assert (tmp_path / "checkpoint").read_text() == "note 1000"


async def test_a_disk_that_fails_stops_only_the_publishing(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where the folder should be")
    async with authority(tmp_path) as served:
        await served.issue("a")
        assert open_checkpoint(await served.remote.checkpoint(), ORIGIN, LOG.public).size == 1


@asynccontextmanager
async def remote_witness(folder: Path, name: str = "w1") -> AsyncIterator[Witness]:
    key = key_of(name)
    known = replace(NETWORK, witnesses=(Witness(name, key.public),))
    tls = (WITNESS_TLS.cert_pem, WITNESS_TLS.key_pem)
    async with serve_witness(folder, known, key, ("127.0.0.1", 0), tls) as port:
        yield Witness(name, key.public, f"127.0.0.1:{port}", WITNESS_TLS.cert_der)


async def test_checkpoints_are_cosigned_by_remote_witnesses(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        pair = [
            await stack.enter_async_context(remote_witness(tmp_path / name, name))
            for name in ("w1", "w2")
        ]
        gone = Witness("w3", key_of("w3").public, "127.0.0.1:1", WITNESS_TLS.cert_der)
        network = replace(NETWORK, witnesses=(*pair, gone), witness_quorum=2)
        cosigners = [RemoteCosigner(one) for one in network.witnesses]
        for cosigner in cosigners:
            stack.push_async_callback(cosigner.close)
        async with authority(tmp_path, network, cosigners) as served:
            for name in ("a", "b"):
                await served.issue(name)
                note = await served.remote.checkpoint()
                found = open_cosignatures(note, network.witnesses)
                assert [one.name for one in found] == ["w1", "w2"]
            assert (tmp_path / "log" / "checkpoint").read_text() == note


async def test_the_statuses_of_the_specification_travel(tmp_path: Path) -> None:
    tree = Tree(leaf_hash(b"%d" % number) for number in range(9))

    def note(size: int, key: str = "log", origin: str = ORIGIN, root: bytes = b"") -> str:
        return sign_checkpoint(key_of(key), origin, size, root or tree.root(size))

    async with remote_witness(tmp_path) as known:
        cosigner = RemoteCosigner(known)
        assert isinstance(await cosigner.add_checkpoint(0, [], note(5)), str)
        expected = {
            404: (0, [], note(5, origin="elsewhere")),
            403: (0, [], note(5, key="thief")),
            400: (9, [], note(5)),
            422: (5, [b"x" * 32], note(9)),
            409: (4, [], note(9)),
        }
        for status, submission in expected.items():
            answer = await cosigner.add_checkpoint(*submission)
            assert isinstance(answer, WitnessRefusal)
            assert (answer.status, answer.fork) == (status, None)
            assert answer.size == (5 if status == 409 else None)
        forked = await cosigner.add_checkpoint(5, [], note(5, root=b"x" * 32))
        assert isinstance(forked, WitnessRefusal) and forked.fork is not None
        assert isinstance(
            await cosigner.add_checkpoint(5, tree.consistency_proof(5, 9), note(9)), str
        )
        await cosigner.close()


async def test_a_node_without_a_place_in_the_network_file_is_no_witness(tmp_path: Path) -> None:
    tls = (WITNESS_TLS.cert_pem, WITNESS_TLS.key_pem)
    with pytest.raises(ConfigError, match="names no witness"):
        async with serve_witness(tmp_path, NETWORK, key_of("x"), ("127.0.0.1", 0), tls):
            pass


CRASHING_WITNESS = """
import os, sys
from pathlib import Path
from plait.identity import SigningKey
from plait.ledger.service.witness import WitnessFiles
from plait.ledger.witness import LogWitness

at, step = int(sys.argv[1]), 0
def dying(real):
    def call(*args, **kwargs):
        global step
        step += 1
        if step == at:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    return call

folder, log_key, note = Path(sys.argv[2]), bytes.fromhex(sys.argv[3]), open(sys.argv[4]).read()
proof = [bytes.fromhex(text) for text in sys.argv[7:]]
files = WitnessFiles(folder)
os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
real_open = Path.open
Path.open = dying(real_open)
witness = LogWitness("w", SigningKey.from_seed(b"w" * 32), {sys.argv[6]: log_key}, files)
answer = witness.add_checkpoint(int(sys.argv[5]), proof, note, 1)
print(answer, end="")
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 8))
async def test_killed_at_each_write_it_never_cosigns_a_fork(tmp_path: Path, at: int) -> None:
    """SIGKILL before every open, fsync and rename; then the other branch is submitted."""
    honest = Tree(leaf_hash(b"%d" % number) for number in range(9))
    forked = Tree(leaf_hash(b"-%d" % number) for number in range(9))
    folder = tmp_path / "witness"
    key = key_of("w")
    before = LogWitness("w", key, {ORIGIN: LOG.public}, WitnessFiles(folder))
    assert isinstance(
        before.add_checkpoint(0, [], sign_checkpoint(LOG, ORIGIN, 4, honest.root(4)), 1), str
    )
    path = tmp_path / "note"
    path.write_text(sign_checkpoint(LOG, ORIGIN, 9, honest.root()))
    proof = [hashed.hex() for hashed in honest.consistency_proof(4, 9)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CRASHING_WITNESS, str(at), str(folder)),
        *(LOG.public.hex(), str(path), "4", ORIGIN, *proof),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ},
    )
    out, _ = await process.communicate()
    answered = out.startswith("— ".encode())
    assert answered == (process.returncode == 0)
    assert answered or process.returncode == -signal.SIGKILL
    again = LogWitness("w", key, {ORIGIN: LOG.public}, WitnessFiles(folder))
    for old_size, size in ((0, 9), (4, 9), (9, 9), (0, 4), (4, 4)):
        note = sign_checkpoint(LOG, ORIGIN, size, forked.root(size))
        steps = forked.consistency_proof(old_size, size) if 0 < old_size < size else []
        assert isinstance(again.add_checkpoint(old_size, steps, note, 2), WitnessRefusal)
    held = again._memory.latest(ORIGIN)
    assert held is not None
    size = open_checkpoint(held, ORIGIN, LOG.public).size
    assert size == 9 if answered else size in (4, 9)
    note = sign_checkpoint(LOG, ORIGIN, 9, honest.root())
    steps = honest.consistency_proof(size, 9) if size < 9 else []
    assert isinstance(again.add_checkpoint(size, steps, note, 3), str)


def party(
    network: NetworkFile, posts: Sequence[Post] = (), folder: Path | None = None
) -> NoticeExchange:
    file = None if folder is None else NoticeFile(folder / "notices")
    return NoticeExchange(NoticeBoard(network), network, lambda: posts, file=file)


async def test_a_lying_authority_is_proven_and_frozen(tmp_path: Path) -> None:
    """One key, two histories, each shown to another client; both sizes equal, then not."""
    async with authority(tmp_path / "a") as one, authority(tmp_path / "b") as two:
        await one.issue("x", "y", "z")
        await two.issue("p", "q", "r", "s", "t")
        first, second = await one.remote.checkpoint(), await two.remote.checkpoint()
        deceived, other = party(one.network), party(two.network)
        deceived.take(Told(checkpoints=(first,)))
        other.take(Told(checkpoints=(second,)))
        # They meet. Who is shown the first history cannot have the second one's tiles …
        deceived.take(other.board.tell())
        await deceived.round()
        assert not deceived.board.frozen
        # … but the other can, and its proof convinces everybody.
        other.take(deceived.board.tell())
        await other.round()
        assert other.board.frozen.keys() == {PEER.peer_id}
        deceived.take(other.board.tell())
        assert deceived.board.trusted() == ()


async def test_an_authority_hears_and_tells(tmp_path: Path) -> None:
    async with authority(tmp_path) as served:
        posts = posts_of(served.network.authorities)
        client, stranger = party(served.network, posts, tmp_path), party(served.network, posts)
        peer, ledger = key_of("account"), key_of("account ledger")
        client.take(Told(revocations=(make_revocation(peer, NETWORK_ID, 2, NOW_MS),)))
        await client.round()
        assert await stranger.exchange(posts[0])
        assert stranger.board.revoked == {peer.peer_id: 2}
        now_ms = served.running.recorder.clock_ms()
        query = seal(
            ledger,
            pb.AccountQuery(network_id=NETWORK_ID, account=peer.peer_id, issued_ms=now_ms),
        )
        for serial, refused in ((1, True), (2, False)):
            cert = make_key_cert(peer, ledger.public, NETWORK_ID, now_ms, 10**6, serial)
            if refused:
                with pytest.raises(LedgerError, match="revoked"):
                    await served.remote.account(query, cert)
            else:
                assert (await served.remote.account(query, cert)).available == 0
        remembered = party(served.network, folder=tmp_path)
        assert remembered.board.revoked == {peer.peer_id: 2}


async def test_who_calls_too_often_is_refused(tmp_path: Path) -> None:
    async with authority(tmp_path) as served:
        client, (post,) = party(served.network), posts_of(served.network.authorities)
        answers = [await client.exchange(post) for _ in range(round(CALLS_BURST) + 20)]
        assert all(answers[: round(CALLS_BURST)])
        assert not all(answers)
        assert not await party(replace(served.network, network_id="other")).exchange(post)


def test_the_growth_of_a_tree_out_of_tiles_alone() -> None:
    tree = Tree(leaf_hash(b"%d" % number) for number in range(600))
    tiled = TileTree(600, lambda tile: tile_data(tree, tile))
    proof = tiled.consistency_proof(256, 600)
    verify_consistency(256, 600, tiled.root(256), tiled.root(), proof)
    assert Tile(1, 0, 2).path == "tile/1/000.p/2"
