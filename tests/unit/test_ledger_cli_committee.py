"""``plait ledger`` and ``plait audit file`` against a committee, of which some may be away."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.cli import ledger_connection
from plait.cli.root import invoke
from plait.envelope import digest, seal
from plait.errors import PeerUnreachable
from plait.identity import SigningKey, load_key, save_key
from plait.ledger.bundle import build_bundle
from plait.ledger.certs import make_key_cert
from plait.ledger.cosignature import cosign
from plait.ledger.exposure import sign_judgement
from plait.ledger.service.polling import Poll, ask_all
from plait.ledger.service.serving import AuthorityKeys, serve_authority
from plait.net.tls import create_identity
from plait.network_file import Authority, Judge, NetworkFile, Witness, load_network_file
from plait.testing.accounting import NETWORK_ID, PaperSession, Plot, key_of
from plait.testnet.ports import choose_ports
from plait.types import PeerId
from plait.v1 import ledger_pb2 as pb
from plait.v1.identity_pb2 import SignedEnvelope

FOUNDER, ISSUER, PAYEE, PAYEE_LEDGER, JUDGE, WITNESS = (
    key_of(name) for name in ("founder", "issuer", "payee", "payee ledger", "judge", "witness")
)


@dataclass
class World:
    """A folder per network file: the same four authorities, some with an address where none is."""

    folder: Path
    client: str

    def file(self, away: Sequence[int] = (), name: str = "", **changes: Any) -> Path:
        """A network file in which these authorities are not where they listen."""
        path = self.folder / (name or f"away-{'-'.join(map(str, away))}") / "network.toml"
        if not path.parent.exists():
            for keys in ("client", "issuer"):
                shutil.copytree(self.folder / keys, path.parent / keys)
            network = load_network_file(self.folder / "network.toml")
            dead = {
                n: f"127.0.0.1:{port}"
                for n, port in zip(away, choose_ports(len(away)), strict=True)
            }
            authorities = tuple(
                replace(one, address=dead.get(number, one.address))
                for number, one in enumerate(network.authorities)
            )
            replace(network, **{"authorities": authorities, **changes}).save(path, FOUNDER)
        return path


async def serve(folder: Path, started: threading.Event, stop: asyncio.Event) -> None:
    tls = [create_identity(key_of(f"authority {n}").peer_id) for n in range(4)]
    authorities = tuple(
        Authority(
            key_of(f"authority {n}").peer_id,
            f"127.0.0.1:{port}",
            key_of(f"ledger {n}").public,
            key_of(f"log/{n}").public,
            f"net/ledger-{n}",
            tls[n].cert_der,
        )
        for n, port in enumerate(choose_ports(4))
    )
    network = NetworkFile(
        NETWORK_ID,
        FOUNDER.peer_id,
        "open",
        ISSUER.public,
        authorities,
        (),
        judges=(Judge("judge", JUDGE.public),),
        judge_quorum=1,
        escrow_percent=10,
        escrow_window_s=86_400,
    )
    network.save(folder / "network.toml", FOUNDER)
    async with AsyncExitStack() as stack:
        for n, one in enumerate(authorities):
            keys = AuthorityKeys(key_of(f"ledger {n}"), key_of(f"log/{n}"))
            port = int(one.address.rpartition(":")[2])
            pems = (tls[n].cert_pem, tls[n].key_pem)
            store = folder / str(n) / "journal.db"
            await stack.enter_async_context(
                serve_authority(store, network, one, keys, "127.0.0.1", port, pems)
            )
        started.set()
        await stop.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("committee")
    for name in ("identity", "ledger"):
        save_key(folder / "client" / f"{name}.key", SigningKey.generate())
    save_key(folder / "issuer" / "issuer.key", ISSUER)
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=[serve(folder, started, stop)])
    thread.start()
    assert started.wait(20)
    yield World(folder, load_key(folder / "client" / "identity.key").peer_id)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
def plait(capsys: pytest.CaptureFixture[str]) -> "Plait":
    return Plait(capsys)


@dataclass
class Plait:
    """The command, and what its last call wrote to stderr."""

    capsys: pytest.CaptureFixture[str]
    errors: str = ""

    def run(self, network: Path, *arguments: str, code: int = 0) -> str:
        self.capsys.readouterr()
        result = invoke([*arguments, "--network", str(network)])
        captured = self.capsys.readouterr()
        self.errors = captured.err
        assert result == code, captured.out + captured.err
        return captured.out

    def json(self, network: Path, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(network, *arguments, "--json", code=code).splitlines()[-1])

    def available(self, network: Path, account: str, authority: int) -> int:
        """What one authority says."""
        found = self.json(
            network, "ledger", "balance", account, "--authority", f"ledger-{authority}"
        )
        return int(found["available_microcredits"])


def stranger(name: str) -> str:
    return key_of(name).peer_id


def test_credit_is_booked_with_all_and_who_was_away_gets_it_when_told_again(
    world: World, plait: Plait
) -> None:
    account, all_here, one_away = stranger("a"), world.file(), world.file([2])
    order = ("ledger", "issue", account, "500", "--order-id", "a1")
    booked = plait.json(one_away, *order)
    assert (booked["booked"], booked["authorities"]) == (3, 4)
    assert [one["authority"] for one in booked["missing"]] == ["net/ledger-2"]
    assert booked["entries"].keys() == {f"net/ledger-{n}" for n in (0, 1, 3)}
    assert "new to the ledger" in plait.errors and "--order-id a1" in plait.errors
    assert [plait.available(all_here, account, n) for n in range(4)] == [500, 500, 0, 500]
    assert plait.json(all_here, "ledger", "balance", account)["available_microcredits"] == 500
    again = plait.json(all_here, *order)
    assert (again["booked"], again["missing"]) == (4, [])
    assert "new to the ledger" not in plait.errors
    assert [plait.available(all_here, account, n) for n in range(4)] == [500] * 4
    assert "booked by 4 of 4 authorities" in plait.run(all_here, *order)


def test_credit_that_no_quorum_books_is_no_success(world: World, plait: Plait) -> None:
    account, two_away = stranger("b"), world.file([0, 2])
    for kind, number in (("issue", "b1"), ("limit", "b2")):
        order = ("ledger", kind, account, "70", "--order-id", number)
        error = plait.json(two_away, *order, code=5)["error"]
        assert f"{kind}: 2 of 4 authorities" in error["message"]
        assert f"--order-id {number}" in error["remedy"]
        assert plait.json(world.file(), *order)["booked"] == 4
    found = plait.json(world.file(), "ledger", "balance", account)
    assert (found["available_microcredits"], found["credit_limit_microcredits"]) == (140, 70)


def test_what_the_issuer_is_refused_asks_for_no_repetition(world: World, plait: Plait) -> None:
    account = stranger("c")
    plait.json(world.file(), "ledger", "issue", account, "5", "--order-id", "c1")
    again = ("ledger", "issue", account, "6", "--order-id", "c1")
    error = plait.json(world.file(), *again, code=9)["error"]
    assert "0 of 4 authorities" in error["message"] and error["remedy"] == ""


@given(st.permutations([30, 30, 29, 10**9]), st.integers(0, 3))
def test_one_liar_makes_no_figure_larger_and_one_who_lags_none_smaller(
    figures: list[int], away: int
) -> None:
    names = [Authority(PeerId(f"p{n}"), "", b"", b"", "", b"") for n in range(4)]
    answers = tuple(zip(names, figures, strict=True))
    assert Poll(4, answers, ()).confirmed() == 30
    three = (*answers[:away], *answers[away + 1 :])
    failed = ((names[away], PeerUnreachable("away")),)
    assert Poll(4, three, failed).shortfall("settle") is None
    assert Poll(4, three, failed).confirmed() == sorted(f for _, f in three)[1]
    two = Poll(4, three[:2], (*failed, (three[2][0], PeerUnreachable("away"))))
    assert "settle: 2 of 4" in str(two.shortfall("settle"))


def test_a_balance_says_whose_word_it_is(world: World, plait: Plait) -> None:
    read = ("ledger", "balance", stranger("d"))
    found = plait.json(world.file([3]), *read)
    assert (found["authority"], found["answers"]) == (None, 3)
    named = plait.json(world.file([3]), *read, "--authority", "net/ledger-1")
    assert named["authority"] == stranger("authority 1")
    plait.json(world.file([3]), *read, "--authority", "ledger-3", code=5)
    assert (
        "ledger-2" in plait.json(world.file(), *read, "--authority", "x", code=3)["error"]["remedy"]
    )
    plait.json(world.file([2, 3]), *read, code=5)
    assert plait.json(world.file(), "ledger", "sub-accounts")["sub_accounts"] == []


def test_a_log_is_read_from_the_first_authority_that_answers(
    world: World, plait: Plait, tmp_path: Path
) -> None:
    plait.run(world.file(), "ledger", "issue", world.client, "9", "--order-id", "e1")
    away, period = world.file([0]), ("--from", "2026-01-01", "--until", "2099-01-01")
    for read in ("history", "checkpoint", "audit"):
        assert plait.json(away, "ledger", read)["authority"] == stranger("authority 1")
        assert "asking the authority net/ledger-1" in plait.errors
        chosen = plait.json(away, "ledger", read, "--authority", stranger("authority 3"))
        assert chosen["authority"] == stranger("authority 3")
        plait.run(away, "ledger", read, "--authority", "ledger-0", code=5)
    for read in ("statement", "invoice"):
        plait.run(away, "ledger", read, *period)
        plait.run(away, "ledger", read, *period, "--authority", "ledger-0", code=5)
    file = tmp_path / "journal.jsonl"
    plait.run(away, "ledger", "export", "--authority", "ledger-2", "--output", str(file))
    # A file says itself whose journal it is, and needs nobody to be there.
    nobody = world.file([0, 1, 2, 3])
    assert plait.json(nobody, "ledger", "audit", str(file))["origin"] == "net/ledger-2"
    plait.run(nobody, "ledger", "audit", str(file), "--authority", "ledger-1", code=3)
    plait.run(nobody, "ledger", "history", code=5)


def test_a_checkpoint_is_compared_with_the_log_that_it_is_of(
    world: World, plait: Plait, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    saved.write_text(plait.run(world.file(), "ledger", "checkpoint", "--authority", "ledger-2"))
    found = plait.json(world.file([0]), "ledger", "compare", str(saved))
    assert found["origin"] == "net/ledger-2"
    saved.write_text(saved.read_text().replace("net/ledger-2", "other.example/log"))
    error = plait.json(world.file(), "ledger", "compare", str(saved), code=1)["error"]
    assert "this checkpoint is of 'other.example/log'" in error["message"]


def test_a_checkpoint_without_the_quorum_of_witnesses_is_not_said_to_hold(
    world: World, plait: Plait, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_connection, "WITNESSES_S", 0.1)
    witness = Witness("w.example", WITNESS.public)
    strict = world.file(name="strict", witnesses=(witness,), witness_quorum=1)
    file, saved = tmp_path / "journal.jsonl", tmp_path / "saved"
    plait.run(world.file(), "ledger", "issue", world.client, "9", "--order-id", "f1")
    saved.write_text(plait.run(strict, "ledger", "checkpoint"))
    assert "has 0 of the 1 witnesses" in plait.errors
    assert plait.json(strict, "ledger", "checkpoint")["witnessed"] is False
    assert (
        "has 0 of the 1 witnesses"
        in plait.json(strict, "ledger", "compare", str(saved), code=1)["error"]["message"]
    )
    look = ("ledger", "compare", str(saved), "--no-witnesses")
    assert "has 0 of the 1 witnesses" in plait.run(strict, *look)
    assert plait.json(strict, *look)["witnessed"] is False
    report = plait.json(strict, "ledger", "audit", code=1)
    assert report["balanced"] and "has 0 of the 1 witnesses" in report["violations"][0]
    assert "holds" not in plait.run(strict, "ledger", "audit", code=1)
    looked = plait.json(strict, "ledger", "audit", "--no-witnesses")
    assert (looked["violations"], looked["witnessed"]) == ([], False)
    assert "but the checkpoint has 0 of the 1" in plait.run(
        strict, "ledger", "audit", "--no-witnesses"
    )
    # The same journal once the witness has cosigned its checkpoint.
    plait.run(strict, "ledger", "export", "--output", str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if "checkpoint" in line:
            note = line["checkpoint"]
            line["checkpoint"] = note + cosign(WITNESS, witness.name, note, int(time.time()))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = plait.json(strict, "ledger", "audit", str(file))
    assert (report["witnessed"], report["witnesses"]) == (True, ["w.example"])


# A session of the committee, settled and judged ------------------------------------------


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def reserve(world: World) -> pb.SettleRequest:
    """Reserve at all authorities; returns what the session's one stage would present."""
    key = load_key(world.folder / "client" / "ledger.key")
    peer = load_key(world.folder / "client" / "identity.key")
    names: dict[str, Any] = {"network_id": NETWORK_ID, "session_id": b"s" * 16}
    caps = [pb.PayeeAmount(payee=PAYEE.peer_id, microcredits=30)]
    reservation = pb.BudgetReservation(
        **names, account=peer.peer_id, sequence=1, amount=30, caps=caps, issued_ms=now_ms()
    )
    reservation.expires_ms = now_ms() + 60_000
    cert = make_key_cert(peer, key.public, NETWORK_ID, now_ms(), 60_000, 1)
    asked = seal(key, reservation)
    members = load_network_file(world.file()).authorities
    poll = asyncio.run(ask_all(members, lambda ledger: ledger.reserve(asked, cert)))
    assert len(poll.answers) == 4
    voucher = seal(key, pb.SessionVoucher(**names, account=peer.peer_id, amounts=caps))
    request = pb.SettlementRequest(
        **names, payee=PAYEE.peer_id, voucher_digest=digest(voucher.payload), issued_ms=now_ms()
    )
    payee_cert = make_key_cert(PAYEE, PAYEE_LEDGER.public, NETWORK_ID, now_ms(), 60_000, 1)
    return pb.SettleRequest(
        request=seal(PAYEE_LEDGER, request), payee_cert=payee_cert, voucher=voucher
    )


