"""The published vectors, read as another implementation would read them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from plait.envelope import digest, open_envelope, pae
from plait.errors import BadSignature, PlaitError
from plait.identity import SigningKey, peer_id_of, public_key_of, verify
from plait.ledger.handoff import HandoffChain
from plait.ledger.receipt import ChunkClose, check_receipt
from plait.ledger.verify import verify_bundle
from plait.ledger.voucher import Transcript
from plait.network_file import parse_network_file
from plait.testing.accounting import PaperSession, Plot
from plait.types import TokenCounts
from plait.v1.identity_pb2 import NodeKeyCert, SignedEnvelope
from plait.v1.ledger_pb2 import StageReceipt

FOLDER = Path(__file__).parents[1] / "vectors"


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def envelope(case: Any) -> SignedEnvelope:
    return SignedEnvelope(
        payload_type=case["payload_type"],
        payload=bytes.fromhex(case["payload"]),
        signer=bytes.fromhex(case["signer"]),
        signature=bytes.fromhex(case["signature"]),
    )


def code_of(action: Any) -> str:
    """The error code of an action; empty if it succeeds."""
    try:
        action()
    except PlaitError as error:
        return error.code
    return ""


@pytest.mark.slow
def test_the_files_are_what_the_generator_writes() -> None:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, document in generate.documents().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == generate.rendered(document), name


def test_identity() -> None:
    vectors = load("identity.json")
    for key in vectors["keys"]:
        public = SigningKey.from_seed(bytes.fromhex(key["seed"])).public
        assert public.hex() == key["public"]
        assert peer_id_of(public) == key["peer_id"]
        assert public_key_of(key["peer_id"]) == public
    for text in vectors["not_peer_ids"]:
        with pytest.raises(ValueError, match=r"."):
            public_key_of(text)
    for case in vectors["signatures"]:
        arguments = [bytes.fromhex(case[name]) for name in ("public", "signature", "message")]
        if case["error"]:
            with pytest.raises(BadSignature, match=case["error"]):
                verify(*arguments)
        else:
            verify(*arguments)


def test_envelopes() -> None:
    vectors = load("envelope.json")
    for case in vectors["pae"]:
        assert pae(case["type"], bytes.fromhex(case["payload"])).hex() == case["pae"]
    for case in vectors["envelopes"]:
        sealed = envelope(case)
        assert code_of(lambda s=sealed: open_envelope(s, NodeKeyCert)) == case["error"], case[
            "name"
        ]


def test_handoffs() -> None:
    vectors = load("handoff.json")
    terms = PaperSession(Plot()).terms
    assert vectors["salt"] == terms.handoff_salt.hex()
    assert vectors["session_id"] == terms.session_id.hex()
    for case in vectors["chains"]:
        chain = HandoffChain(terms, case["boundary"])
        start, *steps = case["steps"]
        assert chain.commit.hex() == start["commit"]
        for step in steps:
            payload = bytes.fromhex(step["payload"])
            chain.add(step["traversal"], step["first_position"], step["rows"], payload)
            assert chain.commit.hex() == step["commit"]


def test_receipts() -> None:
    vectors = load("receipt.json")
    terms = PaperSession(Plot()).terms
    closes = [
        ChunkClose(
            chunk, receipt.traversal, TokenCounts(receipt.prompt_tokens, receipt.output_tokens)
        )
        for chunk, receipt in enumerate(
            StageReceipt.FromString(bytes.fromhex(case["payload"])) for case in vectors["receipts"]
        )
    ]
    previous = b""
    before = [previous]
    for case, close in zip(vectors["receipts"], closes, strict=True):
        check_receipt(envelope(case), terms, 1, close, previous)
        previous = digest(bytes.fromhex(case["payload"]))
        before.append(previous)
    for lie in vectors["lies"]:
        sealed = envelope(lie)
        code = code_of(lambda s=sealed: check_receipt(s, terms, 1, closes[1], before[1]))
        assert code == lie["error"], lie["field"]


def test_vouchers() -> None:
    vectors = load("voucher.json")
    session = PaperSession(Plot())
    transcript = Transcript(session.terms)
    assert transcript.value.hex() == vectors["transcript_start"]
    books = session.stages[0]
    closing = iter(vectors["vouchers"])
    for frame in session.frames:
        receipts = session.traverse(frame)
        if not receipts:
            continue
        transcript.add(receipts)
        case = next(closing)
        assert transcript.value.hex() == case["transcript"]
        if case is vectors["vouchers"][-1]:
            for lie in vectors["lies"]:
                sealed = envelope(lie)
                code = code_of(lambda s=sealed: books.accept_voucher(s))
                assert code == lie["error"], lie["name"]
        session.pay(receipts, frame[0])
        assert books.voucher == envelope(case)
        assert books.earned == case["amounts"][0]


def test_bundles() -> None:
    vectors = load("bundle.json")
    network = parse_network_file(vectors["network_toml"].encode())
    for case in vectors["bundles"]:
        report = verify_bundle(case["data"].encode(), network)
        assert report.outcome == case["outcome"], case["name"]
        false_claims = [claim.name for claim in report.claims if claim.ok is False]
        assert false_claims == case["false_claims"], case["name"]
