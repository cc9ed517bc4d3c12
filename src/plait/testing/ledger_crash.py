"""A short life of a ledger, run to be killed anywhere, and what must hold afterwards.

``python -m plait.testing.ledger_crash PATH`` runs ``live`` and prints one JSON line for
each acknowledgement; exit code 9 and a line on standard error when the ledger stops.
"""

import asyncio
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from plait.envelope import digest, seal
from plait.errors import LedgerError, VerificationError
from plait.ledger.balances import EQUITY
from plait.ledger.certs import make_key_cert
from plait.ledger.checkpoint import open_checkpoint
from plait.ledger.journal import Accepted, Command, Issue, Reserve, Settle
from plait.ledger.service.recorder import LogIdentity, Recorder
from plait.ledger.service.store import open_store
from plait.testing.accounting import NETWORK_ID, key_of
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    PayeeAmount,
    SessionVoucher,
    SettlementRequest,
)

NOW_MS = 1_700_000_000_000
IDENTITY = LogIdentity("plait.example/crash-log", key_of("crash log"))
CLIENT, PAYEE = key_of("crash client"), key_of("crash payee")
CLIENT_LEDGER, PAYEE_LEDGER = key_of("crash client ledger"), key_of("crash payee ledger")
CLIENT_CERT, PAYEE_CERT = (
    make_key_cert(peer, ledger.public, NETWORK_ID, NOW_MS, 3_600_000, 1)
    for peer, ledger in ((CLIENT, CLIENT_LEDGER), (PAYEE, PAYEE_LEDGER))
)

Step = tuple[Command, list[SignedEnvelope], SignedEnvelope | None]
"""What a recorder is given: the command, the objects behind it, its signer's certificate."""


@dataclass(slots=True)
class Acknowledged:
    """What a life has answered before it ended."""

    entries: int = 0
    checkpoints: list[str] = field(default_factory=list)


def issue(number: int) -> Step:
    """An order of 1,000 microcredits."""
    order = IssueOrder(
        network_id=NETWORK_ID,
        account=CLIENT.peer_id,
        amount=1_000,
        order_id=b"%d" % number,
        issued_ms=NOW_MS,
    )
    envelope = seal(key_of("issuer"), order)
    return Issue(order, digest(envelope.payload)), [envelope], None


def reserve(number: int) -> Step:
    """A reservation of 10 for a session."""
    reservation = BudgetReservation(
        network_id=NETWORK_ID,
        account=CLIENT.peer_id,
        sequence=number,
        session_id=number.to_bytes(16, "big"),
        amount=10,
        caps=[PayeeAmount(payee=PAYEE.peer_id, microcredits=8)],
        issued_ms=NOW_MS,
        expires_ms=NOW_MS + 60_000,
    )
    envelope = seal(CLIENT_LEDGER, reservation)
    return Reserve(reservation, digest(envelope.payload)), [envelope], CLIENT_CERT


def settle(number: int) -> Step:
    """A settlement of 5 with release: a SETTLE and a VOID in one transaction."""
    names = {"network_id": NETWORK_ID, "session_id": number.to_bytes(16, "big")}
    amounts = [PayeeAmount(payee=PAYEE.peer_id, microcredits=5)]
    voucher = SessionVoucher(**names, account=CLIENT.peer_id, amounts=amounts)  # type: ignore[arg-type]
    shown = seal(CLIENT_LEDGER, voucher)
    request = SettlementRequest(
        **names,  # type: ignore[arg-type]
        payee=PAYEE.peer_id,
        voucher_digest=digest(shown.payload),
        release=True,
        issued_ms=NOW_MS,
    )
    asked = seal(PAYEE_LEDGER, request)
    command = Settle(voucher, digest(shown.payload), request, digest(asked.payload))
    return command, [asked, shown], PAYEE_CERT


def steps(sessions: int) -> Iterator[Step]:
    """An order, then so many sessions."""
    yield issue(1)
    for number in range(1, sessions + 1):
        yield reserve(number)
        yield settle(number)


@contextmanager
def recording(path: Path, vfs: str | None = None) -> Iterator[Recorder]:
    """A recorder on a file; raises ``LedgerError`` as ``open_store`` and ``Recorder``."""
    store = open_store(path, NETWORK_ID, vfs=vfs)
    try:
        recorder = Recorder(store, NETWORK_ID, IDENTITY, lambda: NOW_MS)
    except BaseException:
        store.close()
        raise
    try:
        yield recorder
    finally:
        recorder.close()


