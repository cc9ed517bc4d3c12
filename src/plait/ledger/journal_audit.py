"""An outsider's check of a whole journal: recompute everything, trust only the log key."""

from collections.abc import Iterable
from dataclasses import dataclass

from plait.errors import PlaitError
from plait.ledger.balances import Balances, entry_from_payload
from plait.ledger.checkpoint import Checkpoint
from plait.ledger.merkle import leaf_hash, root_of
from plait.types import Digest


@dataclass(frozen=True, slots=True)
class JournalReport:
    """What the audit of a journal found; ``violations`` is empty when all is well.

    ``balanced``: every entry keeps the books' rules and all balances sum to zero.
    ``tree_size`` and ``root_hash`` are what the journal gives for the signed checkpoint's
    size.
    """

    balanced: bool
    entries: int
    tree_size: int
    root_hash: Digest
    violations: tuple[str, ...]


def audit_journal(
    network_id: str, payloads: Iterable[bytes], checkpoint: Checkpoint
) -> JournalReport:
    """Recompute balances and root from the journal's leaves, in order from the first.

    ``checkpoint`` is verified already; entries beyond it are newer and checked too.
    """
    balances, hashes, violations = Balances(network_id), list[Digest](), list[str]()
    for payload in payloads:
        hashes.append(leaf_hash(payload))
        if violations:
            continue  # what follows a false entry can only be false as well
        try:
            balances.post(entry_from_payload(payload))
        except PlaitError as error:
            violations.append(str(error))
    balanced = not violations and sum(balances.all().values()) == 0
    root = root_of(hashes[: checkpoint.size])
    if len(hashes) < checkpoint.size:
        violations.append(
            f"the checkpoint covers {checkpoint.size} entries, the journal has {len(hashes)}"
        )
    elif root != checkpoint.root:
        violations.append("the journal's root is not the one that the checkpoint signs")
    return JournalReport(
        balanced, len(hashes), min(len(hashes), checkpoint.size), root, tuple(violations)
    )
