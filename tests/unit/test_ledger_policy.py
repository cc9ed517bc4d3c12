"""tlog-policy and tlog-proof: read, written, judged, refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadProof, BadSignature, VerificationError
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.cosignature import cosign
from plait.ledger.log_proof import LogProof, check_log_proof, read_log_proof, write_log_proof
from plait.ledger.merkle import Tree, leaf_hash
from plait.ledger.policy import check_policy, policy_of, read_policy, vkey
from plait.network_file import Witness
from plait.testing.accounting import key_of, paper_network

ORIGIN = "log.example/é"
LOG_KEY = key_of("log")
NAMES = ("X1", "X2", "X3", "Y1", "Y2", "Y3")
KEYS = {name: key_of(name) for name in NAMES}
ENTRIES = [str(number).encode() for number in range(9)]
TREE = Tree(map(leaf_hash, ENTRIES))
NOTE = sign_checkpoint(LOG_KEY, ORIGIN, 9, TREE.root())
POLICY_TEXT = "\n".join(
    [
        "# two levels, as in the specification",
        f"log {vkey(ORIGIN, LOG_KEY.public)} https://log.example/",
        "",
        *(
            f"\twitness {name}  {vkey(f'{name}.example', key.public, witness=True)} "
            for name, key in KEYS.items()
        ),
        "group X-witnesses 2 X1 X2 X3",
        "group Y-witnesses any Y1 Y2 Y3",
        "group X-and-Y all X-witnesses Y-witnesses",
        "quorum X-and-Y",
        "",
    ]
)
POLICY = read_policy(POLICY_TEXT.encode())


def cosigned(*names: str) -> str:
    return NOTE + "".join(cosign(KEYS[name], f"{name}.example", NOTE, 7) for name in names)


@given(st.sets(st.sampled_from(NAMES)))
def test_the_quorum_of_two_levels(names: set[str]) -> None:
    enough = len(names & {"X1", "X2", "X3"}) >= 2 and bool(names & {"Y1", "Y2", "Y3"})
    try:
        check_policy(cosigned(*names), POLICY)
    except BadProof as error:
        assert not enough, error
    else:
        assert enough


def test_no_quorum_and_a_single_witness() -> None:
    head, _, _ = POLICY_TEXT.partition("group")
    assert check_policy(NOTE, read_policy(f"{head}quorum none\n".encode())).size == 9
    single = read_policy(f"{head}quorum Y2\n".encode())
    assert check_policy(cosigned("Y2"), single).size == 9
    with pytest.raises(BadProof, match="quorum"):
        check_policy(cosigned("Y1"), single)


def test_another_log_or_a_bad_signature() -> None:
    other = sign_checkpoint(LOG_KEY, "other", 9, TREE.root())
    with pytest.raises(BadProof, match="no log"):
        check_policy(other, POLICY)
    forged = cosigned("X1", "X2").replace("\n9\n", "\n8\n")
    with pytest.raises(BadSignature):
        check_policy(forged, POLICY)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("quorum X-and-Y", ""),
        lambda text: text + "quorum X1\n",
        lambda text: text.replace("quorum X-and-Y", "quorum Z"),
        lambda text: text.replace("group X-witnesses 2 X1", "group X-witnesses 4 X1"),
        lambda text: text.replace("group X-witnesses 2 X1", "group X-witnesses 0 X1"),
        lambda text: text.replace("group X-witnesses 2 X1", "group X-witnesses 02 X1"),
        lambda text: text.replace("group X-witnesses 2 X1 X2 X3", "group X-witnesses any"),
        lambda text: text.replace("2 X1 X2 X3", "2 X1 X2 X1"),
        lambda text: text.replace("any Y1 Y2 Y3", "any Y1 X1"),
        lambda text: text.replace("any Y1 Y2 Y3", "any Y1 none"),
        lambda text: text.replace("group Y-witnesses", "group X1"),
        lambda text: text.replace("group Y-witnesses", "group none"),
        lambda text: text + f"log {vkey('another', LOG_KEY.public)}\n",
        lambda text: text + f"witness Z {vkey('z', KEYS['X1'].public, witness=True)}\n",
        lambda text: text + f"witness Z {vkey('z', key_of('z').public)}\n",
        lambda text: text + "witness Z\n",
        lambda text: text + "anything else\n",
        lambda text: text + "\r\n",
        lambda text: text + "\x7f\n",
        lambda text: text.replace("X1.example+", "X1.example+0"),
        lambda text: text + "#\n" * 1_100,
    ],
)
def test_a_policy_that_is_none(change: Callable[[str], str]) -> None:
    text = change(POLICY_TEXT)
    assert text != POLICY_TEXT
    with pytest.raises(ValueError, match="policy"):
        read_policy(text.encode())


def test_a_network_file_as_a_policy() -> None:
    network = paper_network()
    pair = tuple(Witness(f"{name}.example", KEYS[name].public) for name in ("X1", "X2"))
    for quorum in (0, 1, 2):
        known = replace(network, witnesses=pair, witness_quorum=quorum)
        policy = read_policy(policy_of(known).encode())
        assert policy.logs == {one.log_origin: one.log_key for one in network.authorities}
        assert tuple(policy.witnesses.values()) == pair
        expected = None if not quorum else (quorum, ("w1", "w2"))
        group = policy.groups.get(policy.quorum or "")
        assert (None if group is None else (group.threshold, group.members)) == expected


def proof_of(index: int, extra: bytes | None = None) -> LogProof:
    note = cosigned("X1", "X3", "Y3")
    return LogProof(index, tuple(TREE.inclusion_proof(index, 9)), note, extra)


@pytest.mark.parametrize("extra", [None, b"", ENTRIES[4]])
def test_a_proof_is_read_as_it_was_written(extra: bytes | None) -> None:
    proof = proof_of(4, extra)
    text = write_log_proof(proof)
    assert text.startswith("c2sp.org/tlog-proof@v1\n")
    assert read_log_proof(text) == proof
    assert check_log_proof(proof, ENTRIES[4], POLICY).size == 9
    with pytest.raises(BadProof):
        check_log_proof(proof, ENTRIES[5], POLICY)
    with pytest.raises(BadProof):
        check_log_proof(replace(proof, index=5), ENTRIES[4], POLICY)


def test_a_proof_of_a_tree_of_one() -> None:
    note = sign_checkpoint(LOG_KEY, ORIGIN, 1, leaf_hash(b"x"))
    text = write_log_proof(LogProof(0, (), note))
    assert text == f"c2sp.org/tlog-proof@v1\nindex 0\n\n{note}"
    head, _, _ = POLICY_TEXT.partition("group")
    policy = read_policy(f"{head}quorum none\n".encode())
    assert check_log_proof(read_log_proof(text), b"x", policy).size == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("c2sp.org/tlog-proof@v1", "c2sp.org/tlog-proof@v2"),
        ("index 4", "index 04"),
        ("index 4", "index -4"),
        ("index 4", "index ٤"),
        ("index 4", "idx 4"),
        ("index 4\n", ""),
        ("extra NA==", "extra NB=="),
        ("extra NA==", "extra N A"),
        ("\n\nlog", "\nlog"),
    ],
)
def test_a_proof_that_is_none(old: str, new: str) -> None:
    text = write_log_proof(proof_of(4, ENTRIES[4]))
    assert old in text
    with pytest.raises(VerificationError):
        check_log_proof(read_log_proof(text.replace(old, new)), ENTRIES[4], POLICY)


@given(st.integers(0, 10_000), st.sampled_from("A\n 9é"))
def test_no_flipped_letter_of_what_is_authenticated_passes(position: int, letter: str) -> None:
    text = write_log_proof(proof_of(4))
    body = text.rindex("\n\n")
    position %= body
    changed = text[:position] + letter + text[position + 1 :]
    if changed == text:
        return
    with pytest.raises(VerificationError):
        check_log_proof(read_log_proof(changed), ENTRIES[4], POLICY)
