"""What nobody can deny, kept and passed on: checkpoints, fork proofs, revoked keys, reports.

A board is told notes, proofs and revocations by anybody and believes only signatures. Of
each log it keeps some checkpoints; two of one size and different roots, or a larger one
that is shown not to contain a smaller, are proof of a fork. Whoever signed twice is frozen
for ever. Bounded: a note must be signed by a log of the network file, one proof is kept per
culprit, one revocation per peer, and what was refused is remembered instead of checked again.
Reports of exposures travel too (``exposures``): that they were made is all they prove.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from plait.envelope import digest
from plait.errors import RemoteProtocolError, VerificationError
from plait.identity import peer_id_of
from plait.ledger.certs import check_revocation
from plait.ledger.checkpoint import Checkpoint, open_checkpoint, parse_note
from plait.ledger.exposures import Exposures, Reported
from plait.ledger.fork import (
    FORK_BYTES_MAX,
    ForkProof,
    LogFork,
    check_fork_proof,
    grown_apart,
    read_fork_proof,
    write_fork_proof,
)
from plait.ledger.merkle import Tree, verify_consistency
from plait.network_file import Authority, NetworkFile
from plait.types import Digest, PeerId
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.log_pb2 import ExposureNotice

ItemT = TypeVar("ItemT")

CHECKPOINTS_PER_LOG_MAX = 8
UNRESOLVED_MAX = 16
CULPRITS_MAX = 256
REVOCATIONS_MAX = 4_096
REFUSED_MAX = 1_024
PROOFS_TOLD_MAX = 8
REVOCATIONS_TOLD_MAX = 100
EXPOSURES_TOLD_MAX = 8
TOLD_BYTES_MAX = 48_000
"""All that is told at a time, so that it passes a port that takes 64 KiB."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """Somebody signed twice: do no business with it any more."""

    culprit: PeerId
    statement: str


@dataclass(frozen=True, slots=True)
class Compare:
    """Two checkpoints of one log that nobody has compared yet, the smaller first.

    Ask for the larger tree and answer with ``NoticeBoard.compared``.
    """

    origin: str
    smaller: str
    larger: str


@dataclass(frozen=True, slots=True)
class Revoked:
    """A peer voided its certificates below a serial."""

    peer: PeerId
    serial_min: int


Action = Frozen | Compare | Revoked | Reported


@dataclass(frozen=True, slots=True)
class Told:
    """What one side tells the other."""

    checkpoints: tuple[str, ...] = ()
    fork_proofs: tuple[bytes, ...] = ()
    revocations: tuple[SignedEnvelope, ...] = ()
    exposures: tuple[ExposureNotice, ...] = ()


class NoticeBoard:
    """The notices that one party holds of one network. A log need not compare its ``own_log``."""

    def __init__(self, network: NetworkFile, own_log: str = "") -> None:
        self._own_log = own_log
        self._network = network
        self._logs: dict[str, Authority] = {one.log_origin: one for one in network.authorities}
        self._kept: dict[str, dict[int, tuple[Checkpoint, str]]] = {}
        self._consistent: OrderedDict[tuple[Digest, Digest], None] = OrderedDict()
        self._unresolved: OrderedDict[Compare, None] = OrderedDict()
        self._frozen: dict[PeerId, str] = {}
        self._proofs: dict[PeerId, bytes] = {}
        self._revocations: OrderedDict[PeerId, SignedEnvelope] = OrderedDict()
        self._serials: dict[PeerId, int] = {}
        self._refused: OrderedDict[Digest, None] = OrderedDict()
        self._round = 0
        self.exposures = Exposures(network.network_id)
        """Who was reported to be exposed, by whom."""

    @property
    def frozen(self) -> Mapping[PeerId, str]:
        """Who signed twice, and what."""
        return MappingProxyType(self._frozen)

    @property
    def revoked(self) -> Mapping[PeerId, int]:
        """The least serial that still counts of each peer that revoked any."""
        return MappingProxyType(self._serials)

    def trusted(self) -> tuple[Authority, ...]:
        """The authorities of the network file that have not been caught."""
        return tuple(one for one in self._network.authorities if one.peer not in self._frozen)

    def checkpoint_of(self, origin: str) -> str | None:
        """The largest checkpoint known of a log."""
        kept = self._kept.get(origin)
        return kept[max(kept)][1] if kept else None

    def unresolved(self) -> tuple[Compare, ...]:
        """The pairs that nobody has compared yet, or whose larger tree is withheld."""
        return tuple(self._unresolved)

    def proof_against(self, peer: PeerId) -> bytes | None:
        """The portable fork proof that froze a peer."""
        return self._proofs.get(peer)

    def handle(self, told: Told) -> list[Action]:
        """Take what somebody told. Nothing in it raises; what is false is forgotten."""
        actions: list[Action] = []
        for envelope in told.revocations[:REVOCATIONS_TOLD_MAX]:
            actions += self._quietly(envelope.SerializeToString(), self.handle_revocation, envelope)
        for data in told.fork_proofs[:PROOFS_TOLD_MAX]:
            actions += self._quietly(data, self.handle_fork_proof, data)
        for report in told.exposures[:EXPOSURES_TOLD_MAX]:
            actions += self._quietly(report.SerializeToString(), self.handle_exposure, report)
        for note in told.checkpoints[: CHECKPOINTS_PER_LOG_MAX * len(self._logs)]:
            actions += self._quietly(note.encode(errors="replace"), self.handle_checkpoint, note)
        return actions

    def handle_checkpoint(self, note: str) -> list[Action]:
        """Take a checkpoint; raises ``VerificationError`` if no log of the network signed it."""
        origin = parse_note(note)[0].partition("\n")[0]
        authority = self._logs.get(origin)
        if authority is None:
            return []
        new = open_checkpoint(note, origin, authority.log_key)
        kept = self._kept.setdefault(origin, {})
        known = kept.get(new.size)
        if known is not None:
            if known[0].root == new.root:
                if len(note) > len(known[1]):  # more witnesses have cosigned it
                    kept[new.size] = (new, note)
                return []
            return self.caught(LogFork(origin, (known[1], note)))
        kept[new.size] = (new, note)
        while len(kept) > CHECKPOINTS_PER_LOG_MAX:
            # The smallest stay comparable through what was found consistent with them.
            del kept[min(size for size in kept if size != new.size)]
        return self._to_compare(origin, new)

    def handle_fork_proof(self, data: bytes) -> list[Action]:
        """Take a proof; raises ``ValueError`` or ``VerificationError`` if it proves nothing."""
        return self.caught(read_fork_proof(data))

    def handle_revocation(self, envelope: SignedEnvelope) -> list[Action]:
        """Take a revocation; raises ``BadSignature`` or ``RemoteProtocolError``."""
        known = self._revocations.get(peer_id_of(envelope.signer[:32]))
        if known is not None and known.payload == envelope.payload:
            return []
        peer, serial_min = check_revocation(envelope, self._network.network_id)
        if serial_min <= self._serials.get(peer, 0):
            return []
        self._revocations.pop(peer, None)
        if len(self._revocations) >= REVOCATIONS_MAX:
            forgotten, _ = self._revocations.popitem(last=False)
            del self._serials[forgotten]
        self._revocations[peer], self._serials[peer] = envelope, serial_min
        return [Revoked(peer, serial_min)]

    def handle_exposure(self, notice: ExposureNotice) -> list[Action]:
        """Take a report; raises ``VerificationError`` or ``RemoteProtocolError`` if it is none."""
        reported = self.exposures.handle(notice)
        return [] if reported is None else [reported]

    def grown(self, question: Compare, hashes: tuple[bytes, ...]) -> None:
        """A consistency proof as the answer to ``Compare``: the usual case, a growing log.

        Raises ``VerificationError`` if it does not hold; that alone is no proof of a fork.
        """
        smaller, larger = self._pair(question)
        verify_consistency(smaller.size, larger.size, smaller.root, larger.root, hashes)
        self._unresolved.pop(question, None)
        self._remember(self._consistent, (smaller.root, larger.root))

    def compared(self, question: Compare, larger_tree: Tree) -> list[Action]:
        """The answer to ``Compare``: the larger tree, out of its tiles.

        Raises ``BadProof`` if it is not the tree of the larger checkpoint: then nothing is
        known, and whoever serves the log withholds it. Raises what reading the tree raises.
        """
        smaller, larger = self._pair(question)
        proof = grown_apart((question.smaller, question.larger), smaller, larger, larger_tree)
        self._unresolved.pop(question, None)
        if proof is None:
            self._remember(self._consistent, (smaller.root, larger.root))
            return []
        return self.caught(proof)

    def caught(self, proof: ForkProof) -> list[Action]:
        """Freeze whom a proof convicts; raises ``VerificationError`` if it convicts nobody."""
        verdict = check_fork_proof(proof, self._network)
        if verdict.culprit in self._frozen:
            return []
        if len(self._frozen) >= CULPRITS_MAX and not self._is_authority(verdict.culprit):
            return []
        self._frozen[verdict.culprit] = verdict.statement
        self._proofs[verdict.culprit] = write_fork_proof(proof)
        return [Frozen(verdict.culprit, verdict.statement)]

    def tell(self) -> Told:
        """What to pass on now: all checkpoints, and a part of the rest that changes by turns."""
        self._round += 1
        room = [TOLD_BYTES_MAX]
        ranked = sorted(self._proofs, key=lambda peer: not self._is_authority(peer))
        first = [self._proofs[peer] for peer in ranked if self._is_authority(peer)]
        others = [self._proofs[peer] for peer in ranked if not self._is_authority(peer)]
        proofs = _fitting([*first, *_turned(others, self._round)][:PROOFS_TOLD_MAX], len, room)
        notes = [note for origin in self._kept if (note := self.checkpoint_of(origin))]
        # Others may be shown the tree that is withheld from us.
        notes += [note for pair in self._unresolved for note in (pair.smaller, pair.larger)]
        notes = _fitting(list(dict.fromkeys(notes)), len, room)
        turned = _turned(list(self._revocations.values()), self._round * REVOCATIONS_TOLD_MAX)
        revocations = _fitting(turned[:REVOCATIONS_TOLD_MAX], SignedEnvelope.ByteSize, room)
        reports = _turned(self.exposures.notices(), self._round * EXPOSURES_TOLD_MAX)
        exposures = _fitting(reports[:EXPOSURES_TOLD_MAX], ExposureNotice.ByteSize, room)
        return Told(tuple(notes), tuple(proofs), tuple(revocations), tuple(exposures))

    def stored(self) -> Told:
        """All that must survive a restart."""
        return Told(
            tuple(note for kept in self._kept.values() for _, note in kept.values()),
            tuple(self._proofs.values()),
            tuple(self._revocations.values()),
            tuple(self.exposures.notices()),
        )

    def restore(self, stored: Told) -> None:
        """Take back what ``stored`` gave; it is checked again."""
        for start in range(0, len(stored.fork_proofs), PROOFS_TOLD_MAX):
            self.handle(Told(fork_proofs=stored.fork_proofs[start : start + PROOFS_TOLD_MAX]))
        for start in range(0, len(stored.revocations), REVOCATIONS_TOLD_MAX):
            page = stored.revocations[start : start + REVOCATIONS_TOLD_MAX]
            self.handle(Told(revocations=page))
        for report in stored.exposures:
            self.handle(Told(exposures=(report,)))
        for note in stored.checkpoints:
            self.handle(Told(checkpoints=(note,)))

    def _pair(self, question: Compare) -> tuple[Checkpoint, Checkpoint]:
        key = self._logs[question.origin].log_key
        return (
            open_checkpoint(question.smaller, question.origin, key),
            open_checkpoint(question.larger, question.origin, key),
        )

    def _to_compare(self, origin: str, new: Checkpoint) -> list[Action]:
        """One comparison with the nearest larger or, of a new largest, the nearest smaller."""
        kept = self._kept[origin]
        sizes = sorted(size for size in kept if size and size != new.size)
        above = [size for size in sizes if size > new.size]
        other = above[0] if above else (sizes[-1] if sizes else 0)
        if not other or not new.size or origin == self._own_log:
            return []
        low, high = sorted((new.size, other))
        if (kept[low][0].root, kept[high][0].root) in self._consistent:
            return []
        question = Compare(origin, kept[low][1], kept[high][1])
        self._remember(self._unresolved, question, UNRESOLVED_MAX)
        return [question]

    def _quietly(
        self, data: bytes, handler: Callable[[ItemT], list[Action]], item: ItemT
    ) -> list[Action]:
        key = digest(data)
        if len(data) > FORK_BYTES_MAX or key in self._refused:
            return []
        try:
            return handler(item)
        except (VerificationError, RemoteProtocolError, ValueError):
            self._remember(self._refused, key)
            return []

    def _is_authority(self, peer: PeerId) -> bool:
        return any(one.peer == peer for one in self._network.authorities)

    def _remember(
        self, memory: OrderedDict[ItemT, None], key: ItemT, count_max: int = REFUSED_MAX
    ) -> None:
        memory[key] = None
        if len(memory) > count_max:
            memory.popitem(last=False)


def _turned(items: list[ItemT], start: int) -> list[ItemT]:
    """The items from another one on each round, so that all get their turn."""
    start %= max(1, len(items))
    return items[start:] + items[:start]


def _fitting(items: list[ItemT], size: Callable[[ItemT], int], room: list[int]) -> list[ItemT]:
    """The first items that fit in the room, whose bytes they take."""
    taken = []
    for item in items:
        if size(item) <= room[0]:
            room[0] -= size(item)
            taken.append(item)
    return taken
