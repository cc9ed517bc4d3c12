"""The rules of a witness, its disk, and an authority that collects cosignatures."""

import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSignature, ConfigError, LedgerError
from plait.identity import SigningKey
from plait.ledger.checkpoint import Checkpoint, open_checkpoint, sign_checkpoint
from plait.ledger.cosignature import Cosignature, cosign, cosignature_key_id, open_cosignatures
from plait.ledger.fork import check_fork_proof
from plait.ledger.merkle import Tree, leaf_hash
from plait.ledger.service.recorder import LogIdentity, Recorder
from plait.ledger.service.store import open_store
from plait.ledger.service.witness import Cosigner, LocalCosigner, WitnessedLog, WitnessFiles
from plait.ledger.verify import verify_bundle
from plait.ledger.witness import LogWitness, WitnessRefusal
from plait.network_file import Witness, parse_network_file
from plait.testing.accounting import NETWORK_ID, key_of, paper_network

NETWORK = paper_network()
ORIGIN = NETWORK.authorities[0].log_origin
LOG_KEY = key_of("authority log")
TREE = Tree(leaf_hash(b"%d" % index) for index in range(40))
FORKED = Tree(leaf_hash(b"x%d" % index) for index in range(40))
KEY = key_of("witness")
WITNESS = Witness("witness.example/w1", KEY.public)
NOW_S = 1_700_000_000

# The example of c2sp.org/tlog-cosignature.
PUBLISHED = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJs"
    "X3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)


