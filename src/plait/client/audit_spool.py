"""Audits that a client owes: bundles waiting on disk, and what became of them.

Every finished session is kept until the ledger has paid it and the lottery can be held; a
process that ends before leaves it to the next one of the same account. Bounded in files and
bytes: the oldest are given up, which only means that nobody looks at them.
"""

import asyncio
import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from plait.errors import ConfigError
from plait.logs import get_logger
from plait.types import PeerId

log = get_logger(__name__)

DUE_FILES_MAX = 256
DUE_BYTES_MAX = 256 << 20
EVIDENCE_FILES_MAX = 256
RECORDS_MAX = 20_000
TRUST_AFTER_MS = 900_000
"""An audit counts for its peer once the audit window has passed and it stands unrefuted."""
_ABANDONED_MS = 600_000


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One lot that an auditor looked at; ``evidence`` is its file, kept unless consistent."""

    at_ms: int
    session: str
    epoch: int
    chunk: int
    stage: int
    peer: str
    outcome: str
    auditor: str
    reason: str = ""
    evidence: str = ""


def trust_of(records: Iterable[AuditRecord], now_ms: int) -> Mapping[PeerId, int]:
    """Audited chunks that each peer passed, counted after the audit window only.

    Whoever was exposed once, by anybody, has none: trust takes long to earn, and a cheat
    does not earn it back faster than it spends it.
    """
    found = list(records)
    exposed = {one.peer for one in found if one.outcome == "exposed"}
    lots = {
        (one.session, one.epoch, one.chunk, one.stage, one.peer)
        for one in found
        if one.outcome == "consistent" and one.at_ms + TRUST_AFTER_MS <= now_ms
    }
    counts = Counter(PeerId(peer) for *_, peer in lots if peer not in exposed)
    return dict(counts)


class AuditSpool:
    """The folder of one account's audits; several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._due = folder / "due"
        self._evidence = folder / "evidence"
        self._records = folder / "records.jsonl"

    def put(self, session: bytes, bundle: bytes, now_ms: int) -> None:
        """Keep a session's bundle until it is audited; never raises for a full disk."""
        with _quietly("a session cannot be kept for audits"):
            self._due.mkdir(parents=True, mode=0o700, exist_ok=True)
            part = self._due / f"{session.hex()}.part"
            _write_privately(part, bundle)
            part.replace(self._due / f"{now_ms:015d}-{now_ms}-{session.hex()}.bundle")
            self._bound(self._due, DUE_FILES_MAX, DUE_BYTES_MAX)

    def take(self, now_ms: int, due_ms: int = 0) -> tuple[Path, int, bytes] | None:
        """Claim the bundle that has been due for ``due_ms`` or longest: file, since when, bytes.

        Nobody else takes it before ``done`` or ``give_back``, or ten minutes have passed.
        """
        with _quietly("the audits that are due cannot be read"):
            self._return_abandoned(now_ms)
            for path in sorted(self._due.glob("*.bundle")):
                look_ms, kept_ms = map(int, path.name.split("-")[:2])
                if look_ms + due_ms > now_ms:
                    return None
                claimed = path.with_suffix(".taken")
                try:
                    path.rename(claimed)
                    os.utime(claimed, ns=(now_ms * 10**6, now_ms * 10**6))
                    return claimed, kept_ms, claimed.read_bytes()
                except FileNotFoundError:
                    continue  # another process was faster
        return None

    def give_back(self, claimed: Path, look_ms: int) -> None:
        """Let a bundle be taken again from ``look_ms`` on."""
        rest = claimed.stem.partition("-")[2]
        with _quietly("a bundle cannot be given back"):
            claimed.rename(claimed.with_name(f"{look_ms:015d}-{rest}.bundle"))

    def done(self, claimed: Path) -> None:
        """Forget a bundle."""
        claimed.unlink(missing_ok=True)

    def keep_evidence(self, name: str, data: bytes) -> str:
        """Keep evidence that somebody may judge again; returns its path, empty if it is not."""
        path = self._evidence / f"{name}.audit"
        with _quietly("evidence cannot be kept"):
            self._evidence.mkdir(parents=True, mode=0o700, exist_ok=True)
            _write_privately(path, data)
            self._bound(self._evidence, EVIDENCE_FILES_MAX, DUE_BYTES_MAX)
            return str(path)
        return ""

    def record(self, records: Sequence[AuditRecord]) -> None:
        """Add what was found."""
        if not records:
            return
        with _quietly("audit records cannot be kept"):
            self._records.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            with self._records.open("a") as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in records)

    def records(self) -> tuple[AuditRecord, ...]:
        """The newest records, oldest first; raises ``ConfigError`` for a damaged file."""
        try:
            lines = self._records.read_text().splitlines()[-RECORDS_MAX:]
            return tuple(AuditRecord(**json.loads(line)) for line in lines)
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self._records} is damaged: {error}") from error

    def _return_abandoned(self, now_ms: int) -> None:
        for path in self._due.glob("*.taken"):
            with contextlib.suppress(FileNotFoundError):  # another process is done with it
                if path.stat().st_mtime_ns // 10**6 + _ABANDONED_MS <= now_ms:
                    path.rename(path.with_suffix(".bundle"))

    @staticmethod
    def _bound(folder: Path, files_max: int, bytes_max: int) -> None:
        kept: list[tuple[int, int, Path]] = []
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process is done with it
                found = path.stat()
                kept.append((found.st_mtime_ns, found.st_size, path))
        kept.sort(reverse=True)
        while kept and (len(kept) > files_max or sum(size for _, size, _ in kept) > bytes_max):
            kept.pop()[2].unlink(missing_ok=True)


class BackgroundSpool:
    """Puts bundles into a spool from a thread of its own: no answer waits for it.

    Beyond ``PENDING_MAX`` that wait, a session is not kept, which nobody can foresee.
    """

    PENDING_MAX = 256

    def __init__(self, spool: AuditSpool) -> None:
        self._spool = spool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit spool")
        self._pending = threading.BoundedSemaphore(self.PENDING_MAX)

    def put(self, session: bytes, bundle: Callable[[], bytes], now_ms: int) -> None:
        """Keep what ``bundle`` makes; returns at once."""
        if not self._pending.acquire(blocking=False):
            log.warning("a session is not kept for audits", reason="too many wait")
            return
        self._thread.submit(self._put, session, bundle, now_ms)

    async def close(self) -> None:
        """Wait until all that was put is kept."""
        await asyncio.to_thread(self._thread.shutdown)

    def _put(self, session: bytes, bundle: Callable[[], bytes], now_ms: int) -> None:
        try:
            self._spool.put(session, bundle(), now_ms)
        except Exception as error:
            log.exception("a session is not kept for audits", reason=str(error))
        finally:
            self._pending.release()


def _write_privately(path: Path, data: bytes) -> None:
    """Bundles hold prompts: nobody else reads them, wherever the folder is copied to."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def _quietly(what: str) -> Iterator[None]:
    """Audits are no reason to fail an answer."""
    try:
        yield
    except OSError as error:
        log.warning(what, reason=str(error))
