"""The check in JavaScript (docs/verify.js) comes to the result of the one in Python."""

import base64
import hashlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from plait.envelope import pae
from plait.ledger.bundle import build_bundle
from plait.ledger.cosignature import cosign
from plait.ledger.verify import verify_bundle
from plait.network_file import NetworkFile, Witness, parse_network_file
from plait.testing.accounting import NOW_MS, PaperSession, Plot, key_of, paper_network
from plait.testing.course import Cut, PaperCourse
from plait.types import WireDtype
from plait.v1.identity_pb2 import SignedEnvelope

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"
SCRIPT = TESTS / "vectors" / "verify.cjs"
PAGE_SCRIPT = TESTS / "vectors" / "page.cjs"
NODE = shutil.which("node")
NODE_MAJOR_MIN = 20
PARTS = PaperSession(Plot()).play().bundle_parts()
EPOCH = PARTS.epochs[0]
DATA = build_bundle(PARTS, key_of("client"))


def node_major() -> int:
    if NODE is None:
        return 0
    shown = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout
    return int(shown.removeprefix("v").partition(".")[0])


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        node_major() < NODE_MAJOR_MIN,
        reason=f"needs node {NODE_MAJOR_MIN} or newer for its Web Crypto",
    ),
]


def run_node(script: Path, *arguments: str, text: str = "") -> str:
    assert NODE is not None
    command = [NODE, "--no-warnings", str(script), *arguments]
    finished = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def agree(network: NetworkFile, bundles: Sequence[bytes]) -> list[str]:
    """Check each bundle with both programs; returns the outcomes, which must be the same."""
    encoded = [base64.b64encode(data).decode() for data in bundles]
    asked = json.dumps({"network_toml": network.to_toml(), "bundles": encoded})
    outcomes: list[str] = []
    for data, theirs in zip(
        bundles, json.loads(run_node(SCRIPT, text=asked))["reports"], strict=True
    ):
        ours = verify_bundle(data, network)
        claims = [(claim["name"], claim["ok"]) for claim in theirs["claims"]]
        assert not any(claim["detail"].startswith("internal") for claim in theirs["claims"])
        assert claims == [(claim.name, claim.ok) for claim in ours.claims], theirs["claims"]
        assert (theirs["outcome"], theirs["unchecked"]) == (ours.outcome, list(ours.unchecked))
        outcomes.append(ours.outcome)
    return outcomes


@pytest.mark.parametrize("wire_dtype", ["bf16", "int8"])
def test_a_session_with_less_than_fp32_on_its_wire(wire_dtype: WireDtype) -> None:
    parts = PaperSession(Plot(wire_dtype=wire_dtype)).play().bundle_parts()
    epoch = parts.epochs[0]
    lies = []
    for other in get_args(WireDtype):
        terms = replace(epoch.terms, wire_dtype=other)
        lied = replace(parts, epochs=(replace(epoch, terms=terms),))
        lies.append(build_bundle(lied, key_of("client")))
    wanted = ["verified" if one == wire_dtype else "false" for one in get_args(WireDtype)]
    assert agree(paper_network(), lies) == wanted


@pytest.mark.parametrize("name", ["bundle.json", "witness.json"])
def test_the_published_bundles(name: str) -> None:
    vectors = json.loads((TESTS / "vectors" / name).read_text(encoding="utf-8"))
    network = parse_network_file(vectors["network_toml"].encode())
    outcomes = agree(network, [case["data"].encode() for case in vectors["bundles"]])
    assert outcomes == [case["outcome"] for case in vectors["bundles"]]


def test_the_published_signatures() -> None:
    vectors = json.loads((TESTS / "vectors" / "identity.json").read_text(encoding="utf-8"))
    cases = vectors["signatures"]
    asked = {
        "network_toml": paper_network().to_toml(),
        "bundles": [],
        "signatures": [[case["public"], case["signature"], case["message"]] for case in cases],
    }
    answers = json.loads(run_node(SCRIPT, text=json.dumps(asked)))["signatures"]
    for case, answer in zip(cases, answers, strict=True):
        assert bool(answer) == bool(case["error"]), case["name"]
        assert case["error"] in answer, case["name"]