class Memory:
    """What a witness remembers, without a disk."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.fails = False

    def latest(self, origin: str) -> str | None:
        return self.notes.get(origin)

    def advance(self, origin: str, previous: str | None, note: str) -> bool:
        if self.fails:
            raise LedgerError("the disk failed")
        if self.notes.get(origin) != previous:
            return False
        self.notes[origin] = note
        return True


def witness(memory: Memory | WitnessFiles) -> LogWitness:
    return LogWitness(WITNESS.name, KEY, {ORIGIN: LOG_KEY.public}, memory)


def note(size: int, tree: Tree = TREE) -> str:
    return sign_checkpoint(LOG_KEY, ORIGIN, size, tree.root(size))


def proof(first: int, second: int, tree: Tree = TREE) -> list[bytes]:
    return list(tree.consistency_proof(first, second)) if 0 < first < second else []


def refused(answer: str | WitnessRefusal, status: int) -> WitnessRefusal:
    assert isinstance(answer, WitnessRefusal), answer
    assert answer.status == status, answer
    return answer


def cosigned(answer: str | WitnessRefusal, signed: str, time_s: int = NOW_S) -> None:
    assert isinstance(answer, str), answer
    assert open_cosignatures(signed + answer, [WITNESS]) == (Cosignature(WITNESS.name, time_s),)
    assert open_checkpoint(signed + answer, ORIGIN, LOG_KEY.public).origin == ORIGIN


@given(st.lists(st.integers(0, 40), max_size=6).map(sorted))
def test_a_log_that_only_grows_is_cosigned(sizes: list[int]) -> None:
    one, old = witness(Memory()), 0
    for size in sizes:
        cosigned(one.add_checkpoint(old, proof(old, size), note(size), NOW_S), note(size))
        old = size


def test_each_rule_has_its_status() -> None:
    memory = Memory()
    one = witness(memory)
    stranger = sign_checkpoint(LOG_KEY, "other.example", 7, TREE.root(7))
    refused(one.add_checkpoint(0, [], stranger, NOW_S), 404)
    forged = sign_checkpoint(key_of("x"), ORIGIN, 7, TREE.root(7))
    refused(one.add_checkpoint(0, [], forged, NOW_S), 403)
    refused(one.add_checkpoint(0, [], "no note", NOW_S), 403)
    refused(one.add_checkpoint(0, [], sign_checkpoint(LOG_KEY, ORIGIN, 0, bytes(32)), NOW_S), 400)
    refused(one.add_checkpoint(8, [], note(7), NOW_S), 400)
    refused(one.add_checkpoint(-1, [], note(7), NOW_S), 400)
    refused(one.add_checkpoint(0, [bytes(32)] * 64, note(7), NOW_S), 400)
    refused(one.add_checkpoint(0, [bytes(32)], note(7), NOW_S), 422)
    assert refused(one.add_checkpoint(3, [], note(7), NOW_S), 409).size == 0
    assert memory.notes == {}
    cosigned(one.add_checkpoint(0, [], note(7), NOW_S), note(7))
    assert refused(one.add_checkpoint(0, [], note(9), NOW_S), 409).size == 7
    refused(one.add_checkpoint(7, [], note(9), NOW_S), 422)
    refused(one.add_checkpoint(7, proof(7, 9)[:-1], note(9), NOW_S), 422)
    refused(one.add_checkpoint(7, proof(7, 9, FORKED), note(9, FORKED), NOW_S), 422)
    refused(one.add_checkpoint(7, proof(7, 9), note(9, FORKED), NOW_S), 422)
    assert refused(one.add_checkpoint(3, proof(3, 5), note(5), NOW_S), 409).size == 7
    assert memory.notes == {ORIGIN: note(7)}
    # The same again is no conflict: the log may have lost the answer.
    cosigned(one.add_checkpoint(7, [], note(7), NOW_S + 1), note(7), NOW_S + 1)


@pytest.mark.parametrize("old_size", [0, 7])
def test_two_trees_of_one_size_are_proof_of_a_fork(old_size: int) -> None:
    one = witness(Memory())
    one.add_checkpoint(0, [], note(7), NOW_S)
    refusal = refused(one.add_checkpoint(old_size, [], note(7, FORKED), NOW_S), 409)
    assert refusal.fork is not None
    verdict = check_fork_proof(refusal.fork, NETWORK)
    assert verdict.culprit == NETWORK.authorities[0].peer


def test_of_two_at_once_only_one_is_cosigned() -> None:
    """The race of the specification: a smaller tree must not replace a larger one."""
    memory = Memory()

    class Raced(Memory):
        def latest(self, origin: str) -> str | None:
            before = memory.latest(origin)
            if before is None:
                witness(memory).add_checkpoint(0, [], note(9), NOW_S)
            return before

        def advance(self, origin: str, previous: str | None, note: str) -> bool:
            return memory.advance(origin, previous, note)

    assert refused(witness(Raced()).add_checkpoint(0, [], note(7), NOW_S), 409).size == 9
    assert memory.notes == {ORIGIN: note(9)}


def test_nothing_is_cosigned_that_is_not_durable() -> None:
    memory = Memory()
    memory.fails = True
    with pytest.raises(LedgerError):
        witness(memory).add_checkpoint(0, [], note(7), NOW_S)
    memory = Memory()
    memory.notes[ORIGIN] = note(7).replace("\n7\n", "\n8\n")
    with pytest.raises(LedgerError, match="damaged"):
        witness(memory).add_checkpoint(8, [], note(8), NOW_S)


def test_the_published_format() -> None:
    raw = base64.b64decode(PUBLISHED.split(" ")[-1])
    assert len(raw) == 4 + 8 + 64
    assert int.from_bytes(raw[4:12], "big") == 1679315147
    ours = cosign(KEY, WITNESS.name, PUBLISHED, 1679315147)
    raw = base64.b64decode(ours.split(" ")[-1])
    assert raw[:4] == cosignature_key_id(WITNESS.name, KEY.public)
    message = "cosignature/v1\ntime 1679315147\n" + PUBLISHED.split("\n\n")[0] + "\n"
    assert raw[12:] == KEY.sign(message.encode())


def test_the_vectors() -> None:
    path = Path(__file__).parents[1] / "vectors" / "witness.json"
    vectors = json.loads(path.read_text(encoding="utf-8"))
    network = parse_network_file(vectors["network_toml"].encode())
    assert network.witness_quorum == 2
    for case, known in zip(vectors["cosignatures"], network.witnesses, strict=True):
        key, name = SigningKey.from_seed(bytes.fromhex(case["seed"])), case["name"]
        assert (name, key.public) == (known.name, known.key)
        assert cosign(key, name, vectors["note"], case["time_s"]) == case["line"]
        found = open_cosignatures(vectors["note"] + case["line"], network.witnesses)
        assert found == (Cosignature(name, case["time_s"]),)
    for case in vectors["bundles"]:
        report = verify_bundle(case["data"].encode(), network)
        assert report.outcome == case["outcome"], case["name"]
        assert [c.name for c in report.claims if c.ok is False] == case["false_claims"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("witness_quorum = 1", "witness_quorum = 3"),
        ("witness_quorum = 1", "witness_quorum = -1"),
        (key_of("b").public.hex(), key_of("a").public.hex()),
        (key_of("b").public.hex(), LOG_KEY.public.hex()),
        ('"b"', '"a"'),
        ('"b"', '"b c"'),
        ('name = "b"', ""),
    ],
)
def test_a_network_file_with_impossible_witnesses_is_refused(old: str, new: str) -> None:
    pair = tuple(Witness(name, key_of(name).public) for name in ("a", "b"))
    text = paper_network(witnesses=pair, witness_quorum=1).to_toml()
    assert parse_network_file(text.encode()).witnesses == pair
    assert old in text
    with pytest.raises(ConfigError, match="not valid"):
        parse_network_file(text.replace(old, new).encode())


def test_what_is_no_cosignature() -> None:
    signed = note(7)
    line = cosign(KEY, WITNESS.name, signed, NOW_S)
    later = cosign(KEY, WITNESS.name, signed, NOW_S + 5)
    assert open_cosignatures(signed, [WITNESS]) == ()
    assert open_cosignatures(signed + line, []) == ()
    newest = open_cosignatures(signed + line + later + line, [WITNESS])
    assert newest == (Cosignature(WITNESS.name, NOW_S + 5),)
    renamed = cosign(KEY, "w2.example", signed, NOW_S)
    assert open_cosignatures(signed + renamed, [WITNESS]) == ()
    for bad in (
        cosign(KEY, WITNESS.name, note(8), NOW_S),
        _line(line, lambda raw: raw[:-1]),
        _line(line, lambda raw: raw[:4] + b"\x80" + raw[5:]),
        _line(line, lambda raw: raw[:11] + b"\7" + raw[12:]),
    ):
        with pytest.raises(BadSignature):
            open_cosignatures(signed + bad, [WITNESS])
    with pytest.raises(ValueError, match="not a time"):
        cosign(KEY, WITNESS.name, signed, 2**63)
    with pytest.raises(ValueError, match="not a key name"):
        cosign(KEY, "a b", signed, 1)


def _line(line: str, change: object) -> str:
    assert callable(change)
    head, _, encoded = line.rpartition(" ")
    return f"{head} {base64.b64encode(change(base64.b64decode(encoded))).decode()}\n"


def test_a_witness_remembers_across_restarts(tmp_path: Path) -> None:
    folder = tmp_path / "witness"
    cosigned(witness(WitnessFiles(folder)).add_checkpoint(0, [], note(7), NOW_S), note(7))
    again = WitnessFiles(folder)
    assert again.latest(ORIGIN) == note(7)
    assert refused(witness(again).add_checkpoint(0, [], note(5), NOW_S), 409).size == 7
    assert not again.advance(ORIGIN, None, note(9))
    assert again.latest(ORIGIN) == note(7)
    cosigned(witness(again).add_checkpoint(7, proof(7, 9), note(9), NOW_S), note(9))


def test_a_failed_disk_stops_the_witness(tmp_path: Path) -> None:
    files = WitnessFiles(tmp_path / "witness")
    (tmp_path / "witness" / "lock").mkdir()
    with pytest.raises(LedgerError, match="disk failed"):
        witness(files).add_checkpoint(0, [], note(7), NOW_S)
    (tmp_path / "witness" / "lock").rmdir()
    with pytest.raises(LedgerError, match="before"):
        witness(files).add_checkpoint(0, [], note(7), NOW_S)
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError):
        WitnessFiles(tmp_path / "file")


@pytest.mark.parametrize("step", range(3))
def test_a_crash_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The steps are: sync the file, put it in place, sync the folder."""
    folder = tmp_path / "witness"
    witness(WitnessFiles(folder)).add_checkpoint(0, [], note(7), NOW_S)
    owner, name = ((os, "fsync"), (Path, "replace"), (os, "fsync"))[step]
    honest, calls = getattr(owner, name), []

    def dies(*arguments: object) -> object:
        calls.append(name)
        if step < 2 or len(calls) == 2:
            raise OSError(5, "the disk is gone")
        return honest(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dies)
        with pytest.raises(LedgerError):
            witness(WitnessFiles(folder)).add_checkpoint(7, proof(7, 9), note(9), NOW_S)
    after = WitnessFiles(folder)
    assert after.latest(ORIGIN) == note(9 if step == 2 else 7)
    old = opened(after.latest(ORIGIN) or "").size
    cosigned(witness(after).add_checkpoint(old, proof(old, 12), note(12), NOW_S), note(12))


