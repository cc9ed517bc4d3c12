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
    read_envelopes,
    read_items,
    read_members,
    read_text,
    write_envelope,
)
from plait.ledger.canonical import JsonValue, decode_canonical, encode_canonical
from plait.ledger.certs import check_key_cert
from plait.ledger.checkpoint import open_checkpoint
from plait.network_file import NetworkFile
from plait.types import PeerId
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation

ItemT = TypeVar("ItemT")

FORK_FORMAT = "plait.fork.v1"
FORK_BYTES_MAX = 65_536


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


ForkProof = LogFork | ReservationFork


@dataclass(frozen=True, slots=True)
class ForkVerdict:
    """Who signed twice, and what."""

    culprit: PeerId
    statement: str


def write_fork_proof(proof: ForkProof) -> bytes:
    """Write a proof as canonical JSON."""
    members: dict[str, JsonValue] = {"format": FORK_FORMAT}
    match proof:
        case LogFork():
            members |= {"kind": "log", "origin": proof.origin, "checkpoints": proof.checkpoints}
        case ReservationFork():
            members |= {
                "kind": "reservation",
                "reservations": [write_envelope(item) for item in proof.reservations],
                "certs": [write_envelope(item) for item in proof.certs],
            }
    return encode_canonical(members)


def read_fork_proof(data: bytes) -> ForkProof:
    """Read a proof strictly, without judging it; raises ``ValueError``."""
    if len(data) > FORK_BYTES_MAX:
        raise ValueError(f"a fork proof is at most {FORK_BYTES_MAX} bytes")
    value = decode_canonical(data)
    kind = value.get("kind") if isinstance(value, dict) else None
    names = ("origin", "checkpoints") if kind == "log" else ("reservations", "certs")
    members = read_members(value, "the fork proof", ("format", "kind", *names))
    if members["format"] != FORK_FORMAT or kind not in ("log", "reservation"):
        raise ValueError(f"the format is not {FORK_FORMAT}, or its kind is unknown")
    if kind == "log":
        notes = read_items(members["checkpoints"], "checkpoints")
        first, second = _two([read_text(note, "checkpoint") for note in notes])
        return LogFork(read_text(members["origin"], "origin"), (first, second))
    return ReservationFork(
        _two(read_envelopes(members["reservations"], "reservations")),
        _two(read_envelopes(members["certs"], "certs")),
    )


def check_fork_proof(proof: ForkProof, network: NetworkFile) -> ForkVerdict:
    """Judge a proof by the network file's keys; ``VerificationError`` if it proves nothing."""
    if isinstance(proof, LogFork):
        return _check_log_fork(proof, network)
    return _check_reservation_fork(proof, network)


def _check_log_fork(proof: LogFork, network: NetworkFile) -> ForkVerdict:
    for authority in network.authorities:
        if authority.log_origin == proof.origin:
            break
    else:
        raise BadProof("the network file names no such log")
    first, second = (
        open_checkpoint(note, authority.log_origin, authority.log_key) for note in proof.checkpoints
    )
    if first.size != second.size:
        raise BadProof(
            f"the sizes differ, {first.size} and {second.size}: one may follow the other"
        )
    if first.root == second.root:
        raise BadProof("the roots are equal: nothing was signed twice")
    statement = f"signed two different trees of size {first.size} of the log {proof.origin}"
    return ForkVerdict(authority.peer, statement)


def _check_reservation_fork(proof: ReservationFork, network: NetworkFile) -> ForkVerdict:
    pairs = zip(proof.reservations, proof.certs, strict=True)
    first, second = (_reservation(envelope, cert, network) for envelope, cert in pairs)
    numbers = [(item.account, item.lane, item.sequence) for item in (first, second)]
    if numbers[0] != numbers[1]:
        raise BadProof("the reservations have different accounts, lanes or numbers")
    if digest(proof.reservations[0].payload) == digest(proof.reservations[1].payload):
        raise BadProof("the reservations are the same: nothing was signed twice")
    statement = f"signed two reservations under lane {first.lane} number {first.sequence}"
    return ForkVerdict(PeerId(first.account), statement)


def _reservation(
    envelope: SignedEnvelope, cert: SignedEnvelope, network: NetworkFile
) -> BudgetReservation:
    with about("reservation"):
        reservation = open_envelope(envelope, BudgetReservation)
        if reservation.network_id != network.network_id:
            raise BadProof("it is of another network")
        # Valid when it began: a culprit must not escape by the date it wrote.
        begin_ms = decode(cert.payload, NodeKeyCert).not_before_ms
        account = PeerId(reservation.account)
        _, ledger_key = check_key_cert(cert, network.network_id, begin_ms, account)
        if envelope.signer != ledger_key:
            raise BadSignature("it is not signed by the key that its certificate names")
        return reservation


def _two(items: Sequence[ItemT]) -> tuple[ItemT, ItemT]:
    if len(items) != 2:
        raise ValueError("a fork proof has two of each")
    return items[0], items[1]