def test_vouchers_are_presented_to_all_and_judgements_filed_with_all(
    world: World, plait: Plait, tmp_path: Path
) -> None:
    plait.run(world.file(), "ledger", "issue", world.client, "100", "--order-id", "91")
    vouchers, judgement = tmp_path / "vouchers", tmp_path / "judgement"
    vouchers.mkdir()
    (vouchers / "s-0").write_bytes(reserve(world).SerializeToString())
    settled = plait.json(world.file([0, 1]), "ledger", "settle", str(vouchers), code=5)
    assert settled["paid_microcredits"] == {} and "2 of 4" in settled["refused"]["s-0"]
    settled = plait.json(world.file([1]), "ledger", "settle", str(vouchers))
    assert (settled["paid_microcredits"], settled["booked"]) == ({"s-0": 30}, {"s-0": 3})
    assert "not booked by net/ledger-1" in plait.errors
    again = plait.run(world.file(), "ledger", "settle", str(vouchers))
    assert "30 microcredits paid in all, booked by 4 of 4 authorities" in again
    found = pb.ExposureJudgement(
        network_id=NETWORK_ID,
        session_id=b"s" * 16,
        payee=PAYEE.peer_id,
        receipt_digest=b"r" * 32,
        evidence_digest=b"e" * 32,
        issued_ms=now_ms(),
    )
    judgement.write_bytes(sign_judgement(JUDGE, found).SerializeToString())
    filed = plait.json(world.file([0]), "audit", "file", str(judgement))
    assert (filed["forfeited_microcredits"], filed["booked"]) == (3, 3)
    assert [one["authority"] for one in filed["missing"]] == ["net/ledger-0"]
    error = plait.json(world.file([0, 1]), "audit", "file", str(judgement), code=5)["error"]
    assert "2 of 4" in error["message"]
    assert "forfeited before" in plait.run(world.file(), "audit", "file", str(judgement))
    assert "not booked" not in plait.errors


