"""Claims about credit: reservation, grant, caps, journal entries and the log."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from plait.envelope import decode, digest
from plait.errors import BadProof, Overspend
from plait.ledger.balances import (
    Entry,
    EntryKind,
    entry_from_payload,
    escrow_account,
    escrow_of,
    hold_account,
)
from plait.ledger.blame import about
from plait.ledger.bundle import BundleParts, EpochParts
from plait.ledger.checkpoint import Checkpoint, open_checkpoint
from plait.ledger.committee import check_grants, granters
from plait.ledger.cosignature import open_cosignatures
from plait.ledger.merkle import leaf_hash, verify_inclusion
from plait.ledger.report import Absent
from plait.ledger.reserve import caps_of
from plait.ledger.verify_session import promised_in
from plait.network_file import Authority, NetworkFile
from plait.types import AccountId, Digest
from plait.v1.ledger_pb2 import BudgetReservation


def granting_authority(parts: BundleParts, network: NetworkFile) -> Authority:
    """The authority whose log the checkpoint is of, once a quorum of them has granted."""
    first = parts.epochs[0]
    if first.grant is None or first.reservation is None:
        raise BadProof("the first epoch has no reservation or no grant")
    granting = granters(first.grant, first.reservation, network.authorities)
    origin = (parts.checkpoint or "").partition("\n")[0]
    # The first 2f + 1 grants suffice, and any authority's log will do.
    return next((one for one in network.authorities if one.log_origin == origin), granting[0])


def check_reservations(
    parts: BundleParts, network: NetworkFile, opened_ms: Sequence[int]
) -> Authority:
    """The network's ledger set aside what the client reserved for the stages of each route."""
    authority = granting_authority(parts, network)
    everybody = network.authorities
    for epoch, at_ms in zip(parts.epochs, opened_ms, strict=True):
        if not any(map(epoch.terms.entered, range(len(epoch.terms.stages)))):
            if epoch.reservation is not None or epoch.grant is not None:
                raise BadProof(f"epoch {epoch.terms.epoch} reserves, but no stage enters")
            continue
        if epoch.reservation is None:
            raise BadProof(f"epoch {epoch.terms.epoch} has no reservation")
        if epoch.grant is None:
            raise Absent(f"the grant of epoch {epoch.terms.epoch} is not here")
        check_grants(epoch.grant, epoch.reservation, everybody, epoch.terms, None, at_ms)
    return authority


def check_caps(parts: BundleParts) -> None:
    """No stage is promised more than was reserved for it in its stint."""
    limits: dict[tuple[str, int], int] = {}
    for epoch in parts.epochs:
        if epoch.reservation is not None:
            caps = caps_of(decode(epoch.reservation.payload, BudgetReservation), epoch.terms)
            for stage, cap in zip(epoch.terms.stages, caps, strict=True):
                if cap is not None:
                    limits[stage.peer, stage.entered_epoch] = stage.carried + cap
        promised = promised_in(epoch)
        for index, stage in enumerate(epoch.terms.stages):
            limit = limits.get((stage.peer, stage.entered_epoch), 0)
            if promised.get(stage.peer, 0) > limit:
                raise Overspend(
                    f"stage {index} is promised {promised[stage.peer]}, its cap is {limit}"
                )


def check_journal(parts: BundleParts) -> None:
    """The ledger moved the reserved credit to the payees exactly as the vouchers say."""
    if not parts.entries:
        raise Absent("the bundle has no journal entries")
    entries = [_entry(parts, index, payload) for index, payload in enumerate(parts.entries)]
    if any(a.index >= b.index for a, b in pairwise(entries)):
        raise BadProof("the entries are not in the order of the journal")
    _check_reserve_entries(parts, entries)
    _check_paid(parts, entries, _replay(parts, entries))


