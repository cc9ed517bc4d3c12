"""The 28 attacks on money, encodings and log: in miniature here, 10^6 in benchmarks."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plait import identity
from plait.errors import BadSignature, LedgerError
from plait.ledger import journal, witness
from plait.ledger.balances import Balances, EntryKind
from plait.ledger.escrow import Escrows
from plait.ledger.journal import Accepted, Books, Hold
from plait.ledger.sub_accounts import SubAccounts
from plait.testing import ledger_attacks_log
from plait.testing.ledger_attacks import play
from plait.testing.ledger_attacks_log import LogWorld
from plait.types import U64_MAX

ROOT = Path(__file__).parents[2]


def test_all_twenty_eight_are_there() -> None:
    numbers = sorted({name[7:9] for name in dir(LogWorld) if name.startswith("attack_")})
    assert numbers == [f"{number:02}" for number in range(1, 29)]


def test_every_test_that_the_table_names_is_there() -> None:
    document = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)(?:::(\w+))?`", document)
    assert len(named) > 20
    for file, function in named:
        [path] = (ROOT / "tests").rglob(f"{file}.py")
        assert not function or f"def {function}(" in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_nothing_gets_through(seed: int) -> None:
    world = play(LogWorld(seed), 500)
    assert {entry.kind for entry in world.entries} == set(EntryKind)


def unchecked(public_key: bytes, signature: bytes, message: bytes) -> None:
    """OpenSSL alone, without our stricter rules."""
    if not identity.openssl_matches(public_key, signature, message):
        raise BadSignature("the signature does not verify")


BUGS: list[tuple[Any, str, Callable[..., Any]]] = [
    (Books, "_pay", lambda self, entry: None),
    (Hold, "room", lambda self, payee: 10**6),
    (journal, "may_release", lambda hold, request: False),
    (Balances, "limit", lambda self, account: U64_MAX),
    (Books, "_expire", lambda self, now_ms: Accepted((), (), 0)),
    (Books, "freeze", lambda self, account: None),
    (Escrows, "forfeited", lambda self, session_id, payee: None),
    (Escrows, "_expose", lambda self, payee, exposure: None),
    (Escrows, "set_aside", lambda self, payment, paid: ()),
    (SubAccounts, "refusal", lambda self, *asked: None),
    (SubAccounts, "use", lambda self, *taken: None),
    (identity, "_verify_remembered", unchecked),
    (witness, "_refusal", lambda *asked: None),
    (ledger_attacks_log, "verify_inclusion", lambda *proven: None),
]


@pytest.mark.parametrize(("owner", "name", "bug"), BUGS, ids=[name for _, name, _ in BUGS])
def test_planted_bugs_are_caught(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, bug: Callable[..., Any]
) -> None:
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises((AssertionError, LedgerError)):
        for seed in range(5):
            play(LogWorld(seed), 400)
