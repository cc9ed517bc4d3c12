"""A witness's disk, and the log that collects cosignatures before it shows a checkpoint."""

import asyncio
import contextlib
import fcntl
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from plait.durable import replace_durably
from plait.errors import LedgerError, NetworkError, ProtocolError, VerificationError
from plait.ledger.cosignature import open_cosignatures
from plait.ledger.service.recorder import Recorder
from plait.ledger.witness import CONFLICT, LogWitness, WitnessRefusal
from plait.logs import get_logger
from plait.network_file import Witness

log = get_logger(__name__)

COSIGNING_TIMEOUT_S = 1.0
STRAGGLERS_S = 0.05
"""How long the witnesses beyond the quorum are waited for."""
RETRY_S = 1.0
"""How often a quorum that was not met is asked for again."""

Publish = Callable[[int, str], Awaitable[None]]
"""Told size and note of a checkpoint before anybody else sees it."""


class WitnessFiles:
    """The latest cosigned checkpoint of each log, one file each; raises ``LedgerError``.

    After an error of the disk it is unknown what is durable, so that it refuses to go on
    until it is opened again. It cannot know that its folder was restored from a backup.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._failed = False
        with self._disk():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def latest(self, origin: str) -> str | None:
        """The signed note that was cosigned last."""
        with self._disk():
            return self._read(origin)

    def advance(self, origin: str, previous: str | None, note: str) -> bool:
        """Replace the note durably, unless another came first."""
        with self._disk(), (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._read(origin) != previous:
                return False
            replace_durably(self._path(origin), note)
            return True

    def _read(self, origin: str) -> str | None:
        try:
            return self._path(origin).read_bytes().decode()
        except FileNotFoundError:
            return None

    def _path(self, origin: str) -> Path:
        return self._folder / f"{hashlib.sha256(origin.encode()).hexdigest()}.note"

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        if self._failed:
            raise LedgerError("the witness's disk has failed before: start it again")
        try:
            yield
        except (OSError, UnicodeDecodeError) as error:
            self._failed = True
            raise LedgerError(f"the witness's disk failed: {error}") from error


class Cosigner(Protocol):
    """A way to a witness: in this process, or over some connection."""

    @property
    def name(self) -> str:
        """The witness's name in the network file."""

    async def add_checkpoint(
        self, old_size: int, proof: Sequence[bytes], note: str
    ) -> str | WitnessRefusal:
        """Ask for a cosignature; raises ``LedgerError`` or ``NetworkError``."""


class LocalCosigner:
    """A witness in this process; its disk is used from another thread."""

    def __init__(
        self, witness: LogWitness, clock_s: Callable[[], int] = lambda: int(time.time())
    ) -> None:
        self._witness = witness
        self._clock_s = clock_s

    @property
    def name(self) -> str:
        """The witness's name."""
        return self._witness.name

    async def add_checkpoint(
        self, old_size: int, proof: Sequence[bytes], note: str
    ) -> str | WitnessRefusal:
        """Ask the witness."""
        return await asyncio.to_thread(
            self._witness.add_checkpoint, old_size, proof, note, self._clock_s()
        )


class WitnessedLog:
    """The recorder's log, whose checkpoints carry what cosignatures could be had in time.

    A checkpoint short of the quorum is shown all the same (clients see that it is), and its
    cosignatures are asked for again the next time.
    """

    def __init__(
        self,
        recorder: Recorder,
        witnesses: Sequence[Witness] = (),
        quorum: int = 0,
        cosigners: Sequence[Cosigner] = (),
        *,
        timeout_s: float = COSIGNING_TIMEOUT_S,
        publish: Publish | None = None,
    ) -> None:
        self._recorder = recorder
        self._publish = publish
        self._witnesses = {witness.name: witness for witness in witnesses}
        self._quorum = quorum
        self._cosigners = [one for one in cosigners if one.name in self._witnesses]
        self._timeout_s = timeout_s
        self._sizes: dict[str, int] = {}
        self._collecting = asyncio.Lock()
        self._size, self._note, self._count = 0, "", 0
        self._asked_s = -RETRY_S

    @property
    def shown(self) -> tuple[int, str]:
        """Size and note of the last checkpoint that was shown to anybody."""
        return self._size, self._note

    async def checkpoint(self, covering: int = 0) -> tuple[int, str]:
        """A checkpoint of at least ``covering`` entries, cosigned: its size and note."""
        async with self._collecting:
            enough = self._note and self._count >= min(self._quorum, len(self._cosigners))
            rested = asyncio.get_running_loop().time() >= self._asked_s + RETRY_S
            if self._size < covering or not self._note or (not enough and rested):
                size, note = await self._recorder.checkpoint(covering)
                self._asked_s = asyncio.get_running_loop().time()
                lines = await self._collect(size, note)
                note += "".join(lines)
                if self._publish is not None:
                    await self._publish(size, note)
                self._size, self._note, self._count = size, note, len(lines)
            return self._size, self._note

    async def _collect(self, size: int, note: str) -> list[str]:
        """The signature lines of a quorum, and of those who are as quick."""
        async with asyncio.TaskGroup() as tasks:
            waiting = {
                tasks.create_task(self._ask(cosigner, size, note), name=f"cosign {cosigner.name}")
                for cosigner in self._cosigners
            }
            lines: list[str] = []
            while waiting:
                enough = self._quorum and len(lines) >= self._quorum
                done, waiting = await asyncio.wait(
                    waiting,
                    timeout=STRAGGLERS_S if enough else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                lines += [line for task in done if (line := task.result()) is not None]
                if enough and not done:
                    for task in waiting:
                        task.cancel()
                    break
        return sorted(lines)

    async def _ask(self, cosigner: Cosigner, size: int, note: str) -> str | None:
        """A valid signature line, or nothing: a witness cannot stop the log."""
        reason = ""
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._submit(cosigner, size, note)
            if isinstance(answer, str):
                if answer.count("\n") == 1 and open_cosignatures(
                    note + answer, [self._witnesses[cosigner.name]]
                ):
                    self._sizes[cosigner.name] = size
                    return answer
                reason = "its answer is no cosignature of its own"
            else:
                reason = f"{answer.status}: {answer.reason}"
        except (
            TimeoutError,
            LedgerError,
            NetworkError,
            ProtocolError,
            VerificationError,
        ) as error:
            reason = str(error) or "no answer in time"
        log.warning("a witness has not cosigned", witness=cosigner.name, reason=reason)
        return None

    async def _submit(self, cosigner: Cosigner, size: int, note: str) -> str | WitnessRefusal:
        old_size = min(self._sizes.get(cosigner.name, 0), size)
        answer = await cosigner.add_checkpoint(old_size, self._proof(old_size, size), note)
        if not isinstance(answer, WitnessRefusal) or answer.status != CONFLICT:
            return answer
        # It remembers another size than we do: after a restart we know of none.
        if answer.size is None or answer.fork is not None or not old_size != answer.size <= size:
            return answer
        proof = self._proof(answer.size, size)
        return await cosigner.add_checkpoint(answer.size, proof, note)

    def _proof(self, old_size: int, size: int) -> list[bytes]:
        if not 0 < old_size < size:
            return []
        return list(self._recorder.tree.consistency_proof(old_size, size))