def check_log(parts: BundleParts, authority: Authority) -> Checkpoint:
    """The authority's log contains every entry, under a checkpoint that it signed."""
    if parts.checkpoint is None:
        raise Absent("the bundle has no checkpoint")
    checkpoint = open_checkpoint(parts.checkpoint, authority.log_origin, authority.log_key)
    if len(parts.proofs) != len(parts.entries):
        raise BadProof(f"{len(parts.proofs)} proofs for {len(parts.entries)} entries")
    for number, (payload, proof) in enumerate(zip(parts.entries, parts.proofs, strict=True)):
        with about(f"entry {number}"):
            index, hashes = proof
            if entry_from_payload(payload).index != index:
                raise BadProof("its index is not that of its proof")
            verify_inclusion(leaf_hash(payload), index, checkpoint.size, hashes, checkpoint.root)
    return checkpoint


def check_witnesses(parts: BundleParts, network: NetworkFile, authority: Authority) -> int:
    """The network's quorum of witnesses cosigned the checkpoint; returns how many did."""
    if parts.checkpoint is None:
        raise Absent("the bundle has no checkpoint")
    open_checkpoint(parts.checkpoint, authority.log_origin, authority.log_key)
    count = len(open_cosignatures(parts.checkpoint, network.witnesses))
    if count < network.witness_quorum:
        raise Absent(
            f"{count} witnesses have cosigned the checkpoint, {network.witness_quorum} are needed"
        )
    return count


def _entry(parts: BundleParts, number: int, payload: bytes) -> Entry:
    with about(f"entry {number}"):
        entry = entry_from_payload(payload)
        if entry.network_id != parts.network_id or entry.session_id != parts.terms.session_id:
            raise BadProof("it is of another network or session")
        if any((line.debit == 0) == (line.credit == 0) for line in entry.lines):
            raise BadProof("a line is not either a debit or a credit")
        if sum(line.debit for line in entry.lines) != sum(line.credit for line in entry.lines):
            raise BadProof("its debits and credits differ")
        return entry


def _check_reserve_entries(parts: BundleParts, entries: Sequence[Entry]) -> None:
    """Each reservation was booked once, by its amount, into the hold of its epoch.

    An epoch that was reserved for and never begun is not in the bundle; its hold is in
    the journal all the same.
    """
    if entries[0].kind != EntryKind.RESERVE:
        raise BadProof("the entries do not start with a reservation")
    epochs = {_hold(epoch): epoch for epoch in parts.epochs}
    booked: set[AccountId] = set()
    for entry in entries:
        if entry.kind != EntryKind.RESERVE:
            continue
        hold, amount = _filled_hold(parts, entry)
        if hold in booked:
            raise BadProof("an epoch was reserved for twice")
        booked.add(hold)
        if hold in epochs:
            _check_reserve_entry(epochs[hold], entry, amount)
    for hold, epoch in epochs.items():
        if epoch.grant is not None and hold not in booked:
            number = epoch.terms.epoch
            raise BadProof(f"the reservation of epoch {number} was granted, but not booked")


def _check_reserve_entry(epoch: EpochParts, entry: Entry, amount: int) -> None:
    if epoch.reservation is None or entry.cause != digest(epoch.reservation.payload):
        raise BadProof("a reserve entry was caused by another reservation")
    reservation = decode(epoch.reservation.payload, BudgetReservation)
    if amount != reservation.amount:
        raise BadProof(f"a reserve entry is not of the {reservation.amount} microcredits reserved")
    if entry.sub_account != reservation.sub_account:
        raise BadProof("a reserve entry draws on another sub-account than was reserved on")


def _filled_hold(parts: BundleParts, entry: Entry) -> tuple[AccountId, int]:
    """The hold of the session that a reserve entry fills, and by how much."""
    credited = [(line.account, line.credit) for line in entry.lines if line.credit]
    prefix = hold_account(parts.terms.session_id, 0).removesuffix("0")
    if len(credited) != 1 or not credited[0][0].startswith(prefix):
        raise BadProof("a reserve entry does not fill one hold of the session")
    return credited[0]


