"""Fork proofs: two signed objects that no honest key would both have signed.

Portable: a small canonical JSON file that anybody with the network file can check offline.
Dates play no part: whoever signed both is caught, whatever times it wrote into them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from plait.envelope import decode, digest, open_envelope
from plait.errors import BadProof, BadSignature
from plait.ledger.blame import about
from plait.ledger.bundle_fields import (
    read_base64,
    read_envelopes,
    read_items,
    read_members,
    read_text,
    write_base64,
    write_envelope,
)
from plait.ledger.canonical import JsonValue, decode_canonical, encode_canonical
from plait.ledger.certs import check_key_cert
from plait.ledger.checkpoint import Checkpoint, open_checkpoint
from plait.ledger.merkle import Tree, verify_consistency
from plait.network_file import NetworkFile
from plait.types import PeerId
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation, SessionVoucher

ItemT = TypeVar("ItemT")
NumberedT = TypeVar("NumberedT", BudgetReservation, SessionVoucher)

FORK_FORMAT = "plait.fork.v1"
FORK_BYTES_MAX = 65_536

_MEMBERS = {
    "log": ("origin", "checkpoints"),
    "growth": ("origin", "checkpoints", "prefix_root", "hashes"),
    "reservation": ("reservations", "certs"),
    "voucher": ("vouchers", "certs"),
}


@dataclass(frozen=True, slots=True)
class LogFork:
    """Two checkpoints of one log with the same size and different roots, as signed notes."""

    origin: str
    checkpoints: tuple[str, str]


@dataclass(frozen=True, slots=True)
class ReservationFork:
    """Two reservations of one (account, lane, sequence), with the certificate of each's key."""

    reservations: tuple[SignedEnvelope, SignedEnvelope]
    certs: tuple[SignedEnvelope, SignedEnvelope]


@dataclass(frozen=True, slots=True)
class GrowthFork:
    """Two checkpoints of one log, of which the larger does not contain the smaller.

    The larger tree's first leaves have another root, ``prefix_root``: the consistency proof
    ``hashes`` leads from it to the larger root. Whoever has the larger tree can make it.
    """

    origin: str
    checkpoints: tuple[str, str]
    prefix_root: bytes
    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class VoucherFork:
    """Two vouchers of one (session, epoch, sequence), with the certificate of each's key."""

    vouchers: tuple[SignedEnvelope, SignedEnvelope]
    certs: tuple[SignedEnvelope, SignedEnvelope]


ForkProof = LogFork | GrowthFork | ReservationFork | VoucherFork


@dataclass(frozen=True, slots=True)
class ForkVerdict:
    """Who signed twice, and what."""

    culprit: PeerId
    statement: str


def grown_apart(
    notes: tuple[str, str], smaller: Checkpoint, larger: Checkpoint, larger_tree: Tree
) -> GrowthFork | None:
    """The proof that a log's larger tree does not contain its smaller one; ``None`` if it does.

    ``notes`` are the signed checkpoints, ``smaller`` and ``larger`` what they say; sizes rise from
    above 0. Raises ``BadProof`` if the tree is not the larger checkpoint's: then nothing is known,
    and whoever serves the log withholds it. Raises what reading the tree raises.
    """
    if larger_tree.root(larger.size) != larger.root:
        raise BadProof("the log shows another tree than its checkpoint signs")
    prefix_root = larger_tree.root(smaller.size)
    if prefix_root == smaller.root:
        return None
    hashes = tuple(larger_tree.consistency_proof(smaller.size, larger.size))
    return GrowthFork(larger.origin, notes, prefix_root, hashes)


def write_fork_proof(proof: ForkProof) -> bytes:
    """Write a proof as canonical JSON."""
    members: dict[str, JsonValue] = {"format": FORK_FORMAT}
    match proof:
        case LogFork():
            members |= {"kind": "log", "origin": proof.origin, "checkpoints": proof.checkpoints}
        case GrowthFork():
            members |= {
                "kind": "growth",
                "origin": proof.origin,
                "checkpoints": proof.checkpoints,
                "prefix_root": write_base64(proof.prefix_root),
                "hashes": [write_base64(hashed) for hashed in proof.hashes],
            }
        case ReservationFork():
            members |= {
                "kind": "reservation",
                "reservations": [write_envelope(item) for item in proof.reservations],
                "certs": [write_envelope(item) for item in proof.certs],
            }
        case VoucherFork():
            members |= {
                "kind": "voucher",
                "vouchers": [write_envelope(item) for item in proof.vouchers],
                "certs": [write_envelope(item) for item in proof.certs],
            }
    return encode_canonical(members)


def read_fork_proof(data: bytes) -> ForkProof:
    """Read a proof strictly, without judging it; raises ``ValueError``."""
    if len(data) > FORK_BYTES_MAX:
        raise ValueError(f"a fork proof is at most {FORK_BYTES_MAX} bytes")
    value = decode_canonical(data)
    kind = value.get("kind") if isinstance(value, dict) else None
    names = _MEMBERS.get(kind, ()) if isinstance(kind, str) else ()
    members = read_members(value, "the fork proof", ("format", "kind", *names))
    if members["format"] != FORK_FORMAT or not names:
        raise ValueError(f"the format is not {FORK_FORMAT}, or its kind is unknown")
    if kind in ("log", "growth"):
        notes = read_items(members["checkpoints"], "checkpoints")
        first, second = _two([read_text(note, "checkpoint") for note in notes])
        origin = read_text(members["origin"], "origin")
        if kind == "log":
            return LogFork(origin, (first, second))
        hashes = read_items(members["hashes"], "hashes")
        prefix_root = read_base64(members["prefix_root"], "prefix_root")
        return GrowthFork(
            origin, (first, second), prefix_root, tuple(read_base64(h, "hash") for h in hashes)
        )
    certs = _two(read_envelopes(members["certs"], "certs"))
    if kind == "voucher":
        return VoucherFork(_two(read_envelopes(members["vouchers"], "vouchers")), certs)
    return ReservationFork(_two(read_envelopes(members["reservations"], "reservations")), certs)