# Grants judged ---------------------------------------------------------------------------


def bundle_granted(path: Path, granted_ms: int) -> Path:
    """A bundle whose grants the committee has given, and booked nowhere."""
    from plait.ledger.committee import combine_grants

    session = PaperSession(Plot()).play()
    granted = pb.ReservationGrant.FromString(session.grant.payload)
    granted.granted_ms = granted_ms
    members = [
        Authority(PeerId(""), "", key_of(f"ledger {n}").public, b"", "", b"") for n in range(4)
    ]
    grants: list[SignedEnvelope] = [seal(key_of(f"ledger {n}"), granted) for n in range(4)]
    parts = session.bundle_parts()
    epochs = (replace(parts.epochs[0], grant=combine_grants(grants, members)),)
    path.write_bytes(build_bundle(replace(parts, epochs=epochs), key_of("client")))
    return path


def test_who_does_not_answer_keeps_nobody_else_from_being_judged(
    world: World, plait: Plait, tmp_path: Path
) -> None:
    plait.run(world.file(), "ledger", "issue", world.client, "9", "--order-id", "91a0")
    late = bundle_granted(tmp_path / "late.json", 0)
    soon = bundle_granted(tmp_path / "soon.json", now_ms() + 10**9)
    judged = plait.json(world.file([1]), "ledger", "judge", str(late), code=1)["verdicts"]
    assert [one["finding"] for one in judged] == ["withheld", "unanswered", "withheld", "withheld"]
    assert judged[1]["origin"] == "net/ledger-1"
    told = plait.run(world.file([0]), "ledger", "judge", str(soon), code=2).splitlines()
    assert told[0].startswith("unanswered: net/ledger-0 (")
    assert [line.partition(":")[0] for line in told[1:]] == ["not yet due"] * 3
    plait.run(world.file(), "ledger", "judge", str(soon))
    plait.run(world.file([0, 1, 2, 3]), "ledger", "judge", str(soon), code=5)


def test_a_journal_that_is_not_what_was_signed_keeps_nobody_else_from_being_judged(
    world: World, plait: Plait, tmp_path: Path
) -> None:
    members = load_network_file(world.file()).authorities
    forged = replace(members[1], log_key=key_of("forger").public)
    lied_to = world.file(name="forged", authorities=(members[0], forged, *members[2:]))
    soon = bundle_granted(tmp_path / "soon.json", now_ms() + 10**9)
    judged = plait.json(lied_to, "ledger", "judge", str(soon), code=1)["verdicts"]
    assert [one["finding"] for one in judged] == ["not yet due", "false"] + ["not yet due"] * 2