def _replay(parts: BundleParts, entries: Sequence[Entry]) -> Counter[AccountId]:
    """Apply the entries to the session's holds; returns what each payee was paid."""
    client = AccountId(parts.terms.client)
    reserves = [entry for entry in entries if entry.kind == EntryKind.RESERVE]
    held = Counter({_filled_hold(parts, entry)[0]: 0 for entry in reserves})
    paid: Counter[AccountId] = Counter()
    aside: Counter[AccountId] = Counter()
    voided: set[AccountId] = set()
    for entry in entries:
        debited, credited = _sides(entry)
        match entry.kind:
            case EntryKind.RESERVE:
                wrong = set(debited) != {client} or not set(credited) <= set(held)
            case EntryKind.SETTLE:
                wrong = not set(debited) <= set(held) or bool({client, *held} & set(credited))
                paid += credited
            case EntryKind.VOID:
                wrong = not set(debited) <= set(held) or set(credited) != {client}
                voided |= set(debited)
            case EntryKind.ESCROW:
                aside += debited
                wrong = credited != _escrow_of(parts, debited) or any(
                    aside[one] > paid[one] for one in debited
                )
            case EntryKind.MATURE:
                wrong = debited != _escrow_of(parts, credited) or _beyond(credited, aside)
                aside -= credited
            case EntryKind.FORFEIT:
                back = Counter({AccountId(escrow_of(one) or ""): n for one, n in debited.items()})
                wrong = debited != _escrow_of(parts, back) or set(credited) != {client}
                wrong = wrong or _beyond(back, aside)
                aside -= back
            case _:
                raise BadProof(f"entry {entry.index} issues credit")
        if wrong:
            raise BadProof(f"entry {entry.index} takes credit from elsewhere, or moves it there")
        for account in held:
            held[account] += credited[account] - debited[account]
            if held[account] < 0:
                raise Overspend(f"entry {entry.index} takes more than was reserved")
    left = [account for account in voided if held[account]]
    if left:
        raise BadProof(f"{held[left[0]]} microcredits are left in a hold that was voided")
    return paid


def _beyond(amounts: Counter[AccountId], limits: Counter[AccountId]) -> bool:
    return any(amount > limits[account] for account, amount in amounts.items())


def _escrow_of(parts: BundleParts, amounts: Counter[AccountId]) -> Counter[AccountId]:
    """The same amounts on the payees' escrow accounts of the session."""
    session_id = parts.terms.session_id
    return Counter({escrow_account(session_id, payee): n for payee, n in amounts.items()})


def _sides(entry: Entry) -> tuple[Counter[AccountId], Counter[AccountId]]:
    debited: Counter[AccountId] = Counter()
    credited: Counter[AccountId] = Counter()
    for line in entry.lines:
        if line.debit:
            debited[line.account] += line.debit
        if line.credit:
            credited[line.account] += line.credit
    return debited, credited


def _check_paid(parts: BundleParts, entries: Sequence[Entry], paid: Counter[AccountId]) -> None:
    """Nobody was paid more than promised; less only if the voucher was never presented."""
    best: dict[AccountId, tuple[int, Digest]] = {}
    for epoch in parts.epochs:
        for payee, amount in promised_in(epoch).items():
            if epoch.voucher is not None and amount >= best.get(AccountId(payee), (0,))[0]:
                best[AccountId(payee)] = amount, digest(epoch.voucher.payload)
    for account, sum_paid in paid.items():
        promised = best[account][0] if account in best else 0
        if sum_paid > promised:
            raise Overspend(f"{account} was paid {sum_paid}, promised {promised}")
    waiting = ""
    causes = {Digest(entry.cause) for entry in entries}
    voided = {
        line.account
        for entry in entries
        if entry.kind == EntryKind.VOID
        for line in entry.lines
        if line.debit
    }
    for account, (promised, voucher) in best.items():
        if paid[account] == promised:
            continue
        what = f"{account} was paid {paid[account]}, promised {promised}"
        if voucher in causes or _holds_of(parts, account) <= voided:
            raise BadProof(what)
        waiting = waiting or what
    if waiting:
        # A stage that was lost presents its own last voucher when it is back, or never.
        raise Absent(f"{waiting}: no entry settles that voucher yet")


def _holds_of(parts: BundleParts, payee: AccountId) -> set[AccountId]:
    """The holds that set credit aside for a payee."""
    return {
        _hold(epoch)
        for epoch in parts.epochs
        if epoch.reservation is not None
        and any(
            cap.payee == payee for cap in decode(epoch.reservation.payload, BudgetReservation).caps
        )
    }


def _hold(epoch: EpochParts) -> AccountId:
    return hold_account(epoch.terms.session_id, epoch.terms.epoch)
