"""Audits in memory: honest stages are consistent, dishonest ones exposed, tampering refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.compute.port import Done, Work
from plait.compute.wire_formats import rounded
from plait.envelope import open_envelope, seal
from plait.errors import BadProof, CapacityError, PlaitError, VerificationError
from plait.ledger.audit_request import lots_of
from plait.ledger.audit_rules import Finding, Tolerance, judge, tolerance_of
from plait.ledger.audit_wire import Challenge, read_challenge
from plait.ledger.lottery import Lot
from plait.node.auditing import (
    open_tape,
    replay_sampling,
    sign_verdict,
    steps_of,
    verdict_on,
)
from plait.node.replaying import distance, replay
from plait.node.tape import Tape
from plait.testing.accounting import NOW_MS, key_of
from plait.testing.audits import Docket, audit_network, sign_offers
from plait.testing.compute import FakeStage
from plait.testing.stages import AUDIT_WINDOW_MS, PaperClient, PaperSwarm
from plait.types import MILLION, PeerId, Sampling, Span, WireDtype
from plait.v1.ledger_pb2 import StageReceipt
from plait.v1.stage_pb2 import AuditOpening, AuditVerdict

SPANS = (Span(0, 1), Span(1, 3), Span(3, 4))
NAMES = tuple(f"{copy}{index}" for copy in "ab" for index in range(3))
PROMPT = tuple(range(1, 20))
SAMPLED = Sampling(temperature_micros=MILLION, seed=7, end_ids=(0,))


def swarm_of(
    sampling: Sampling = SAMPLED, wire_dtype: WireDtype = "fp32"
) -> tuple[PaperSwarm, Docket, list[PeerId]]:
    """Two hosts of every span, which keep tapes, and a client on the first three."""
    swarm = PaperSwarm(retain_inputs=True)
    peers = [swarm.add(name, SPANS[int(name[1])]) for name in NAMES]
    numeric_class = "0000000000000000/fp32/fake" if wire_dtype == "fp32" else "0/int4/fake/f32/t1"
    offers = sign_offers(swarm, NAMES, numeric_class)
    client = PaperClient(swarm, PROMPT, 30, sampling=sampling, wire_dtype=wire_dtype)
    client.open(*peers[:3])
    return swarm, Docket(client, offers), peers


def finished(wire_dtype: WireDtype = "fp32") -> tuple[PaperSwarm, Docket, list[PeerId]]:
    """A whole session, rejected drafts included, closed."""
    swarm, docket, peers = swarm_of(wire_dtype=wire_dtype)
    _run(docket.client)
    docket.client.close()
    docket.note_epoch()
    return swarm, docket, peers


def _run(client: PaperClient) -> None:
    client.prefill()
    client.decode(5)
    client.draft((1, 2))
    client._unclosed += 1
    client.decode(2)


def audit(
    swarm: PaperSwarm, docket: Docket, lot: Lot, tampered: list[AuditOpening] | None = None
) -> str:
    """Audit a lot with a fresh, honest host of the same layers; returns the verdict."""
    challenge = read_challenge(docket.challenge(lot), audit_network())
    stage = swarm.nodes[challenge.stage.peer]
    openings = tampered or list(open_tape(stage.tape, challenge, stage.peer))
    return _verdict(challenge, openings)


def _verdict(challenge: Challenge, openings: list[AuditOpening]) -> str:
    steps = steps_of(challenge, openings)
    span = challenge.stage.span
    session = challenge.terms.session_id
    findings = replay(
        FakeStage(span),
        session,
        steps,
        span,
        replay_sampling(challenge),
        wire_dtype=challenge.terms.wire_dtype,
    )
    return verdict_on(challenge, findings)[0]


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_every_chunk_of_honest_stages_is_consistent(wire_dtype: WireDtype) -> None:
    swarm, docket, _ = finished(wire_dtype)
    lots = lots_of(docket.parts())
    assert len(lots) == 3 * 5
    assert {audit(swarm, docket, lot) for lot in lots} == {"consistent"}


def test_stages_stay_auditable_through_a_reroute_and_replacements_are_too() -> None:
    swarm, docket, peers = swarm_of()
    client = docket.client
    client.prefill()
    client.decode(6)
    swarm.kill(peers[1])
    swarm.run()
    before = client.terms, client.books
    client.reroute(peers[0], peers[4], peers[2])
    after = client.terms, client.books
    client.terms, client.books = before
    docket.note_epoch()
    client.terms, client.books = after
    client.decode(6)
    client.close()
    docket.note_epoch()
    lots = [lot for lot in lots_of(docket.parts()) if lot.epoch == 2 or lot.stage_index != 1]
    assert {lot.epoch for lot in lots} == {1, 2}
    assert {audit(swarm, docket, lot) for lot in lots} == {"consistent"}


class Cheat(FakeStage):
    """Honest but for one thing, from ``position`` on."""

    position = len(PROMPT)
    bias = 0

    def step(self, batch: list[Work]) -> list[Done]:  # type: ignore[override]
        return [
            self._changed(work, done) for work, done in zip(batch, super().step(batch), strict=True)
        ]

    def _changed(self, work: Work, done: Done) -> Done:
        if work.first_position < self.position or done.hidden is None:
            return done
        return Done(hidden=(done.hidden * np.float32(1.01)).astype(np.float32))


@pytest.mark.parametrize("index", [0, 1])
def test_a_stage_that_changes_its_output_is_exposed_where_it_did(index: int) -> None:
    swarm, docket, peers = swarm_of()
    cheat = Cheat(SPANS[index])
    cheat._sessions = swarm.nodes[peers[index]].compute._sessions
    swarm.nodes[peers[index]].compute = cheat
    _run(docket.client)
    docket.client.close()
    docket.note_epoch()
    for lot in lots_of(docket.parts()):
        # The prompt took three chunks, and there it was honest.
        lied = lot.stage_index == index and lot.chunk >= 3
        assert audit(swarm, docket, lot) == ("exposed" if lied else "consistent"), lot


class StateCheat(FakeStage):
    """A last stage that draws the right ids from final hidden states that are 1 % off."""

    def step(self, batch: list[Work]) -> list[Done]:  # type: ignore[override]
        return [self._off(one) for one in super().step(batch)]

    def _off(self, done: Done) -> Done:
        assert done.hidden is not None
        return replace(done, hidden=(done.hidden * np.float32(1.01)).astype(np.float32))


class LogitCheat(StateCheat):
    """One whose head is off, too little to change an id."""

    def _off(self, done: Done) -> Done:
        if done.drawn is None:
            return done
        totals = tuple(total + 0.01 for total in done.drawn.totals)
        return replace(done, drawn=replace(done.drawn, totals=totals))


class NanCheat(StateCheat):
    """One that says nothing that could be compared."""

    def _off(self, done: Done) -> Done:
        if done.drawn is None:
            return done
        nans = (float("nan"),) * len(done.drawn.ids)
        return replace(done, drawn=replace(done.drawn, logprobs=nans))


@pytest.mark.parametrize("cheat", [StateCheat, LogitCheat, NanCheat])
def test_a_last_stage_is_exposed_by_what_it_draws_from_though_its_ids_are_right(
    cheat: type[FakeStage],
) -> None:
    swarm, docket, peers = swarm_of()
    lying = cheat(SPANS[2])
    lying._sessions = swarm.nodes[peers[2]].compute._sessions
    swarm.nodes[peers[2]].compute = lying
    _run(docket.client)
    docket.client.close()
    docket.note_epoch()
    for lot in lots_of(docket.parts()):
        # A head has nothing to say about the prompt's first two chunks.
        lied = lot.stage_index == 2 and (cheat is StateCheat or lot.chunk >= 2)
        assert audit(swarm, docket, lot) == ("exposed" if lied else "consistent"), lot


def test_draws_that_depend_on_the_prompt_are_judged_by_what_they_were_drawn_from() -> None:
    swarm, docket, _ = swarm_of(replace(SAMPLED, presence_penalty_micros=MILLION))
    _run(docket.client)
    docket.client.close()
    docket.note_epoch()
    challenge = read_challenge(docket.challenge(Lot(1, 3, 2)), audit_network())
    assert replay_sampling(challenge) == Sampling()
    stage = swarm.nodes[challenge.stage.peer]
    steps = steps_of(challenge, list(open_tape(stage.tape, challenge, stage.peer)))
    assert not any(step.judge_draws for step in steps)
    assert audit(swarm, docket, Lot(1, 3, 2)) == "consistent"


def test_a_wrong_seed_is_exposed_at_the_last_stage_only() -> None:
    swarm, docket, peers = swarm_of()
    held = swarm.nodes[peers[2]].compute._sessions[docket.client.terms.session_id]
    held.sampling = Sampling(temperature_micros=MILLION, seed=8, end_ids=(0,))
    _run(docket.client)
    docket.client.close()
    docket.note_epoch()
    lots = lots_of(docket.parts())
    exposed = {lot for lot in lots if audit(swarm, docket, lot) == "exposed"}
    # The first two chunks of the prompt draw nothing.
    assert exposed == {lot for lot in lots if lot.stage_index == 2 and lot.chunk >= 2}


@pytest.mark.parametrize("index", [1, 2])
def test_what_is_opened_must_be_what_was_committed_to(index: int) -> None:
    swarm, docket, peers = finished()
    lot = Lot(1, 3, index)
    challenge = read_challenge(docket.challenge(lot), audit_network())
    honest = list(open_tape(swarm.nodes[peers[index]].tape, challenge, peers[index]))
    assert _verdict(challenge, honest) == "consistent"
    changes = (_flip, _drop_bytes, _drop_frame, _other_position, _swap, _other_epoch, _flip_state)
    for change in changes:
        openings = [AuditOpening.FromString(part.SerializeToString()) for part in honest]
        change(openings[0])
        with pytest.raises(BadProof):
            _verdict(challenge, openings)


def _tape(swarm: PaperSwarm, peer: PeerId) -> Tape:
    tape = swarm.nodes[peer].tape
    assert tape is not None
    return tape


def _flip(part: AuditOpening) -> None:
    data = bytearray(part.sent[-1].payload)
    data[0] ^= 1
    part.sent[-1].payload = bytes(data)


def _drop_bytes(part: AuditOpening) -> None:
    part.sent[-1].ClearField("payload")


def _drop_frame(part: AuditOpening) -> None:
    del part.received[0]


def _other_position(part: AuditOpening) -> None:
    part.received[-1].first_position += 1


def _flip_state(part: AuditOpening) -> None:
    if part.states:
        part.states[-1].payload = bytes(len(part.states[-1].payload))
    else:
        part.states.append(part.sent[-1])


def _swap(part: AuditOpening) -> None:
    part.sent[0].payload_digest, part.sent[-1].payload_digest = (
        part.sent[-1].payload_digest,
        part.sent[0].payload_digest,
    )


def _other_epoch(part: AuditOpening) -> None:
    part.epoch = 2


def test_a_stint_that_began_from_a_cache_is_not_opened() -> None:
    swarm, docket, peers = finished()
    lot = Lot(1, 3, 1)
    message = docket.challenge(lot)
    receipt = open_envelope(message.epochs[-1].receipt, StageReceipt)
    receipt.cached_prompt_tokens = 16
    key = swarm.nodes[peers[1]].settlement.key
    message.epochs[-1].receipt.CopyFrom(seal(key, receipt))
    with pytest.raises(BadProof, match="cached positions"):
        read_challenge(message, audit_network())


def test_only_what_the_lottery_drew_is_opened_and_only_for_its_client() -> None:
    swarm, docket, peers = finished()
    lots = lots_of(docket.parts())
    drawn = 0
    for lot in lots:
        try:
            read_challenge(docket.challenge(lot), audit_network(rate_percent=30))
            drawn += 1
        except BadProof as error:
            assert "lottery" in str(error)
    assert 0 < drawn < len(lots)

    message = docket.challenge(lots[0])
    message.nonce = bytes(32)
    with pytest.raises(BadProof, match="nonce"):
        read_challenge(message, audit_network())

    challenge = read_challenge(docket.challenge(Lot(1, 0, 1)), audit_network())
    with pytest.raises(BadProof, match="another stage"):
        list(open_tape(swarm.nodes[peers[0]].tape, challenge, peers[0]))
    _tape(swarm, peers[1])._sessions[docket.client.terms.session_id].commitment = bytes(32)
    with pytest.raises(BadProof, match="commitment"):
        list(open_tape(swarm.nodes[peers[1]].tape, challenge, peers[1]))


@pytest.mark.parametrize("field", ["entry", "voucher", "path", "growth", "checkpoint"])
def test_each_part_of_the_anchor_counts(field: str) -> None:
    _, docket, _ = finished()
    message = docket.challenge(Lot(1, 0, 0))
    if field in ("path", "growth"):
        del getattr(message.anchor, field)[0]
    elif field == "voucher":
        message.anchor.voucher.signature = bytes(64)
    else:
        message.anchor.ClearField(field)
    with pytest.raises(PlaitError):
        read_challenge(message, audit_network())


def test_the_receipts_must_be_of_the_stage_that_the_route_names() -> None:
    _, docket, _ = finished()
    message, other = docket.challenge(Lot(1, 1, 0)), docket.challenge(Lot(1, 1, 1))
    message.epochs[0].previous.CopyFrom(other.epochs[0].previous)
    with pytest.raises(VerificationError):
        read_challenge(message, audit_network())
    message = docket.challenge(Lot(1, 1, 0))
    message.offer.CopyFrom(other.offer)
    with pytest.raises(VerificationError):
        read_challenge(message, audit_network())
    message = docket.challenge(Lot(1, 2, 0))
    message.epochs[0].previous.CopyFrom(docket.challenge(Lot(1, 1, 0)).epochs[0].previous)
    with pytest.raises(BadProof, match="one before"):
        read_challenge(message, audit_network())


def test_the_tape_is_forgotten_after_the_window_and_not_before() -> None:
    swarm, docket, peers = finished()
    lot = Lot(1, 2, 0)
    swarm.pass_time(AUDIT_WINDOW_MS - 1)
    assert audit(swarm, docket, lot) == "consistent"
    swarm.pass_time(1)
    with pytest.raises(CapacityError):
        audit(swarm, docket, lot)
    assert _tape(swarm, peers[0]).bytes_kept == 0


def test_the_judgement_is_by_the_worst_and_nan_is_no_excuse() -> None:
    tolerance = Tolerance(1e-4, 1e-3)
    assert judge([Finding(0, 1e-4, 1e-3)], tolerance) is None
    for bad in (Finding(3, 2e-4), Finding(3, margin=2e-3), Finding(3, float("nan"))):
        assert judge([Finding(0), bad], tolerance) == bad
    assert tolerance_of("abc/fp32/hf/f32/t1").distance < tolerance_of("abc/bf16/x").distance
    with pytest.raises(BadProof):
        tolerance_of("abc/fp99/hf")
    with pytest.raises(BadProof):
        tolerance_of("abc/fp99/mlas-w4a8/f32/t1")
    for kernel in ("mlas-w4a8", "ggml-w4a8", "ggml-w4a8-v2"):
        rounds = tolerance_of(f"abc/int4/{kernel}/f32/t1")
        assert rounds.distance > tolerance_of("abc/int4/torch-int4pack32/f32/t1").distance
    nan = np.full((1, 4), np.nan, np.float32)
    assert distance(nan, np.ones((1, 4), np.float32)) == float("inf")


def test_the_verdict_is_signed_and_holds_what_was_found() -> None:
    _, docket, _ = finished()
    challenge = read_challenge(docket.challenge(Lot(1, 1, 1)), audit_network())
    key = key_of("auditor ledger")
    envelope = sign_verdict(
        key, key_of("auditor").peer_id, challenge, "exposed", Finding(4, 0.5), "why", NOW_MS
    )
    verdict = AuditVerdict.FromString(envelope.payload)
    assert (verdict.chunk, verdict.stage_index, verdict.position) == (1, 1, 4)
    assert verdict.distance_ppb == 500_000_000 and verdict.reason == "why"


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-4, 3e-2, 1e-1]),
    st.sampled_from(["bf16", "int8"]),
    st.sampled_from(["even", "one-hot", "wide"]),
)
def test_rounding_for_the_wire_exposes_no_honest_row(
    seed: int, off: float, wire: WireDtype, kind: str
) -> None:
    """Rows that are just within a class stay within its tolerance once they are encoded."""
    chance = np.random.default_rng(seed)
    replayed = chance.standard_normal((3, 64))
    if kind == "one-hot":  # where int8 loses most: one number decides the scale of its group
        replayed = replayed * 0.45 / 127 + np.eye(64)[[0, 31, 40]]
    elif kind == "wide":
        replayed *= np.exp(chance.uniform(-8, 8, (3, 64)))
    noise = chance.standard_normal((3, 64))
    size = np.linalg.norm(replayed, axis=1) / np.linalg.norm(noise, axis=1)
    noise *= 0.999 * off * size[:, None]
    claimed = (replayed + noise).astype(np.float32)
    dtype = {1e-4: "fp32", 3e-2: "int4", 1e-1: "int8"}[off]
    tolerance = tolerance_of(f"w/{dtype}/k/f32/t1", wire)
    found = distance(rounded(claimed, wire), rounded(replayed.astype(np.float32), wire))
    assert found <= tolerance.distance
    assert tolerance.margin == tolerance_of(f"w/{dtype}").margin


def test_a_wire_adds_what_its_rounding_can_move() -> None:
    bounds = [tolerance_of("w/int4/k", wire).distance for wire in ("fp32", "bf16", "int8")]
    assert bounds == pytest.approx([0.03, 0.0381, 0.0770], rel=0.002)
