"""What must hold of the money and the log, checked from outside while a run goes on."""

from plait.ledger.balances import Balances, entry_from_payload
from plait.ledger.checkpoint import open_checkpoint
from plait.ledger.journal import Books
from plait.ledger.merkle import Tree, verify_consistency
from plait.network_file import NetworkFile
from plait.sim.engine import Violation
from plait.sim.ledger import MemoryDisk
from plait.types import Digest


class LogWatch:
    """Every acknowledged entry is in every later checkpoint, and the log only grows."""

    def __init__(self, network: NetworkFile) -> None:
        self._authority = network.authorities[0]
        self._network_id = network.network_id
        self._acknowledged: list[Digest] = []
        self._tree = Tree()
        """Our own tree of what was acknowledged."""
        self._last: tuple[int, Digest] | None = None

    def on_acknowledged(self, disk: MemoryDisk, size: int) -> None:
        """A client heard a yes when this many entries were on disk."""
        if size > len(disk.journal):
            raise Violation("log", f"{size} entries acknowledged, {len(disk.journal)} on disk")
        for entry in disk.journal[len(self._acknowledged) : size]:
            self._acknowledged.append(entry.leaf_hash)
            self._tree.append(entry.leaf_hash)

    def on_checkpoint(self, disk: MemoryDisk, note: str) -> None:
        """A checkpoint was shown."""
        seen = open_checkpoint(note, self._authority.log_origin, self._authority.log_key)
        if seen.size < len(self._acknowledged):
            raise Violation(
                "log", f"{len(self._acknowledged)} acknowledged, the checkpoint holds {seen.size}"
            )
        whole = Tree(entry.leaf_hash for entry in disk.journal)
        if whole.root(seen.size) != seen.root:
            raise Violation("log", "a checkpoint is not of what is on disk")
        if self._acknowledged and whole.root(len(self._acknowledged)) != self._tree.root():
            raise Violation("log", "an acknowledged entry is not where it was")
        if self._last is not None and self._last[0] and seen.size >= self._last[0]:
            proof = whole.consistency_proof(self._last[0], seen.size)
            verify_consistency(self._last[0], seen.size, self._last[1], seen.root, proof)
        if self._last is None or seen.size >= self._last[0]:
            self._last = (seen.size, seen.root)

    def check_books(self, disk: MemoryDisk, books: Books) -> None:
        """Debits equal credits, nobody is below the limit, the journal gives the balances."""
        audited = Balances(self._network_id)
        for stored in disk.journal:
            entry = entry_from_payload(stored.payload)
            if (reason := audited.violation(entry)) is not None:
                raise Violation("books", f"entry {entry.index}: {reason}")
            audited.post(entry)
        if sum(audited.all().values()) != 0:
            raise Violation("books", "debits and credits differ")
        if audited.size == books.balances.size and audited.all() != books.balances.all():
            raise Violation("books", "the journal gives other balances than the books")