class Absentee:
    """A witness that does not answer, or answers nonsense."""

    def __init__(self, name: str, answer: str | WitnessRefusal | Exception) -> None:
        self.name = name
        self._answer = answer

    async def add_checkpoint(self, old_size: int, proof: object, note: str) -> str | WitnessRefusal:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def opened(signed: str) -> Checkpoint:
    return open_checkpoint(signed, ORIGIN, LOG_KEY.public)


async def test_an_authority_collects_cosignatures(tmp_path: Path) -> None:
    others = (Witness("silent", key_of("s").public), Witness("liar", key_of("l").public))
    files = WitnessFiles(tmp_path / "witness")
    cosigners: list[Cosigner] = [
        LocalCosigner(witness(files), lambda: NOW_S),
        Absentee("silent", TimeoutError()),
        Absentee("liar", cosign(key_of("x"), "liar", note(7), NOW_S)),
        Absentee("unknown", "— unknown AAAAAAAA\n"),
    ]
    for size in (3, 8):  # the second time as after a restart: the sizes are forgotten
        recorder = Recorder(
            open_store(tmp_path / f"{size}.db", NETWORK_ID),
            NETWORK_ID,
            LogIdentity(ORIGIN, LOG_KEY),
            lambda: 0,
        )
        try:
            for index in range(size):
                recorder.tree.append(leaf_hash(b"%d" % index))
            recorder._committed_size = size
            log = WitnessedLog(recorder, (WITNESS, *others), 1, cosigners)
            covered, signed = await log.checkpoint(size)
            assert await log.checkpoint() == (covered, signed)
            assert opened(signed).size == covered == size
            found = open_cosignatures(signed, (WITNESS, *others))
            assert [cosignature.name for cosignature in found] == [WITNESS.name]
        finally:
            recorder.close()
    assert files.latest(ORIGIN) == note(8)
