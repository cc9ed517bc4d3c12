"""A bundle computed again: the right ids are confirmed, one that was changed is found."""

from dataclasses import replace

import pytest

from plait.compute.bundle_replay import dtype_of, replay_bundle
from plait.errors import BadProof
from plait.ledger.bundle import BundleParts, build_bundle
from plait.ledger.verify import verify_bundle
from plait.ledger.verify_frames import check_frames
from plait.testing.accounting import PaperSession, Plot, key_of, paper_network
from plait.testing.compute import FakeStage
from plait.testing.course import PaperCourse
from plait.testing.reference import run_pipeline
from plait.types import Sampling, Span

PROMPT = (5, 6, 7, 8, 9)


def drawn_by_the_fake() -> tuple[int, ...]:
    """What the fake model draws greedily after the prompt."""
    return tuple(run_pipeline([FakeStage(Span(0, 4))], PROMPT, 8).tokens)


def bundle_of(drawn: tuple[int, ...]) -> BundleParts:
    plot = Plot(spans=(Span(0, 2), Span(2, 4)), prompt_ids=PROMPT, drawn_ids=drawn, max_tokens=8)
    return PaperSession(plot).play().bundle_parts()


def fake_for(parts: BundleParts) -> FakeStage:
    shape = replace(FakeStage(Span(0, 4)).shape, digest=parts.terms.model_digest)
    return FakeStage(Span(0, 4), shape)


def test_the_ids_are_confirmed_and_a_changed_one_is_named() -> None:
    right = drawn_by_the_fake()
    parts = bundle_of(right)
    found = replay_bundle(parts, check_frames(parts), Sampling(), fake_for(parts))
    assert (found.exact, found.ids, found.margin) == (8, 8, 0.0)

    wrong = (*right[:4], right[4] ^ 1, *right[5:])
    parts = bundle_of(wrong)
    with pytest.raises(BadProof, match=f"position {len(PROMPT) + 4} "):
        replay_bundle(parts, check_frames(parts), Sampling(), fake_for(parts))
    with pytest.raises(BadProof, match="another model"):
        replay_bundle(parts, check_frames(parts), Sampling(), FakeStage(Span(0, 4)))


def test_what_came_from_caches_is_computed_too() -> None:
    prompt = tuple(range(5, 45))
    drawn = tuple(run_pipeline([FakeStage(Span(0, 4))], prompt, 8).tokens)
    plot = Plot(spans=(Span(0, 2), Span(2, 4)), prompt_ids=prompt, drawn_ids=drawn, max_tokens=8)
    parts = PaperCourse(plot, cached=32).play().bundle_parts()
    found = replay_bundle(parts, check_frames(parts), Sampling(), fake_for(parts))
    assert (found.exact, found.margin) == (8, 0.0)

    def replayed(parts: BundleParts, frames: object, sampling: Sampling) -> str:
        return "all of it"

    data = build_bundle(parts, key_of("client"))
    for how, notes in ((None, 1), (replayed, 0)):
        report = verify_bundle(data, paper_network(), how)
        assert report.outcome == "verified"
        assert sum("first 32 positions" in note for note in report.unchecked) == notes


def test_verify_claims_the_replay_and_says_what_it_leaves_open() -> None:
    data = build_bundle(bundle_of(drawn_by_the_fake()), key_of("client"))

    def replayed(parts: BundleParts, frames: object, sampling: Sampling) -> str:
        found = replay_bundle(parts, check_frames(parts), sampling, fake_for(parts))
        return f"all {found.ids} ids"

    def refuted(parts: BundleParts, frames: object, sampling: Sampling) -> str:
        raise BadProof("the id at position 9 is off")

    plain, good, bad = (
        verify_bundle(data, paper_network(), how) for how in (None, replayed, refuted)
    )
    assert plain.outcome == good.outcome == "verified"
    assert [claim.ok for claim in good.claims if claim.name == "replay"] == [True]
    assert any("the draw" in item for item in plain.unchecked)
    assert not any("the draw" in item for item in good.unchecked)
    assert bad.outcome == "false" and any("the draw" in item for item in bad.unchecked)


def test_stages_of_several_dtypes_cannot_be_replayed_as_one() -> None:
    parts = bundle_of(drawn_by_the_fake())
    assert dtype_of(parts) == "fp32"
    [epoch] = parts.epochs
    first, second = epoch.terms.stages
    mixed = (first, replace(second, numeric_class="paper/int4/x"))
    terms = replace(epoch.terms, stages=mixed)
    with pytest.raises(BadProof, match="one dtype"):
        dtype_of(replace(parts, epochs=(replace(epoch, terms=terms),)))
