"""Starting from what stages still have: who may, from where, and what a failure makes of it."""

import pytest

from plait.compute.pages import prefix_hashes
from plait.errors import RemoteProtocolError
from plait.ledger.terms import SessionTerms
from plait.testing.stages import CLIENT, PaperClient, PaperSwarm, Rejected
from plait.types import PeerId, Span
from plait.v1 import session_pb2

SPANS = (Span(0, 1), Span(1, 3), Span(3, 4))
PROMPT = tuple(range(1, 41))  # two pages and eight tokens
TOKENS = 12


class Turn(PaperClient):
    """A session that names its pages; ``reusable`` is what each stage said it has."""

    salt = b""
    cached = 0
    names: tuple[bytes, ...] | None = None

    def opening(self, terms: SessionTerms, index: int) -> session_pb2.OpenRequest:
        request = super().opening(terms, index)
        names = prefix_hashes(self.prompt, self.salt) if self.names is None else self.names
        request.prefix_digests.extend(names)
        return request

    def confirmation(
        self, terms: SessionTerms, *, credit: bool = True, granted: bool = True
    ) -> session_pb2.ConfirmRequest:
        request = super().confirmation(terms, credit=credit, granted=granted)
        request.cached_tokens = self.cached if terms.epoch == 1 else 0
        return request

    def reusable(self) -> list[int]:
        stages = (self.swarm.nodes[stage.peer].stage for stage in self.terms.stages)
        return [session.reusable for stage in stages for session in stage.sessions]

    def end(self) -> None:
        """Close and have prompt and answer kept."""
        known = (*self.prompt, *self.drawn)[: self.next_position]
        request = session_pb2.CloseRequest(
            session_id=self.terms.session_id,
            epoch=self.terms.epoch,
            voucher=self.books.voucher,
            prefix_digests=prefix_hashes(known, self.salt),
        )
        for stage in self.terms.stages:
            self.swarm.nodes[stage.peer].stage.close(request, CLIENT)


def pair_of_swarm() -> tuple[PaperSwarm, list[PeerId]]:
    """Two hosts of every span; the first three peers are the first hosts."""
    swarm = PaperSwarm()
    return swarm, [swarm.add(f"{copy}{i}", span) for copy in "ab" for i, span in enumerate(SPANS)]


def turn(
    swarm: PaperSwarm, peers: list[PeerId], name: bytes, prompt: tuple[int, ...], cached: int = 0
) -> Turn:
    client = Turn(swarm, prompt, TOKENS, session=name, chunk_tokens=32)
    client.cached = cached
    client.open(*peers)
    return client


def run(client: Turn) -> list[int]:
    client.prefill(client.cached)
    client.decode(TOKENS - 1)
    return client.drawn


def answered(prompt: tuple[int, ...]) -> list[int]:
    swarm, peers = pair_of_swarm()
    return run(turn(swarm, peers[:3], b"undisturbed", prompt))


def first_turn() -> tuple[PaperSwarm, list[PeerId], tuple[int, ...]]:
    """A swarm that has had a session, and the prompt of the next turn."""
    swarm, peers = pair_of_swarm()
    client = turn(swarm, peers[:3], b"first", PROMPT)
    run(client)
    client.end()
    return swarm, peers, (*PROMPT, *client.drawn, 5, 6, 7, 8, 9, 10)


def test_the_next_turn_starts_behind_prompt_and_answer_and_draws_the_same() -> None:
    swarm, peers, prompt = first_turn()
    client = turn(swarm, peers[:3], b"second", prompt, cached=48)
    assert client.reusable() == [48, 48, 48]
    assert run(client) == answered(prompt)
    assert client.books.counts.cached_prompt == 48
    assert client.books.counts.prompt == len(prompt) - 48
    client.close()
    assert not any(swarm.held().values())


def test_the_prompt_is_published_while_its_session_still_runs() -> None:
    swarm, peers = pair_of_swarm()
    turn(swarm, peers[:3], b"first", PROMPT).prefill()
    client = turn(swarm, peers[:3], b"second", PROMPT, cached=32)
    assert run(client) == answered(PROMPT)


def test_another_salt_another_wire_and_a_stage_that_was_not_there_find_nothing() -> None:
    swarm, peers, prompt = first_turn()
    other = Turn(swarm, prompt, TOKENS, session=b"other user")
    other.salt = b"bob"
    other.open(*peers[:3])
    assert other.reusable() == [0, 0, 0]
    other.close()
    narrow = Turn(swarm, prompt, TOKENS, session=b"narrow", wire_dtype="bf16")
    narrow.open(*peers[:3])
    assert narrow.reusable() == [0, 0, 0]
    narrow.close()
    moved = turn(swarm, [peers[0], peers[4], peers[2]], b"moved", prompt)
    assert moved.reusable() == [48, 0, 48]


@pytest.mark.parametrize("cached", [49, 64, len(PROMPT) + TOKENS + 6])
def test_nobody_starts_beyond_what_a_stage_has(cached: int) -> None:
    swarm, peers, prompt = first_turn()
    with pytest.raises(Rejected, match="are not cached here"):
        turn(swarm, peers[:3], b"second", prompt, cached=cached)


@pytest.mark.parametrize(
    "names", [(b"short",), prefix_hashes(range(1000))], ids=["a short name", "too many"]
)
def test_names_that_cannot_be_are_refused_before_anything_is_held(names: tuple[bytes]) -> None:
    swarm, peers = pair_of_swarm()
    client = Turn(swarm, PROMPT, TOKENS)
    client.names = names
    with pytest.raises(RemoteProtocolError, match="page"):
        client.open(*peers[:3])
    assert not any(swarm.held().values())


@pytest.mark.parametrize("dead", [{0}, {1}, {2}, {0, 1, 2}])
def test_a_session_from_the_cache_is_rebuilt_whole(dead: set[int]) -> None:
    swarm, peers, prompt = first_turn()
    client = turn(swarm, peers[:3], b"second", prompt, cached=48)
    client.prefill(48)
    client.decode(4)
    for index in dead:
        swarm.kill(peers[index])
    swarm.run()
    client.reroute(*[peers[3 + i] if i in dead else peers[i] for i in range(3)])
    # What was taken from a cache was sent to nobody: all before a lost stage compute again.
    rebuilt = [stage.rebuilt for stage in client.terms.stages]
    assert rebuilt == [index <= max(dead) for index in range(3)]
    client.decode(TOKENS - len(client.drawn))
    assert client.drawn == answered(prompt)
    client.close()
    swarm.run()
    assert not any(swarm.held().values())


def test_without_a_result_a_session_from_the_cache_begins_anew() -> None:
    swarm, peers, prompt = first_turn()
    client = turn(swarm, peers[:3], b"second", prompt, cached=48)
    swarm.kill(peers[1])
    client.reroute(peers[0], peers[4], peers[2])
    client.cached = 0
    assert run(client) == answered(prompt)
    assert client.books.counts.cached_prompt == 0
