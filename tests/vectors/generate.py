"""Writes the test vectors: ``python tests/vectors/generate.py``. They follow from fixed seeds.

Happy cases carry what an implementation must compute; mutated ones say ``"error"``: it
must refuse them. All bytes are hex.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from plait.envelope import digest, pae, seal
from plait.identity import peer_id_of
from plait.ledger.bundle import BundleParts, EpochParts, build_bundle
from plait.ledger.checkpoint import sign_checkpoint
from plait.ledger.cosignature import cosign
from plait.ledger.fork import ForkProof, LogFork, ReservationFork, VoucherFork, write_fork_proof
from plait.ledger.handoff import HandoffChain, ids_payload
from plait.ledger.terms import SessionTerms
from plait.ledger.voucher import Transcript
from plait.network_file import Witness
from plait.testing.accounting import (
    END_ID,
    NETWORK_ID,
    NOW_MS,
    PaperSession,
    Plot,
    cert_of,
    key_of,
    paper_network,
)
from plait.testing.course import Cut, PaperCourse
from plait.types import Prices
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation, SessionVoucher, StageReceipt

FOLDER = Path(__file__).parent
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
SESSION = PaperSession(Plot()).play()
PARTS = SESSION.bundle_parts()
EPOCH = PARTS.epochs[0]
COURSE = PaperCourse(
    Plot(
        drawn_ids=(*range(40, 58), END_ID),
        max_tokens=30,
        chunk_tokens=6,
        prices=Prices(prompt=500_000, output=2_000_000, replayed=100_000),
    ),
    (Cut(4, frozenset({1}), beyond=True), Cut(2, frozenset({0, 2}))),
    wrong_every=3,
).play()
"""Three epochs with drafts: the middle stage is lost, then the first and the last."""

Json = dict[str, Any]


def documents() -> dict[str, Json]:
    """Every vector file by name."""
    return {
        "identity.json": identity(),
        "envelope.json": envelopes(),
        "handoff.json": handoffs(),
        "receipt.json": receipts(),
        "voucher.json": vouchers(),
        "bundle.json": bundles(),
        "witness.json": witnesses(),
        "fork.json": forks(),
    }


def identity() -> Json:
    """Keys, peer ids and the edge cases of strict Ed25519."""
    key = key_of("client")
    signature = key.sign(b"message")
    s = int.from_bytes(signature[32:], "little") + GROUP_ORDER
    low = bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")
    one = (1).to_bytes(32, "little")
    over = (2**255 - 19 + 3).to_bytes(32, "little")
    cases = [
        ("honest", key.public, signature, ""),
        ("wrong message", key.public, key.sign(b"other"), "signature does not match"),
        ("s plus group order", key.public, signature[:32] + s.to_bytes(32, "little"), "S is not"),
        ("low-order key", low, signature, "public key"),
        ("neutral key and R, S = 0", one, one + bytes(32), "public key"),
        ("low-order R", key.public, low + signature[32:], "R is"),
        ("non-canonical key", over, signature, "public key"),
        ("non-canonical R", key.public, over + signature[32:], "R is"),
        ("truncated signature", key.public, signature[:63], "wrong length"),
    ]
    names = ("client", "stage 0", "authority")
    return {
        "about": "Ed25519 keys, peer ids, and strict signature verification.",
        "keys": [
            {
                "seed": key_of(name).seed.hex(),
                "public": key_of(name).public.hex(),
                "peer_id": key_of(name).peer_id,
            }
            for name in names
        ],
        "not_peer_ids": [
            "",
            key.peer_id[:-1],
            f"{key.peer_id} ",
            f"{key.peer_id[:-1]}0",
            "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
            peer_id_of(key.public).swapcase(),
        ],
        "signatures": [
            {
                "name": name,
                "public": public.hex(),
                "signature": signed.hex(),
                "message": b"message".hex(),
                "error": error,
            }
            for name, public, signed, error in cases
        ],
    }


def envelopes() -> Json:
    """DSSE pre-authentication encoding, and envelopes happy and mutated."""
    cert = cert_of("stage 0")
    honest = written(cert)
    texts = [("http://example.com/HelloWorld", b"hello world"), ("", b""), ("é", b"\0\xff")]

    def mutated(name: str, **changes: str) -> Json:
        return {"name": name, **honest, **changes, "error": "bad-signature"}

    def resigned(name: str, payload: bytes) -> Json:
        signature = key_of("stage 0").sign(pae(cert.payload_type, payload))
        changes = {"payload": payload.hex(), "signature": signature.hex()}
        return {"name": name, **honest, **changes, "error": "protocol-remote"}

    flipped = bytes([cert.payload[0], cert.payload[1], cert.payload[2] ^ 1, *cert.payload[3:]])
    return {
        "about": "DSSE PAE and SignedEnvelope; every envelope should hold a NodeKeyCert.",
        "pae": [
            {"type": name, "payload": payload.hex(), "pae": pae(name, payload).hex()}
            for name, payload in texts
        ],
        "envelopes": [
            {"name": "honest", **honest, "error": ""},
            mutated("payload bit", payload=flipped.hex()),
            mutated("other type", payload_type="application/vnd.plait.offer.v1"),
            mutated("other signer", signer=key_of("stage 1").public.hex()),
            mutated("empty signature", signature=""),
            resigned("unknown field", cert.payload + b"\x98\x06\x01"),
            resigned("field twice", cert.payload + b"\x30\x01"),
            resigned("default written out", cert.payload + b"\x38\x00"),
            resigned("truncated", cert.payload[:-1]),
        ],
    }


def handoffs() -> Json:
    """Hand-off chains of both ends: ids to stage 0, ids drawn by the last stage."""
    sequence = (*PARTS.prompt_ids, *PARTS.token_ids)
    chains = []
    for boundary in (0, len(SESSION.stages)):
        chain = HandoffChain(SESSION.terms, boundary)
        steps: list[Json] = [{"commit": chain.commit.hex()}]
        draws = 0
        for traversal, first_position, rows, _, sample, _, _ in EPOCH.frames:
            fed = sequence[first_position : first_position + rows]
            ids = fed if boundary == 0 else PARTS.token_ids[draws : draws + sample]
            draws += sample
            payload = ids_payload(ids)
            chain.add(traversal, first_position, len(ids), payload)
            steps.append(
                {
                    "traversal": traversal,
                    "first_position": first_position,
                    "rows": len(ids),
                    "payload": payload.hex(),
                    "commit": chain.commit.hex(),
                }
            )
        chains.append({"boundary": boundary, "steps": steps})
    terms = SESSION.terms
    return {
        "about": "Hand-off commitments. The first step is the start of the chain.",
        "salt": terms.handoff_salt.hex(),
        "session_id": terms.session_id.hex(),
        "epoch": terms.epoch,
        "chains": chains,
    }


def receipts() -> Json:
    """The receipts of one stage, and the second of them with one lie each."""
    own = EPOCH.receipts[1::3]
    lies = {
        "network_id": "other",
        "session_id": bytes(16),
        "epoch": 2,
        "stage_index": 0,
        "chunk": 0,
        "start_layer": 2,
        "end_layer": 5,
        "model_digest": bytes(32),
        "numeric_class": "int4",
        "traversal": 9,
        "prompt_tokens": 6,
        "output_tokens": 2,
        "input_commit": b"",
        "output_commit": bytes(31),
        "previous_digest": bytes(32),
    }
    return {
        "about": "Receipts of stage 1, chunk by chunk; the lies are about chunk 1.",
        "terms": described(SESSION.terms),
        "receipts": [written(receipt) for receipt in own],
        "lies": [
            {
                "field": name,
                **again(own[1], StageReceipt, "stage 1 ledger", setting(name, value)),
                "error": "bad-proof",
            }
            for name, value in lies.items()
        ]
        + [
            {"field": "signer", **again(own[1], StageReceipt, "stage 1"), "error": "bad-signature"},
            {"field": "type", **written(present(EPOCH.voucher)), "error": "bad-signature"},
        ],
    }


def vouchers() -> Json:
    """All vouchers of a session with the transcript they cover, and lies about the last."""
    transcript = Transcript(SESSION.terms)
    start = transcript.value.hex()
    rows = []
    for number, voucher in enumerate(SESSION.vouchers):
        covered = EPOCH.receipts[3 * number : 3 * number + 3]
        transcript.add(covered)
        message = SessionVoucher.FromString(voucher.payload)
        rows.append(
            {
                "receipt_digests": [digest(receipt.payload).hex() for receipt in covered],
                "transcript": transcript.value.hex(),
                "amounts": [item.microcredits for item in message.amounts],
                **written(voucher),
            }
        )

    def lie(name: str, change: Callable[[Any], None], error: str) -> Json:
        return {
            "name": name,
            **again(present(EPOCH.voucher), SessionVoucher, "client ledger", change),
            "error": error,
        }

    return {
        "about": "Vouchers in order; lies replace the last one, as stage 0 sees them.",
        "terms": described(SESSION.terms),
        "transcript_start": start,
        "vouchers": rows,
        "lies": [
            lie("network", setting("network_id", "other"), "protocol-remote"),
            lie("session", setting("session_id", bytes(16)), "protocol-remote"),
            lie("epoch", setting("epoch", 2), "protocol-remote"),
            lie("account", setting("account", key_of("stage 0").peer_id), "protocol-remote"),
            lie("unreceipted chunk", setting("sequence", 5), "protocol-remote"),
            lie("fewer tokens", setting("output_tokens", 7), "protocol-remote"),
            lie("underpaid", lambda m: _pay(m, 1), "protocol-remote"),
            lie("beyond the cap", lambda m: _pay(m, 2**63), "overspend"),
            lie("unpaid", lambda m: m.ClearField("amounts"), "protocol-remote"),
            {
                "name": "signer",
                **again(present(EPOCH.voucher), SessionVoucher, "client"),
                "error": "bad-signature",
            },
        ],
    }


def bundles() -> Json:
    """Bundles with the network file that they are verified against."""
    client = key_of("client")
    bare = replace(PARTS, entries=(), proofs=(), checkpoint=None)
    false_ring = replace(PARTS, prompt_ids=(4, *PARTS.prompt_ids[1:]))
    honest = build_bundle(PARTS, client).decode()
    course = COURSE.bundle_parts()
    return {
        "about": "Bundles, byte for byte, with outcome and the names of the false claims.",
        "network_toml": paper_network().to_toml(),
        "bundles": [
            case("honest", honest, "verified"),
            case("not settled", build_bundle(bare, client).decode(), "incomplete"),
            case("other prompt", build_bundle(false_ring, client).decode(), "false", "ring"),
            case("edited text", honest.replace("Hi “", "Ho “"), "false", "seal"),
            case("new line at the end", honest + "\n", "false", "encoding"),
            case("three epochs", build_bundle(course, client).decode(), "verified"),
            *(
                case(name, build_bundle(lie, client).decode(), outcome, *false_claims)
                for name, lie, outcome, *false_claims in epoch_lies(course)
            ),
        ],
    }


def epoch_lies(course: BundleParts) -> list[tuple[Any, ...]]:
    """Bundles of three epochs with one lie, or one thing missing."""
    first, second, third = course.epochs
    assert first.cut is not None and second.cut is not None

    def epochs(*chosen: EpochParts) -> BundleParts:
        return replace(course, epochs=chosen)

    def receipt_of(index: int, name: str, **changes: int) -> EpochParts:
        message = StageReceipt.FromString(second.receipts[index].payload)
        for field, value in changes.items():
            setattr(message, field, value)
        receipts = list(second.receipts)
        receipts[index] = seal(key_of(f"{name} ledger"), message)
        return replace(second, receipts=tuple(receipts))

    unreplayed = receipt_of(1, "stage 1 of epoch 2", replayed_tokens=0)
    unsigned = replace(second, cut=replace(second.cut, draws=None))
    uncut = replace(first, cut=None)
    unheld = replace(second, reservation=None)
    replayless = replace(third, frames=third.frames[1:])
    return [
        (
            "an epoch left out",
            epochs(first, third),
            "false",
            "succession",
            "epoch 3: offers",
            "frames",
        ),
        ("a cut left out", epochs(uncut, second, third), "false", "frames"),
        ("a replay left out", epochs(first, second, replayless), "false", "frames"),
        (
            "a receipt without its replay",
            epochs(first, unreplayed, third),
            "false",
            "epoch 2: receipts of stage 1",
            "epoch 2: voucher",
        ),
        (
            "no reservation for a new stage",
            epochs(first, unheld, third),
            "false",
            "reservation and grant",
        ),
        ("draws of a cut not signed", epochs(first, unsigned, third), "incomplete"),
    ]


def witnesses() -> Json:
    """Cosignatures, and bundles of a network that asks for two of three."""
    names = [f"witness.example/{number}" for number in range(3)]
    keys = [key_of(name) for name in names]
    network = paper_network(
        witnesses=tuple(Witness(name, key.public) for name, key in zip(names, keys, strict=True)),
        witness_quorum=2,
    )
    note, time_s = str(PARTS.checkpoint), NOW_MS // 1000
    lines = [cosign(key, name, note, time_s) for name, key in zip(names, keys, strict=True)]
    forged = cosign(keys[2], names[2], note.replace("\n6\n", "\n7\n"), time_s)
    bundle = {
        "cosigned": note + lines[0] + lines[2],
        "cosigned by one": note + lines[0],
        "cosigned by one twice": note + lines[0] + cosign(keys[0], names[0], note, time_s + 1),
        "cosigned by a stranger": note + lines[0] + cosign(key_of("x"), names[1], note, time_s),
        "a forged cosignature": note + lines[0] + lines[1] + forged,
    }
    outcomes = ["verified", "incomplete", "incomplete", "incomplete", "false"]
    return {
        "about": "Cosignatures (cosignature/v1) of one checkpoint, and bundles with them.",
        "network_toml": network.to_toml(),
        "note": note,
        "cosignatures": [
            {"name": name, "seed": key.seed.hex(), "time_s": time_s, "line": line}
            for name, key, line in zip(names, keys, lines, strict=True)
        ],
        "bundles": [
            case(
                name,
                build_bundle(replace(PARTS, checkpoint=signed), key_of("client")).decode(),
                outcome,
                *(["witnesses"] if outcome == "false" else []),
            )
            for (name, signed), outcome in zip(bundle.items(), outcomes, strict=True)
        ],
    }


def forks() -> Json:
    """Fork proofs, and what proves nothing."""
    origin, key = paper_network().authorities[0].log_origin, key_of("authority log")
    notes = [sign_checkpoint(key, origin, 7, bytes([root]) * 32) for root in (1, 2)]
    larger = sign_checkpoint(key, origin, 8, bytes([2]) * 32)
    first = present(EPOCH.reservation)
    message = BudgetReservation.FromString(first.payload)
    message.amount += 1
    second = seal(key_of("client ledger"), message)
    message.sequence += 1
    next_one = seal(key_of("client ledger"), message)
    certs = (cert_of("client"), cert_of("client"))
    paid = present(EPOCH.voucher)
    voucher = SessionVoucher.FromString(paid.payload)
    voucher.issued_ms += 1
    other = seal(key_of("client ledger"), voucher)
    voucher.sequence += 1
    later = seal(key_of("client ledger"), voucher)
    proofs: list[tuple[str, ForkProof, str]] = [
        ("two trees", LogFork(origin, (notes[0], notes[1])), paper_network().authorities[0].peer),
        ("two reservations", ReservationFork((first, second), certs), key_of("client").peer_id),
        ("two vouchers", VoucherFork((paid, other), certs), key_of("client").peer_id),
        ("one voucher twice", VoucherFork((paid, paid), certs), ""),
        ("two voucher numbers", VoucherFork((paid, later), certs), ""),
        ("one tree twice", LogFork(origin, (notes[0], notes[0])), ""),
        ("two sizes", LogFork(origin, (notes[0], larger)), ""),
        ("another log", LogFork("other.example", (notes[0], notes[1])), ""),
        ("one reservation twice", ReservationFork((first, first), certs), ""),
        ("two numbers", ReservationFork((first, next_one), certs), ""),
    ]
    return {
        "about": "Fork proofs, byte for byte. Without a culprit they prove nothing.",
        "network_toml": paper_network().to_toml(),
        "proofs": [
            {"name": name, "culprit": culprit, "data": write_fork_proof(proof).decode()}
            for name, proof, culprit in proofs
        ],
    }


def case(name: str, data: str, outcome: str, *false_claims: str) -> Json:
    return {"name": name, "outcome": outcome, "false_claims": false_claims, "data": data}


def described(terms: SessionTerms) -> Json:
    """What a reader needs of the terms."""
    return {
        "network_id": NETWORK_ID,
        "session_id": terms.session_id.hex(),
        "epoch": terms.epoch,
        "client": terms.client,
        "client_ledger_key": terms.client_ledger_key.hex(),
        "model_digest": terms.model_digest.hex(),
        "stages": [
            {
                "peer": stage.peer,
                "ledger_key": stage.ledger_key.hex(),
                "start": stage.span.start,
                "end": stage.span.end,
                "priced_layers": stage.priced_layers,
                "price_prompt": stage.prices.prompt,
                "price_output": stage.prices.output,
                "numeric_class": stage.numeric_class,
            }
            for stage in terms.stages
        ],
    }


def present(envelope: SignedEnvelope | None) -> SignedEnvelope:
    assert envelope is not None
    return envelope


def written(envelope: SignedEnvelope) -> Json:
    return {
        "payload_type": envelope.payload_type,
        "payload": envelope.payload.hex(),
        "signer": envelope.signer.hex(),
        "signature": envelope.signature.hex(),
    }


def again(
    envelope: SignedEnvelope,
    kind: type[Message],
    key: str,
    change: Callable[[Any], None] = lambda message: None,
) -> Json:
    message = kind.FromString(envelope.payload)
    change(message)
    return written(seal(key_of(key), message))


def setting(name: str, value: object) -> Callable[[Any], None]:
    return lambda message: setattr(message, name, value)


def _pay(voucher: SessionVoucher, amount: int) -> None:
    voucher.amounts[0].microcredits = amount


def rendered(document: Json) -> str:
    """The text of a vector file."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, document in documents().items():
        (FOLDER / name).write_text(rendered(document), encoding="utf-8")
