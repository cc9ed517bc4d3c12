"""Attacks 15 to 28, on signatures, encodings and the log, beside those on the money.

The log is the one of the world's own entries. Each attack is made anew from the world's
random numbers and must be refused, or proven, by the code that guards against it.
"""

import base64
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from plait.envelope import digest, encode, open_envelope, pae, payload_type, seal
from plait.errors import BadProof, BadSignature, RemoteProtocolError
from plait.identity import verify
from plait.ledger.balances import Entry, EntryKind
from plait.ledger.certs import check_key_cert, make_key_cert, make_revocation
from plait.ledger.checkpoint import key_id, open_checkpoint, sign_checkpoint
from plait.ledger.fork import LogFork, check_fork_proof
from plait.ledger.merkle import (
    EMPTY_ROOT,
    Tree,
    leaf_hash,
    node_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)
from plait.ledger.notices import NoticeBoard, Told
from plait.ledger.tiles import Tile, TileTree, tile_data
from plait.ledger.withheld import judge_grant
from plait.ledger.witness import CONFLICT, LogWitness, WitnessRefusal
from plait.network_file import NetworkFile
from plait.testing.accounting import key_of, paper_network
from plait.testing.ledger_attacks import refuses
from plait.testing.ledger_attacks_escrow import EscrowWorld
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import (
    IssueOrder,
    ReservationGrant,
    SessionVoucher,
    StageReceipt,
)

_PRIME = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_LOW_ORDER = (0, 1, _PRIME - 1, _PRIME, _PRIME + 1)
LEAVES_MAX = 64
"""The attacks on proofs look at the log's first leaves, so that they stay quick."""


