"""Claims about credit: reservation, grant, caps, journal entries and the log."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from plait.envelope import decode, digest
from plait.errors import BadProof, BadSignature, Overspend
from plait.ledger.balances import Entry, EntryKind, entry_from_payload, hold_account
from plait.ledger.blame import about
from plait.ledger.bundle import BundleParts
from plait.ledger.checkpoint import Checkpoint, open_checkpoint
from plait.ledger.cosignature import open_cosignatures
from plait.ledger.merkle import leaf_hash, verify_inclusion
from plait.ledger.report import Absent
from plait.ledger.reserve import caps_of, check_grant
from plait.network_file import Authority, NetworkFile
from plait.types import AccountId
from plait.v1.ledger_pb2 import BudgetReservation, SessionVoucher


def granting_authority(parts: BundleParts, network: NetworkFile) -> Authority:
    """The authority of the network file whose key is on the grant."""
    for authority in network.authorities:
        if authority.ledger_key == parts.grant.signer:
            return authority
    raise BadSignature("the grant is not signed by an authority of the network file")


def check_reservation(parts: BundleParts, network: NetworkFile, opened_ms: int) -> Authority:
    """A ledger authority set aside what the client reserved for this route."""
    authority = granting_authority(parts, network)
    check_grant(parts.grant, parts.reservation, authority, parts.terms, None, opened_ms)
    return authority


def check_caps(parts: BundleParts, voucher: SessionVoucher) -> None:
    """No stage is promised more than was reserved for it."""
    reservation = decode(parts.reservation.payload, BudgetReservation)
    caps = caps_of(reservation, parts.terms)
    for index, (promised, cap) in enumerate(zip(voucher.amounts, caps, strict=True)):
        if promised.microcredits > cap:
            raise Overspend(f"stage {index} is promised {promised.microcredits}, its cap is {cap}")


def check_journal(parts: BundleParts, voucher: SessionVoucher) -> None:
    """The ledger moved the reserved credit to the payees exactly as the voucher says."""
    if not parts.entries:
        raise Absent("the bundle has no journal entries")
    entries = [_entry(parts, index, payload) for index, payload in enumerate(parts.entries)]
    if any(a.index >= b.index for a, b in pairwise(entries)):
        raise BadProof("the entries are not in the order of the journal")
    reservation = decode(parts.reservation.payload, BudgetReservation)
    _check_reserve_entry(parts, entries, reservation.amount)
    held, paid = _replay(parts, entries)
    if held and entries[-1].kind == EntryKind.VOID:
        raise BadProof(f"{held} microcredits are left in a hold that was voided")
    _check_paid(parts, entries, voucher, paid)


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


def _check_reserve_entry(parts: BundleParts, entries: Sequence[Entry], amount: int) -> None:
    reserves = [entry for entry in entries if entry.kind == EntryKind.RESERVE]
    if len(reserves) != 1 or entries[0].kind != EntryKind.RESERVE:
        raise BadProof("the entries do not start with the one reservation")
    if reserves[0].cause != digest(parts.reservation.payload):
        raise BadProof("the reserve entry was caused by another reservation")
    if sum(line.credit for line in reserves[0].lines) != amount:
        raise BadProof(f"the reserve entry is not of the {amount} microcredits reserved")


def _replay(parts: BundleParts, entries: Sequence[Entry]) -> tuple[int, Counter[AccountId]]:
    """Apply the entries; returns what is left in the hold and what each payee was paid."""
    client = AccountId(parts.terms.client)
    hold = hold_account(parts.terms.session_id, parts.terms.epoch)
    held = 0
    paid: Counter[AccountId] = Counter()
    for entry in entries:
        source = client if entry.kind == EntryKind.RESERVE else hold
        if entry.kind == EntryKind.ISSUE:
            raise BadProof(f"entry {entry.index} issues credit")
        if any(line.account != source for line in entry.lines if line.debit):
            raise BadProof(f"entry {entry.index} takes credit from elsewhere")
        credited: Counter[AccountId] = Counter()
        for line in entry.lines:
            if line.credit:
                credited[line.account] += line.credit
        if source in credited:
            raise BadProof(f"entry {entry.index} moves credit in a circle")
        if entry.kind == EntryKind.SETTLE:
            paid += credited
        elif set(credited) != {hold if entry.kind == EntryKind.RESERVE else client}:
            raise BadProof(f"entry {entry.index} moves credit to elsewhere")
        total = sum(line.debit for line in entry.lines)
        held += total if entry.kind == EntryKind.RESERVE else -total
        if held < 0:
            raise Overspend(f"entry {entry.index} takes more than was reserved")
    return held, paid


def _check_paid(
    parts: BundleParts, entries: Sequence[Entry], voucher: SessionVoucher, paid: Counter[AccountId]
) -> None:
    promised = {AccountId(item.payee): item.microcredits for item in voucher.amounts}
    for payee, amount in paid.items():
        if amount > promised.get(payee, 0):
            raise Overspend(f"{payee} was paid {amount}, promised {promised.get(payee, 0)}")
    owed = [payee for payee, amount in promised.items() if paid[payee] < amount]
    if not owed:
        return
    final = digest(parts.voucher.payload)
    voided = any(entry.kind == EntryKind.VOID for entry in entries)
    if voided or any(entry.cause == final for entry in entries):
        raise BadProof(f"{owed[0]} was paid {paid[owed[0]]}, promised {promised[owed[0]]}")
    raise Absent("no entry settles the voucher yet")