async def live(
    path: Path, sessions: int, acknowledge: Callable[[int, str], None], vfs: str | None = None
) -> None:
    """Carry out all steps with a checkpoint after each; raises ``LedgerError`` if the disk fails.

    A step that an earlier life has carried out is only confirmed.
    """
    with recording(path, vfs) as recorder:
        for step in steps(sessions):
            outcome = await recorder.apply(*step)
            if not isinstance(outcome, Accepted):
                raise LedgerError(f"a lawful command is refused: {outcome}")
            acknowledge(recorder.committed_size, "")
            size, note = await recorder.checkpoint(covering=recorder.committed_size)
            acknowledge(size, note)


async def examine(path: Path, acknowledged: Acknowledged) -> list[str]:
    """What does not hold in the file that a life left behind; empty when all is well."""
    try:
        with recording(path) as recorder:
            return list(_violations(recorder, acknowledged))
    except LedgerError as error:
        return [f"it cannot be opened: {error}"]


def _violations(recorder: Recorder, acknowledged: Acknowledged) -> Iterator[str]:
    if recorder.committed_size < acknowledged.entries:
        yield f"{acknowledged.entries} acknowledged, {recorder.committed_size} are there"
    balances = recorder.books.balances.all()
    if sum(balances.values()) != 0:
        yield "debits and credits differ"
    if any(balance < 0 for account, balance in balances.items() if account != EQUITY):
        yield "an account is below zero"
    for note in acknowledged.checkpoints:
        try:
            published = open_checkpoint(note, IDENTITY.origin, IDENTITY.key.public)
        except VerificationError as error:
            yield f"a published checkpoint is not the log's: {error}"
            continue
        size = published.size
        if size > recorder.tree.size or recorder.tree.root(size) != published.root:
            yield f"the log contradicts the checkpoint it published at {size}"


# Killed from outside.

WRITE_CALLS = ("pwrite64", "write", "fdatasync", "fsync", "ftruncate", "rename", "unlink")
"""Every system call with which a ledger changes its folder."""

LIFE = (sys.executable, "-m", "plait.testing.ledger_crash")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a traced life ended."""

    code: int
    acknowledged: Acknowledged
    said: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """What killing at one kind of system call has shown."""

    call: str
    killed: int
    violations: tuple[str, ...]


def find_strace() -> str | None:
    """The tracer, if it is installed and may trace processes."""
    found = shutil.which("strace")
    if found and subprocess.run([found, "-qq", "-o", "/dev/null", "true"], check=False).returncode:
        return None
    return found


def traced_life(strace: str, path: Path, inject: str, sessions: int) -> Ended:
    """One life in a process of its own, under an injected fault (``strace -e inject``)."""
    files = [path, *(path.with_name(path.name + end) for end in ("-wal", ".head", ".part"))]
    only = [item for file in files for item in ("-P", str(file))]
    command = [strace, "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", *only, "-e", inject]
    done = subprocess.run(
        [*command, *LIFE, str(path), str(sessions)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    acknowledged = Acknowledged()
    for line in done.stdout.splitlines():
        acknowledged.entries, note = json.loads(line)
        if note:
            acknowledged.checkpoints.append(note)
    return Ended(done.returncode, acknowledged, done.stderr)


def kill_sweep(strace: str, folder: Path, call: str, sessions: int, step: int = 1) -> Sweep:
    """Kill one life after another at the call's 1st, (1 + step)th, … use until one survives.

    After each the file is examined, the life is lived to its end, and examined again.
    """
    violations: list[str] = []
    for number in itertools.count(1, step):
        path = folder / f"{call}-{number}" / "journal.db"
        path.parent.mkdir()
        inject = f"inject={call}:signal=SIGKILL:when={number}"
        ended = traced_life(strace, path, inject, sessions)
        if ended.code == 0:
            return Sweep(call, (number - 1) // step, tuple(violations))
        if ended.code not in (-9, 137):
            violations.append(f"{call} {number}: it ended with {ended.code}: {ended.said}")
        found = asyncio.run(examine(path, ended.acknowledged))
        asyncio.run(live(path, sessions, lambda size, note: None))
        found += asyncio.run(examine(path, Acknowledged(1 + 3 * sessions)))
        violations += [f"{call} {number}: {violation}" for violation in found]
    raise AssertionError("the count has no end")


def main() -> int:
    """One life in a process of its own."""

    def acknowledge(entries: int, note: str) -> None:
        print(json.dumps([entries, note]), flush=True)

    path, sessions = Path(sys.argv[1]), int(sys.argv[2])
    try:
        asyncio.run(live(path, sessions, acknowledge))
    except LedgerError as error:
        print(f"error: {error}\ntry: {error.remedy}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