class MemoryWitness:
    """A witness's memory that a race or a restored backup can change behind its back."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.racer = ""
        """Comes first at the next advance."""

    def latest(self, origin: str) -> str | None:
        """The last note of a log."""
        return self.notes.get(origin)

    def advance(self, origin: str, previous: str | None, note: str) -> bool:
        """Compare and swap."""
        if self.racer:
            self.notes[origin], self.racer = self.racer, ""
        if self.notes.get(origin) != previous:
            return False
        self.notes[origin] = note
        return True


class LogWorld(EscrowWorld):
    """A ledger, its keys and its log under attack."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.network: NetworkFile = paper_network()
        self.authority = self.network.authorities[0]
        self.key = key_of("client ledger")

    # What the attackers have at hand.

    def leaves(self, least: int = 2) -> list[bytes]:
        """Some first entries of the log, at least so many, as leaves."""
        while len(self.entries) < least:
            self.issue(self.entries[0].lines[1].account, 1)
        size = self.rng.randint(least, max(least, min(len(self.entries), LEAVES_MAX)))
        return [entry.payload for entry in self.entries[:size]]

    def hashes(self, least: int = 2) -> list[bytes]:
        """Their hashes."""
        return [leaf_hash(leaf) for leaf in self.leaves(least)]

    def note(self, hashes: Sequence[bytes], key: str = "authority log") -> str:
        """A checkpoint of these leaf hashes, by the log's key or another's."""
        return sign_checkpoint(key_of(key), self.authority.log_origin, len(hashes), root_of(hashes))

    def message(self) -> tuple[bytes, bytes]:
        """A message and its good signature."""
        message = self.rng.randbytes(self.rng.randint(0, 64))
        return message, self.key.sign(message)

    def voucher(self) -> SessionVoucher:
        """A voucher of some session."""
        session = self.some()
        return SessionVoucher(
            network_id="attacked", session_id=session.id, account=session.client, sequence=1
        )

    def signed(self, payload: bytes, name: type[Any] = SessionVoucher) -> SignedEnvelope:
        """Any bytes, well signed as a payload."""
        kind = payload_type(name)
        signature = self.key.sign(pae(kind, payload))
        return SignedEnvelope(
            payload_type=kind, payload=payload, signer=self.key.public, signature=signature
        )

    # Signatures and encodings.

    def attack_15_low_order_keys_and_points_not_canonical(self) -> None:
        """Nobody's key, which signs everything, and R in a second spelling."""
        message, signature = self.message()
        sign = self.rng.randrange(2) << 255
        point = ((self.rng.choice(_LOW_ORDER)) | sign).to_bytes(32, "little")
        identity = (1).to_bytes(32, "little")
        refuses(BadSignature, lambda: verify(point, identity + bytes(32), message))
        refuses(BadSignature, lambda: verify(point, signature, message))
        refuses(BadSignature, lambda: verify(self.key.public, point + signature[32:], message))
        refuses(BadSignature, lambda: verify(self.key.public, point + bytes(32), message))

    def attack_16_a_second_spelling_of_a_signature(self) -> None:
        """S + L verifies by the equation alone."""
        message, signature = self.message()
        verify(self.key.public, signature, message)
        scalar = int.from_bytes(signature[32:], "little") + _ORDER
        again = signature[:32] + scalar.to_bytes(32, "little")
        refuses(BadSignature, lambda: verify(self.key.public, again, message))

    def attack_17_other_bytes_of_the_same_message(self) -> None:
        """Unknown fields, fields in another order, over-long varints: signed, and refused."""
        voucher = self.voucher()
        payload = encode(voucher)
        assert open_envelope(self.signed(payload), SessionVoucher) == voucher
        head = encode(SessionVoucher(network_id=voucher.network_id))
        others = [
            payload + b"\xfa\x3f\x01x",  # field 127
            payload[len(head) :] + head,
            payload.replace(b"\x20\x01", b"\x20\x81\x00", 1),  # sequence 1 in two bytes
        ]
        for other in others:
            assert other != payload
            refuses(RemoteProtocolError, partial(open_envelope, self.signed(other), SessionVoucher))

    def attack_18_a_payload_that_two_parsers_read_differently(self) -> None:
        """The last of two equal fields wins in one parser, the first in another."""
        voucher = self.voucher()
        poorer, richer = encode(voucher), encode(SessionVoucher(sequence=999))
        both = self.signed(poorer + richer)
        refuses(RemoteProtocolError, lambda: open_envelope(both, SessionVoucher))
        swapped = self.signed(poorer)
        swapped.payload = poorer + richer  # verified one, used the other
        refuses(BadSignature, lambda: open_envelope(swapped, SessionVoucher))

    def attack_19_one_kind_of_object_as_another(self) -> None:
        """A voucher is no receipt, whatever its envelope says."""
        envelope = self.signed(encode(self.voucher()))
        refuses(BadSignature, lambda: open_envelope(envelope, StageReceipt))
        envelope.payload_type = payload_type(StageReceipt)
        refuses(BadSignature, lambda: open_envelope(envelope, StageReceipt))
        order = IssueOrder(network_id="attacked", amount=1)
        refuses(
            BadSignature,
            lambda: open_envelope(self.signed(encode(order), IssueOrder), SessionVoucher),
        )

    def attack_20_a_key_that_is_expired_or_revoked(self) -> None:
        """A stolen key whose certificate is old, or voided, whatever date is written on it."""
        peer, stolen = key_of("client"), key_of("client ledger").public
        serial = self.rng.randint(1, 9)
        ttl_ms = 60_000
        cert = make_key_cert(peer, stolen, "attacked", self.now_ms - ttl_ms, ttl_ms, serial)
        before_ms = self.now_ms - ttl_ms // 2
        check_key_cert(cert, "attacked", before_ms)
        refuses(BadSignature, lambda: check_key_cert(cert, "attacked", self.now_ms))
        revoked = {PeerId(peer.peer_id): serial + 1}
        refuses(BadSignature, lambda: check_key_cert(cert, "attacked", before_ms, None, revoked))
        # Who has the ledger key alone can neither delegate to itself nor revoke.
        own = make_key_cert(key_of("client ledger"), stolen, "attacked", self.now_ms, ttl_ms, 99)
        refuses(
            BadSignature,
            lambda: check_key_cert(own, "attacked", self.now_ms, PeerId(peer.peer_id)),
        )
        board = NoticeBoard(self.network)
        forged = make_revocation(peer, self.network.network_id, 5, self.now_ms)
        forged.signer = key_of("client ledger").public
        board.handle(Told(revocations=(forged,)))
        assert not board.revoked

    def attack_21_another_key_under_the_id_of_the_logs(self) -> None:
        """A note's key ids have four bytes: a line with the right one and a wrong signature."""
        hashes = self.hashes()
        origin, log_key = self.authority.log_origin, self.authority.log_key
        text = self.note(hashes).partition("\n\n")[0] + "\n"
        raw = key_id(origin, log_key) + key_of("collider").sign(text.encode())
        line = f"— {origin} {_base64(raw)}\n"
        refuses(BadSignature, lambda: open_checkpoint(f"{text}\n{line}", origin, log_key))
        both = self.note(hashes) + line
        refuses(BadSignature, lambda: open_checkpoint(both, origin, log_key))

    # The log.

    def attack_22_two_views_for_two_clients(self) -> None:
        """Two trees of one size: whoever sees both proves it to everybody."""
        hashes = self.hashes()
        other = [*hashes]
        other[self.rng.randrange(len(other))] = leaf_hash(self.rng.randbytes(8))
        views = self.note(hashes), self.note(other)
        proof = LogFork(self.authority.log_origin, views)
        assert check_fork_proof(proof, self.network).culprit == self.authority.peer
        honest = LogFork(self.authority.log_origin, (views[0], views[0]))
        refuses(BadProof, lambda: check_fork_proof(honest, self.network))
        board = NoticeBoard(self.network)
        board.handle(Told(checkpoints=views))
        assert self.authority.peer in board.frozen

    def attack_23_a_log_rolled_back(self) -> None:
        """A log that goes back, or grows another way from before, gets no cosignature."""
        hashes = self.hashes(4)
        witness, memory = self.witness()
        self.cosigned(witness, memory, hashes)
        cut = self.rng.randint(1, len(hashes) - 1)
        shorter = hashes[:cut]
        for old in (cut, len(hashes), 0):
            answer = witness.add_checkpoint(old, [], self.note(shorter), 1)
            assert isinstance(answer, WitnessRefusal), old
        regrown = [*shorter, *(leaf_hash(b"new %d" % at) for at in range(len(hashes)))]
        proof = Tree(regrown).consistency_proof(len(hashes), len(regrown))
        answer = witness.add_checkpoint(len(hashes), proof, self.note(regrown), 1)
        assert isinstance(answer, WitnessRefusal) and answer.status != CONFLICT

    def attack_24_two_sizes_at_once(self) -> None:
        """Of two checkpoints that both follow the last, one is cosigned."""
        hashes = self.hashes(4)
        witness, memory = self.witness()
        self.cosigned(witness, memory, hashes[:2])
        proof = Tree(hashes).consistency_proof(2, len(hashes))
        memory.racer = self.note(hashes[:3])
        answer = witness.add_checkpoint(2, proof, self.note(hashes), 1)
        assert isinstance(answer, WitnessRefusal)
        assert (answer.status, answer.size) == (CONFLICT, 3)

    def attack_25_proofs_cut_padded_or_of_size_nought(self) -> None:
        """A proof has exactly its hashes, in their order."""
        hashes = self.hashes(3)
        tree, size = Tree(hashes), len(hashes)
        index, first = self.rng.randrange(size), self.rng.randint(1, size - 1)
        root, path = tree.root(), tree.inclusion_proof(index, size)
        verify_inclusion(hashes[index], index, size, path, root)
        steps = tree.consistency_proof(first, size)
        verify_consistency(first, size, tree.root(first), root, steps)
        for wrong in _spoilt(path, self.rng):
            refuses(BadProof, partial(verify_inclusion, hashes[index], index, size, wrong, root))
        for wrong in _spoilt(steps, self.rng):
            refuses(
                BadProof,
                partial(verify_consistency, first, size, tree.root(first), root, wrong),
            )
        refuses(BadProof, lambda: verify_inclusion(hashes[0], 0, 0, [], EMPTY_ROOT))
        refuses(BadProof, lambda: verify_consistency(0, size, EMPTY_ROOT, root, path or [root]))

    def attack_26_a_node_passed_off_as_a_leaf(self) -> None:
        """Two hashes side by side hash to their node only as a node."""
        hashes = self.hashes(4)[:4]
        root = root_of(hashes)
        halves = [node_hash(*hashes[:2]), node_hash(*hashes[2:])]
        forged = leaf_hash(hashes[0] + hashes[1])
        assert forged != halves[0]
        refuses(BadProof, lambda: verify_inclusion(forged, 0, 2, [halves[1]], root))

    def attack_27_a_grant_kept_out_of_the_log(self) -> None:
        """The journal under a checkpoint from after the merge delay proves it."""
        entries = [replace(entry, network_id=self.network.network_id) for entry in self.entries]
        reserves = [entry for entry in entries[:LEAVES_MAX] if entry.kind is EntryKind.RESERVE]
        if not reserves:
            return
        granted = self.rng.choice(reserves)
        grant = self.grant_of(granted)
        kept = [
            replace(entry, index=index)
            for index, entry in enumerate(e for e in entries[:LEAVES_MAX] if e != granted)
        ]
        late = replace(kept[-1], index=len(kept), posted_ms=granted.posted_ms + 10_001)
        for journal, finding in (
            (entries[:LEAVES_MAX], "included"),
            ([*kept, late], "withheld"),
            (kept[: granted.index], "not yet due"),
        ):
            leaves = [entry.payload for entry in journal]
            note = self.note([leaf_hash(leaf) for leaf in leaves])
            assert judge_grant(grant, leaves, note, self.network).finding == finding

    def attack_28_a_tile_swapped_for_another(self) -> None:
        """A tree read from tiles of which one is false has another root."""
        hashes = self.hashes(2)
        tree, size = Tree(hashes), len(hashes)
        data = tile_data(tree, Tile(0, 0, size))
        assert TileTree(size, lambda tile: data).root() == tree.root()
        false = bytearray(data)
        false[self.rng.randrange(len(false))] ^= 1 << self.rng.randrange(8)
        assert TileTree(size, lambda tile: bytes(false)).root() != tree.root()
        for wrong in (data[:-32], data + data[:32], data[:-1]):
            refuses(BadProof, TileTree(size, partial(_always, wrong)).root)

    def witness(self) -> tuple[LogWitness, MemoryWitness]:
        """A fresh witness of the log."""
        memory = MemoryWitness()
        logs = {self.authority.log_origin: self.authority.log_key}
        return LogWitness("w.example", key_of("witness"), logs, memory), memory

    def cosigned(self, witness: LogWitness, memory: MemoryWitness, hashes: Sequence[bytes]) -> None:
        """Have a first checkpoint cosigned."""
        answer = witness.add_checkpoint(0, [], self.note(hashes), 1)
        assert isinstance(answer, str) and memory.notes

    def grant_of(self, entry: Entry) -> SignedEnvelope:
        """The authority's grant of a reservation that it booked."""
        grant = ReservationGrant(
            network_id=self.network.network_id,
            reservation_digest=entry.cause,
            amount=entry.lines[0].debit,
            granted_ms=entry.posted_ms,
            merge_delay_ms=10_000,
        )
        return seal(key_of("authority ledger"), grant)


def _spoilt(proof: Sequence[bytes], rng: Random) -> list[list[bytes]]:
    padded = [*proof, rng.randbytes(32)]
    if not proof:
        return [padded]
    flipped = [*proof]
    at = rng.randrange(len(proof))
    flipped[at] = digest(flipped[at])
    return [padded, [*proof[:-1]], [*proof[1:]], flipped, [*proof[:-1], proof[-1][:-1]]]


def _always(data: bytes, tile: Tile) -> bytes:
    return data


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