def check_fork_proof(proof: ForkProof, network: NetworkFile) -> ForkVerdict:
    """Judge a proof by the network file's keys; ``VerificationError`` if it proves nothing."""
    match proof:
        case LogFork():
            return _check_log_fork(proof, network)
        case GrowthFork():
            return _check_growth_fork(proof, network)
        case ReservationFork():
            return _check_reservation_fork(proof, network)
        case VoucherFork():
            return _check_voucher_fork(proof, network)


def _opened(
    proof: LogFork | GrowthFork, network: NetworkFile
) -> tuple[PeerId, Checkpoint, Checkpoint]:
    for authority in network.authorities:
        if authority.log_origin == proof.origin:
            break
    else:
        raise BadProof("the network file names no such log")
    first, second = (
        open_checkpoint(note, authority.log_origin, authority.log_key) for note in proof.checkpoints
    )
    return authority.peer, first, second


def _check_growth_fork(proof: GrowthFork, network: NetworkFile) -> ForkVerdict:
    culprit, first, second = _opened(proof, network)
    if not 0 < first.size < second.size:
        raise BadProof(f"the sizes do not rise from above 0: {first.size} and {second.size}")
    if proof.prefix_root == first.root:
        raise BadProof("the larger tree contains the smaller: nothing was signed twice")
    verify_consistency(first.size, second.size, proof.prefix_root, second.root, proof.hashes)
    statement = (
        f"signed a tree of size {second.size} of the log {proof.origin} that does not contain "
        f"the one of size {first.size} that it signed too"
    )
    return ForkVerdict(culprit, statement)


def _check_log_fork(proof: LogFork, network: NetworkFile) -> ForkVerdict:
    culprit, first, second = _opened(proof, network)
    if first.size != second.size:
        raise BadProof(
            f"the sizes differ, {first.size} and {second.size}: one may follow the other"
        )
    if first.root == second.root:
        raise BadProof("the roots are equal: nothing was signed twice")
    statement = f"signed two different trees of size {first.size} of the log {proof.origin}"
    return ForkVerdict(culprit, statement)


def _check_reservation_fork(proof: ReservationFork, network: NetworkFile) -> ForkVerdict:
    pairs = zip(proof.reservations, proof.certs, strict=True)
    first, second = (
        _signed(envelope, cert, BudgetReservation, network) for envelope, cert in pairs
    )
    numbers = [(item.account, item.lane, item.sequence) for item in (first, second)]
    if numbers[0] != numbers[1]:
        raise BadProof("the reservations have different accounts, lanes or numbers")
    _check_differ(proof.reservations, "reservations")
    statement = f"signed two reservations under lane {first.lane} number {first.sequence}"
    return ForkVerdict(PeerId(first.account), statement)


def _check_voucher_fork(proof: VoucherFork, network: NetworkFile) -> ForkVerdict:
    pairs = zip(proof.vouchers, proof.certs, strict=True)
    first, second = (_signed(envelope, cert, SessionVoucher, network) for envelope, cert in pairs)
    numbers = [
        (item.account, item.session_id, item.epoch, item.sequence) for item in (first, second)
    ]
    if numbers[0] != numbers[1]:
        raise BadProof("the vouchers have different accounts, sessions, epochs or numbers")
    _check_differ(proof.vouchers, "vouchers")
    statement = (
        f"signed two vouchers under number {first.sequence} of epoch {first.epoch} "
        f"of session {first.session_id.hex()}"
    )
    return ForkVerdict(PeerId(first.account), statement)


def _check_differ(pair: tuple[SignedEnvelope, SignedEnvelope], what: str) -> None:
    if digest(pair[0].payload) == digest(pair[1].payload):
        raise BadProof(f"the {what} are the same: nothing was signed twice")


def _signed(
    envelope: SignedEnvelope,
    cert: SignedEnvelope,
    message_class: type[NumberedT],
    network: NetworkFile,
) -> NumberedT:
    """What the account signed with the key that its certificate names."""
    with about("reservation" if message_class is BudgetReservation else "voucher"):
        message = open_envelope(envelope, message_class)
        if message.network_id != network.network_id:
            raise BadProof("it is of another network")
        # Valid when it began: a culprit must not escape by the date it wrote.
        begin_ms = decode(cert.payload, NodeKeyCert).not_before_ms
        account = PeerId(message.account)
        _, ledger_key = check_key_cert(cert, network.network_id, begin_ms, account)
        if envelope.signer != ledger_key:
            raise BadSignature("it is not signed by the key that its certificate names")
        return message


def _two(items: Sequence[ItemT]) -> tuple[ItemT, ItemT]:
    if len(items) != 2:
        raise ValueError("a fork proof has two of each")
    return items[0], items[1]