def test_two_hundred_flipped_bits() -> None:
    rng = random.Random(5)
    bundles = []
    for _ in range(200):
        damaged = bytearray(DATA)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        bundles.append(bytes(damaged))
    assert set(agree(paper_network(), bundles)) == {"false"}


SIGNERS = {
    "session_open": ["client ledger"],
    "stage_certs": ["stage 0", "stage 1", "stage 2"],
    "offers": ["stage 0", "stage 1", "stage 2"],
    "reservation": ["client ledger"],
    "grant": ["authority ledger"],
    "receipts": ["stage 0 ledger", "stage 1 ledger", "stage 2 ledger"] * 4,
    "voucher": ["client ledger"],
}


def damaged_payloads(rng: random.Random, count: int) -> Iterator[bytes]:
    """Bundles with one signed payload damaged, then signed and sealed again by its signer."""
    for _ in range(count):
        name = rng.choice(list(SIGNERS))
        value = getattr(EPOCH, name)
        envelopes = [value] if isinstance(value, SignedEnvelope) else list(value)
        at = rng.randrange(len(envelopes))
        old, key = envelopes[at], key_of(SIGNERS[name][at])
        payload = bytearray(old.payload)
        position = rng.randrange(len(payload))
        match rng.randrange(3):
            case 0:
                payload[position] ^= 1 << rng.randrange(8)
            case 1:
                del payload[position]
            case _:
                payload.insert(position, rng.randrange(256))
        envelopes[at] = SignedEnvelope(
            payload_type=old.payload_type,
            payload=bytes(payload),
            signer=key.public,
            signature=key.sign(pae(old.payload_type, bytes(payload))),
        )
        new: Any = envelopes[0] if isinstance(value, SignedEnvelope) else tuple(envelopes)
        changes: dict[str, Any] = {name: new}
        yield build_bundle(replace(PARTS, epochs=(replace(EPOCH, **changes),)), key_of("client"))


def test_damage_that_was_signed() -> None:
    outcomes = agree(paper_network(), list(damaged_payloads(random.Random(6), 120)))
    assert outcomes.count("false") > 100


