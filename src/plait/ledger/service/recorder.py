"""The ledger's keeper: applies commands to the books and makes them durable.

Books and tree change synchronously on the event loop; one thread commits what has
gathered meanwhile in a single transaction (group commit: the batch is what arrived while
the disk was busy). Every answer, also a refusal or a repetition, waits until everything
applied before it is on disk. When a commit fails the recorder stops for good.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from plait.envelope import decode, digest
from plait.errors import LedgerError, VerificationError
from plait.identity import SigningKey
from plait.ledger.balances import Entry, EntryKind, entry_from_payload
from plait.ledger.checkpoint import open_checkpoint, sign_checkpoint
from plait.ledger.escrow import NO_ESCROW, EscrowTerms
from plait.ledger.journal import (
    Accepted,
    Books,
    Cause,
    Command,
    Expire,
    Fork,
    Outcome,
    Release,
    Reserve,
)
from plait.ledger.merkle import Tree, leaf_hash
from plait.ledger.service.records import (
    Change,
    LedgerStore,
    StoredCert,
    StoredDelegation,
    StoredEntry,
    StoredFork,
    StoredRelease,
)
from plait.logs import get_logger
from plait.types import Digest, PeerId, SessionId
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation, IssueOrder, LimitOrder, SubAccountOrder

log = get_logger(__name__)

BATCH_MAX = 1_000
GATHER_S = 0.005
"""How long a busy writer lets a group gather; well below the 20 ms that anybody may wait for it."""
CHECKPOINT_INTERVAL_MIN_S = 0.05
"""At most so often when somebody waits for one."""


_WITHOUT_CAUSE = frozenset(
    {
        EntryKind.SETTLE,
        EntryKind.VOID,
        EntryKind.ESCROW,
        EntryKind.MATURE,
        EntryKind.FORFEIT,
    }
)
"""Kinds whose entry says all that the books need."""


@dataclass(frozen=True, slots=True)
class LogIdentity:
    """The log's name and the key that signs its checkpoints."""

    origin: str
    key: SigningKey


