"""The ledger's disk and recorder under virtual time.

The recorder's rules, the books and the tree are the real ones. Only what they wait for is
ours: their coroutines are driven here, without an event loop, and a commit takes virtual
time and may fail.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from typing import Any

from plait.envelope import digest
from plait.errors import LedgerError, PlaitError
from plait.ledger.balances import Entry
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.journal import Books, Cause
from plait.ledger.merkle import Tree
from plait.ledger.service.recorder import LogIdentity, Recorder
from plait.ledger.service.store import (
    Change,
    Store,
    StoredCert,
    StoredEntry,
    StoredFork,
    StoredRelease,
)
from plait.sim.engine import MS
from plait.sim.host import Host
from plait.types import Digest
from plait.v1.identity_pb2 import SignedEnvelope

COMMIT_US = (300, 6 * MS)


class Wait:
    """Something a driven coroutine awaits: it goes on when ``finish`` is called."""

    def __init__(self) -> None:
        self.result: object = None
        self.finished = False
        self.resume: Callable[[], None] | None = None

    def finish(self, result: object = None) -> None:
        """Go on with a value, or with an exception to be raised."""
        self.result, self.finished = result, True
        if self.resume is not None:
            self.resume()

    def __await__(self) -> Generator["Wait", None, object]:
        if not self.finished:
            yield self
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def drive(coroutine: Coroutine[Any, Any, object], done: Callable[[object], None]) -> None:
    """Run a coroutine that awaits only ``Wait``s; ``done`` gets its result or its error."""
    try:
        awaited = coroutine.send(None)
    except StopIteration as stop:
        done(stop.value)
    except PlaitError as error:
        done(error)
    else:
        awaited.resume = lambda: drive(coroutine, done)


class MemoryDisk(Store):
    """A ledger's file in memory: what is here survives a crash."""

    def __init__(self) -> None:
        self.journal: list[StoredEntry] = []
        self.fault = ""
        """What the next commit fails with, if anything."""
        self.torn = False
        """Whether a failing commit has reached the disk all the same."""
        self._failed = False
        self._objects: dict[bytes, SignedEnvelope] = {}
        self._releases: dict[tuple[bytes, int, str], StoredRelease] = {}
        self._forks: list[StoredFork] = []
        self._certs: dict[str, StoredCert] = {}
        self._signed: tuple[int, str] | None = None

    def reopen(self) -> None:
        """Start anew after a failure."""
        self._failed, self.fault = False, ""

    def commit(self, changes: Sequence[Change]) -> None:
        """Keep changes; raises ``LedgerError`` on a fault, and from then on."""
        if self._failed:
            raise LedgerError("the ledger's store has failed before and must be opened again")
        if self.fault and not self.torn:
            self._failed = True
            raise LedgerError(f"the ledger's disk failed: {self.fault}")
        for change in changes:
            self._keep(change)
        if self.fault:
            self._failed = True
            raise LedgerError(f"the ledger's disk failed: {self.fault}")

    def entries(self, first: int = 0, limit: int = -1) -> Iterator[StoredEntry]:
        """Committed entries."""
        end = len(self.journal) if limit < 0 else first + limit
        return iter(self.journal[first:end])

    def object(self, object_digest: bytes) -> SignedEnvelope | None:
        """A committed object."""
        return self._objects.get(object_digest)

    def releases(self) -> list[StoredRelease]:
        """All releases."""
        return list(self._releases.values())

    def forks(self) -> list[StoredFork]:
        """All double signatures."""
        return list(self._forks)

    def certs(self) -> list[StoredCert]:
        """The newest certificates."""
        return list(self._certs.values())

    def checkpoint(self) -> tuple[int, str] | None:
        """The last signed checkpoint."""
        return self._signed

    def close(self) -> None:
        """Nothing to close."""

    def _keep(self, change: Change) -> None:
        self.journal += change.entries
        for item in change.objects:
            self._objects.setdefault(digest(item.payload), item)
        for release in change.releases:
            key = (release.session_id, release.epoch, release.payee)
            self._releases.setdefault(key, release)
        self._forks += change.forks
        self._certs.update({cert.peer: cert for cert in change.certs})
        if change.checkpoint is not None:
            self._signed = max(self._signed or (0, ""), change.checkpoint)


class VirtualRecorder(Recorder):
    """The recorder's rules; its writer is a timer of the host instead of a thread."""

    def __init__(
        self,
        host: Host,
        disk: MemoryDisk,
        network_id: str,
        identity: LogIdentity,
        on_signed: Callable[[str], None],
    ) -> None:
        self.books = Books(network_id)
        self.tree = Tree()
        self.store = disk
        self.clock_ms = host.now_ms
        self.stopped = asyncio.Event()
        self._host = host
        self._on_signed = on_signed
        self._identity = identity
        self._signers: dict[Digest, bytes] = {}
        self._serials = {}
        self._rebuild()
        self._applied = self._committed = 0
        self._committed_size = self.tree.size
        self._checkpoint_size, self._checkpoint = self._stored_checkpoint()
        self._failure: LedgerError | None = None
        self._pending: list[Change] = []
        self._waits: list[tuple[int, Wait]] = []
        self._writing = False

    @property
    def failed(self) -> bool:
        """Whether the disk failed: only a restart helps."""
        return self._failure is not None

    def cause_of(self, entry: Entry) -> Cause:
        """The order or reservation behind an entry."""
        return self._cause(entry)

    async def durable(self) -> None:
        """Wait for the commit of everything applied so far."""
        if self._failure is not None:
            raise self._failure
        if self._committed < self._applied:
            wait = Wait()
            self._waits.append((self._applied, wait))
            await wait

    async def checkpoint(self, covering: int = 0) -> tuple[int, str]:
        """As the recorder's, without its pause between two checkpoints."""
        if self._checkpoint_size < covering or not self._checkpoint:
            await self.durable()
            size = self._committed_size
            note = self._signed_head(size)
            self._enqueue(Change(checkpoint=(size, note)))
            await self.durable()
            if size >= self._checkpoint_size:
                self._checkpoint_size, self._checkpoint = size, note
        return self._checkpoint_size, self._checkpoint

    def _signed_head(self, size: int) -> str:
        root = self.tree.root(size)
        note = sign_checkpoint(self._identity.key, self._identity.origin, size, root)
        self._on_signed(note)
        return note

    def _enqueue(self, change: Change) -> None:
        self._applied += 1
        self._pending.append(change)
        if not self._writing:
            self._writing = True
            self._host.after(self._commit_us(), "", self._write_batch)

    def _commit_us(self) -> int:
        return self._host.engine.random.randrange(*COMMIT_US)

    def _write_batch(self) -> None:
        batch, self._pending = self._pending, []
        try:
            self.store.commit(batch)
        except LedgerError as error:
            self._host.engine.note(f"{self._host.name}: stopped: {error}")
            self._failure = error
            waits, self._waits = self._waits, []
            for _, wait in waits:
                wait.finish(error)
            return
        # A crash in between loses the answers, not the entries.
        self._host.after(self._commit_us(), "", lambda: self._finish(batch))

    def _finish(self, changes: list[Change]) -> None:
        self._writing = False
        self._committed += len(changes)
        for change in changes:
            if change.entries:
                self._committed_size = change.entries[-1].index + 1
        ready = [wait for ticket, wait in self._waits if ticket <= self._committed]
        self._waits = [pair for pair in self._waits if pair[0] > self._committed]
        if self._pending:
            self._writing = True
            self._host.after(self._commit_us(), "", self._write_batch)
        for wait in ready:
            wait.finish()