def loaded(name: str) -> Any:
    """Another test module, for the lies that it knows."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_lie_that_python_knows() -> None:
    module = loaded("test_ledger_verify")
    bundles = [build_bundle(lie(), key_of("client")) for _, lie in module.LIES]
    assert len(bundles) > 100
    assert set(agree(module.NETWORK, bundles)) == {"false"}


def test_escrow_and_the_lies_about_it() -> None:
    module = loaded("test_ledger_escrow")
    whole = [build_bundle(module.PARTS, key_of("client"))]
    lies = [build_bundle(lie(), key_of("client")) for lie in module.LIES]
    assert agree(paper_network(), whole + lies) == ["verified"] + ["false"] * len(lies)


def test_every_lie_about_epochs() -> None:
    module = loaded("test_ledger_epoch_lies")
    assert agree(module.NETWORK, [module.DATA]) == ["verified"]
    bundles = [lie() for _, lie in module.LIES]
    assert len(bundles) > 90
    assert set(agree(module.NETWORK, bundles)) == {"false"}


@pytest.mark.parametrize("damage", ["mutated", "signed_damage"])
def test_damage_to_several_epochs(damage: str) -> None:
    module, rng = loaded("test_ledger_epoch_lies"), random.Random(9)
    agree(module.NETWORK, [getattr(module, damage)(rng) for _ in range(150)])


def test_two_hundred_flipped_bits_of_several_epochs() -> None:
    module, rng = loaded("test_ledger_epoch_lies"), random.Random(10)
    bundles = []
    for _ in range(200):
        damaged = bytearray(module.DATA)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        bundles.append(bytes(damaged))
    assert set(agree(module.NETWORK, bundles)) == {"false"}


def test_witnesses() -> None:
    witnesses = tuple(Witness(f"w{i}.example", key_of(f"witness {i}").public) for i in range(3))
    network = paper_network(witnesses=witnesses, witness_quorum=2)
    note = str(PARTS.checkpoint)
    lines = [cosign(key_of(f"witness {i}"), f"w{i}.example", note, NOW_MS // 1000) for i in (0, 1)]
    forged = cosign(key_of("witness 2"), "w1.example", note, 7)
    wrong = lines[1][:-8] + ("AAAAAA=\n" if lines[1].endswith("=\n") else "AAAAAAA\n")
    notes = [note, note + lines[0], note + lines[0] * 2, note + "".join(lines)]
    notes += [note + lines[0] + forged, note + lines[0] + wrong]
    bundles = [
        build_bundle(replace(PARTS, checkpoint=item), key_of("client")) for item in (*notes, None)
    ]
    expected = ["incomplete"] * 3 + ["verified", "incomplete", "false", "incomplete"]
    assert agree(network, bundles) == expected


def test_a_share_of_an_account_paid() -> None:
    parts = PaperSession(Plot(sub_account="team")).play().bundle_parts()
    assert agree(paper_network(), [build_bundle(parts, key_of("client"))]) == ["verified"]


def test_an_allowlist_and_a_large_number() -> None:
    closed = paper_network(admission="allowlist")
    peers = frozenset({PARTS.terms.client, *(stage.peer for stage in EPOCH.terms.stages)})
    assert agree(closed, [DATA]) == ["false"]
    assert agree(replace(closed, allowed_peers=peers), [DATA]) == ["verified"]
    late = replace(PARTS, sealed_ms=2**60)
    assert agree(paper_network(), [build_bundle(late, key_of("client"))]) == ["verified"]


def test_the_page_shows_claims(tmp_path: Path) -> None:
    network = paper_network()
    network.save(tmp_path / "network.toml", key_of("founder"))
    (tmp_path / "bundle").write_bytes(DATA)
    shown = run_node(PAGE_SCRIPT, str(tmp_path))
    assert "✔ network file: signed by its founder" in shown
    assert "✔ ring: " in shown
    assert shown.index("Not checked") < shown.index("– the computation") < shown.index("Outcome")
    assert shown.rstrip().endswith("Outcome: verified")
    (tmp_path / "network.toml").write_text(network.to_toml() + "# changed\n")
    assert "✘ the signature is for another network file" in run_node(PAGE_SCRIPT, str(tmp_path))
    (tmp_path / "network.toml.sig").unlink()
    assert "you yourself vouch" in run_node(PAGE_SCRIPT, str(tmp_path))


def test_the_page_may_load_nothing_but_its_script() -> None:
    page = (DOCS / "verify.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'self' file:; style-src 'sha256-{digest}'" in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["verify.js"]
    script = (DOCS / "verify.js").read_text(encoding="utf-8")
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|innerHTML|eval\(", script)


@pytest.mark.parametrize("cuts", [(), (Cut(2, frozenset({1})),)], ids=["whole", "rerouted"])
def test_a_session_that_began_from_caches(cuts: tuple[Cut, ...]) -> None:
    """Both say what nobody can replay; a start that is not the stages' is false in both."""
    plot = Plot(prompt_ids=tuple(range(3, 60)))
    parts = PaperCourse(plot, cuts, cached=48).play().bundle_parts()
    data = build_bundle(parts, key_of("client"))
    said = [note for note in verify_bundle(data, paper_network()).unchecked if "48" in note]
    assert len(said) == 1
    assert "no audit can look" in said[0]
    first = parts.epochs[0]
    frames = tuple(
        (f[0], f[1] - 16, f[2] + 16, *f[3:]) if i == 0 else f for i, f in enumerate(first.frames)
    )
    lied = replace(parts, epochs=(replace(first, frames=frames), *parts.epochs[1:]))
    both = [data, build_bundle(lied, key_of("client"))]
    assert agree(paper_network(), both) == ["verified", "false"]