class Recorder:
    """Books, tree and disk of one authority. Use ``with`` around everything: it owns a thread.

    Construction rebuilds all state from the store; raises ``LedgerError`` if what is
    stored breaks a rule of the books or contradicts the last signed checkpoint.
    """

    def __init__(
        self,
        store: LedgerStore,
        network_id: str,
        identity: LogIdentity,
        clock_ms: Callable[[], int],
        escrow: EscrowTerms = NO_ESCROW,
    ) -> None:
        self.books = Books(network_id, escrow)
        self.tree = Tree()
        self.store = store
        self.clock_ms = clock_ms
        self.stopped = asyncio.Event()
        self._identity = identity
        self._signers: dict[Digest, bytes] = {}
        self._serials: dict[PeerId, tuple[int, int]] = {}
        """Of the newest certificate seen of a peer: its serial, and when it began."""
        self._rebuild()
        self._applied = self._committed = 0
        self._committed_size = self.tree.size
        self._checkpoint_size, self._checkpoint = self._stored_checkpoint()
        self._failure: LedgerError | None = None
        self._waiters: dict[int, asyncio.Future[None]] = {}
        self._queue: queue.SimpleQueue[Change | None] = queue.SimpleQueue()
        self._signing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._write, name="ledger-writer", daemon=True)
        self._thread.start()

    # What may be asked.

    @property
    def committed_size(self) -> int:
        """Entries on disk."""
        return self._committed_size

    @property
    def failure(self) -> LedgerError | None:
        """Why it has stopped for good, if it has."""
        return self._failure

    def signer_of(self, reservation: Digest) -> bytes:
        """The ledger key that signed a granted reservation."""
        return self._signers[reservation]

    def newest_cert(self, peer: PeerId) -> tuple[int, int] | None:
        """Of the newest certificate seen of a peer: its serial, and when it began."""
        return self._serials.get(peer)

    def signed_before(self, session_id: SessionId, key: bytes) -> bool:
        """Whether the key signed a reservation of this session that was granted."""
        holds = self.books.holds(session_id).values()
        return any(self._signers.get(hold.reservation) == key for hold in holds)

    async def durable(self) -> None:
        """Wait until everything applied so far is on disk; raises ``LedgerError`` if it failed."""
        if self._failure is not None:
            raise self._failure
        if self._committed == self._applied:
            return
        waiter = self._waiters.get(self._applied)
        if waiter is None:
            waiter = self._waiters[self._applied] = self._loop.create_future()
        await asyncio.shield(waiter)

    # What changes the books.

    async def apply(
        self,
        command: Command,
        objects: Iterable[SignedEnvelope] = (),
        cert: SignedEnvelope | None = None,
    ) -> Outcome:
        """Carry out a command and make its outcome durable. Raises ``LedgerError`` if stopped.

        ``objects`` are the envelopes behind the command, kept when it changes anything, and
        ``cert`` the checked certificate of who signed the first.
        """
        if self._failure is not None:
            raise self._failure
        outcome = self.books.apply(command, self.clock_ms())
        if isinstance(outcome, Accepted) and (outcome.entries or outcome.releases):
            self._enqueue(self._with_cert(self._acceptance(outcome, command, tuple(objects)), cert))
        elif isinstance(outcome, Fork):
            log.warning("fork", account=outcome.account)
            fork = StoredFork(outcome.account, outcome.first, outcome.second)
            self._enqueue(self._with_cert(Change(objects=tuple(objects), forks=(fork,)), cert))
        await self.durable()
        return outcome

    async def expire(self, now_ms: int) -> None:
        """Void the holds whose grace time ended before ``now_ms`` and the recorder's clock."""
        if self._failure is not None:
            raise self._failure
        outcome = self.books.apply(Expire(), min(now_ms, self.clock_ms()))
        if isinstance(outcome, Accepted) and outcome.entries:
            self._enqueue(Change(entries=self._append(outcome.entries)))
        await self.durable()

    async def checkpoint(self, covering: int = 0) -> tuple[int, str]:
        """A signed checkpoint of at least ``covering`` entries: its size and note.

        Signs a new one only if the last covers less. A checkpoint is on disk before
        anybody sees it, and never covers an entry that is not.
        """
        async with self._signing:
            if self._checkpoint_size < covering or not self._checkpoint:
                await asyncio.sleep(CHECKPOINT_INTERVAL_MIN_S if self._checkpoint else 0)
                await self.durable()
                size = self._committed_size
                root = self.tree.root(size)
                note = sign_checkpoint(self._identity.key, self._identity.origin, size, root)
                self._enqueue(Change(checkpoint=(size, note)))
                await self.durable()
                self._checkpoint_size, self._checkpoint = size, note
            return self._checkpoint_size, self._checkpoint

    def close(self) -> None:
        """Write what is queued, stop the thread and close the store."""
        self._queue.put(None)
        self._thread.join()
        self.store.close()

    # The writer.

    def _enqueue(self, change: Change) -> None:
        self._applied += 1
        self._queue.put(change)

    def _write(self) -> None:
        """The writer thread: commit what has gathered, until told to stop or the disk fails."""
        running, busy = True, False
        while running:
            batch = [self._queue.get()]
            if busy:  # who comes now is not alone
                time.sleep(GATHER_S)
            while len(batch) < BATCH_MAX and not self._queue.empty():
                batch.append(self._queue.get())
            changes = [change for change in batch if change is not None]
            running, busy = len(changes) == len(batch), len(changes) > 1
            try:
                if changes:
                    self.store.commit(changes)
            except LedgerError as error:
                self._call(partial(self._fail, error))
                return
            self._call(partial(self._finish, changes))

    def _call(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed: nobody waits then
            self._loop.call_soon_threadsafe(callback)

    def _finish(self, changes: list[Change]) -> None:
        self._committed += len(changes)
        for change in changes:
            if change.entries:
                self._committed_size = change.entries[-1].index + 1
        for ticket in [ticket for ticket in self._waiters if ticket <= self._committed]:
            waiter = self._waiters.pop(ticket)
            if not waiter.done():
                waiter.set_result(None)

    def _fail(self, error: LedgerError) -> None:
        log.error("the ledger has stopped", reason=str(error))
        self._failure = error
        self.stopped.set()
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(error)
        self._waiters.clear()

    # State.

    def _acceptance(
        self, outcome: Accepted, command: Command, objects: tuple[SignedEnvelope, ...]
    ) -> Change:
        if isinstance(command, Reserve):
            self._signers[command.digest] = objects[0].signer
        request = digest(objects[0].payload)
        releases = tuple(
            StoredRelease(release.session_id, release.epoch, release.payee, request)
            for release in outcome.releases
        )
        entries = self._append(outcome.entries)
        return Change(entries=entries, objects=objects, releases=releases)

    def _with_cert(self, change: Change, cert: SignedEnvelope | None) -> Change:
        """The change with the certificate behind it, so that an auditor finds it.

        One that is stored and still valid is not stored again.
        """
        if cert is None:
            return change
        opened = decode(cert.payload, NodeKeyCert)
        peer, key = PeerId(opened.peer_id), opened.ledger_key
        newer = opened.serial > self._serials.get(peer, (-1, 0))[0]
        if not newer and self._delegated.get((peer, key), 0) > self.clock_ms():
            return change
        self._delegated[peer, key] = opened.expires_ms
        certs = (StoredCert(peer, opened.serial, cert.SerializeToString()),) if newer else ()
        if newer:
            self._serials[peer] = opened.serial, opened.not_before_ms
        return replace(
            change,
            objects=(*change.objects, cert),
            certs=certs,
            delegations=(StoredDelegation(peer, key, opened.expires_ms, digest(cert.payload)),),
        )

    def _append(self, entries: Iterable[Entry]) -> tuple[StoredEntry, ...]:
        stored = []
        for entry in entries:
            payload = entry.payload
            hashed = leaf_hash(payload)
            self.tree.append(hashed)
            stored.append(StoredEntry(entry.index, payload, hashed))
        return tuple(stored)

    def _rebuild(self) -> None:
        self._delegated: dict[tuple[PeerId, bytes], int] = {}
        for stored in self.store.entries():
            if leaf_hash(stored.payload) != stored.leaf_hash:
                raise LedgerError(f"entry {stored.index} of the ledger's file is damaged")
            entry = entry_from_payload(stored.payload)
            self.books.post(entry, self._cause(entry))
            self.tree.append(stored.leaf_hash)
        for release in self.store.releases():
            self.books.mark_released(Release(release.session_id, release.epoch, release.payee))
        for fork in self.store.forks():
            self.books.freeze(fork.account)
        for cert in self.store.certs():
            opened = decode(SignedEnvelope.FromString(cert.envelope).payload, NodeKeyCert)
            self._serials[cert.peer] = cert.serial, opened.not_before_ms

    def _cause(self, entry: Entry) -> Cause:
        if entry.kind in _WITHOUT_CAUSE:
            return None
        envelope = self.store.object(entry.cause)
        if envelope is None or digest(envelope.payload) != entry.cause:
            raise LedgerError(f"the object behind entry {entry.index} is missing or damaged")
        if entry.kind is EntryKind.ISSUE:
            return decode(envelope.payload, IssueOrder)
        if entry.kind is EntryKind.LIMIT:
            return decode(envelope.payload, LimitOrder)
        if entry.kind is EntryKind.SUB_ACCOUNT:
            return decode(envelope.payload, SubAccountOrder)
        self._signers[Digest(entry.cause)] = envelope.signer
        return decode(envelope.payload, BudgetReservation)

    def _stored_checkpoint(self) -> tuple[int, str]:
        stored = self.store.checkpoint()
        if stored is None:
            return 0, ""
        size, note = stored
        try:
            opened = open_checkpoint(note, self._identity.origin, self._identity.key.public)
        except VerificationError as error:
            raise LedgerError(f"the ledger's last checkpoint is not its own: {error}") from error
        if opened.size != size or size > self.tree.size or self.tree.root(size) != opened.root:
            raise LedgerError("the ledger's file contradicts the last checkpoint it signed")
        return size, note
