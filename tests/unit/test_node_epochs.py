"""Reroutes: an epoch is frozen, a stage is replaced, its cache is rebuilt, tokens stay the same."""

from dataclasses import replace

import pytest

from plait.errors import RemoteProtocolError
from plait.testing.stages import CLIENT, Faulted, PaperClient, PaperSwarm, Rejected
from plait.types import PeerId, Span, WireDtype
from plait.v1 import session_pb2, stage_pb2

SPANS = (Span(0, 1), Span(1, 2), Span(2, 3), Span(3, 4))
PROMPT = tuple(range(1, 20))
TOKENS = 24


def swarm_of(
    *, memory: int = 10**6, retain_inputs: bool = False
) -> tuple[PaperSwarm, list[PeerId]]:
    """Two hosts of every span; the first four peers are the first hosts."""
    swarm = PaperSwarm(memory=memory)
    peers = [swarm.add(f"{copy}{i}", span) for copy in "ab" for i, span in enumerate(SPANS)]
    return swarm, peers


def undisturbed(wire_dtype: WireDtype = "fp32") -> list[int]:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32, wire_dtype=wire_dtype)
    client.open(*peers[:4])
    client.prefill()
    client.decode(TOKENS - 1)
    client.close()
    assert not any(swarm.held().values()), swarm.held()
    return client.drawn


EXPECTED = undisturbed()


@pytest.mark.parametrize("memory", [10**6, 0], ids=["memory", "spilled"])
@pytest.mark.parametrize("dead", [{0}, {1}, {3}, {1, 2}, {0, 1}, {2, 3}, {0, 3}, {0, 1, 2, 3}])
def test_any_stages_can_be_replaced_and_no_token_changes(dead: set[int], memory: int) -> None:
    swarm, peers = swarm_of(memory=memory)
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    client.decode(7)
    for index in dead:
        swarm.kill(peers[index])
    swarm.run()
    client.reroute(*[peers[4 + i] if i in dead else peers[i] for i in range(4)])
    client.decode(TOKENS - len(client.drawn))
    assert client.drawn == EXPECTED
    client.close()
    swarm.run()
    assert not any(swarm.held().values()), swarm.held()


@pytest.mark.parametrize("memory", [10**6, 0], ids=["memory", "spilled"])
@pytest.mark.parametrize("dead", [{1}, {0, 3}, {1, 2}])
def test_a_stage_is_rebuilt_from_the_bytes_that_crossed(dead: set[int], memory: int) -> None:
    """The paper model draws otherwise after any other rounding, so a replay of anything but
    the retained bytes would show."""
    expected = undisturbed("bf16")
    assert expected != EXPECTED
    swarm, peers = swarm_of(memory=memory)
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32, wire_dtype="bf16")
    client.open(*peers[:4])
    client.prefill()
    client.decode(7)
    for index in dead:
        swarm.kill(peers[index])
    swarm.run()
    client.reroute(*[peers[4 + i] if i in dead else peers[i] for i in range(4)])
    client.decode(TOKENS - len(client.drawn))
    assert client.drawn == expected
    client.close()


def test_a_session_keeps_what_is_on_its_wire() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32, wire_dtype="bf16")
    client.open(*peers[:4])
    client.prefill()
    client.decode(3)
    swarm.kill(peers[1])
    swarm.run()
    client.terms = replace(client.terms, wire_dtype="fp32")
    with pytest.raises(RemoteProtocolError, match="its model and its sizes"):
        client.reroute(peers[0], peers[5], peers[2], peers[3])


def test_a_width_that_does_not_divide_is_refused_for_int8() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, wire_dtype="int8")
    with pytest.raises(Rejected, match="do not go in int8"):
        client.open(*peers[:4])


def test_a_second_failure_and_a_failure_during_recovery() -> None:
    swarm, peers = swarm_of()
    swarm_third = swarm.add("c1", SPANS[1])
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    client.decode(3)
    swarm.kill(peers[1])
    swarm.run()
    client.reroute(peers[0], peers[5], peers[2], peers[3])  # the replay is not delivered yet
    swarm.kill(peers[5])
    swarm.run()
    client.reroute(peers[0], swarm_third, peers[2], peers[3])
    client.decode(4)
    swarm.kill(peers[2])
    swarm.run()
    client.reroute(peers[0], swarm_third, peers[6], peers[3])
    client.decode(TOKENS - len(client.drawn))
    assert client.drawn == EXPECTED
    client.close()
    swarm.run()
    assert not any(swarm.held().values()), swarm.held()


def test_a_lost_neighbour_suspends_and_names_the_lost_peer_both_ways() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    swarm.kill(peers[1])
    swarm.run()
    told = {(sender, answer.fault.peer_id, answer.fault.code) for sender, answer in swarm.inbox}
    assert told == {
        (peers[0], peers[1], "peer-unreachable"),
        (peers[3], peers[1], "peer-unreachable"),
    }
    for index in (0, 2, 3):
        [session] = swarm.nodes[peers[index]].stage.sessions
        assert (session.phase, session.positions) == ("suspended", len(PROMPT))
    swarm.pass_time(29_999)
    assert swarm.held()["sessions"] == 3
    swarm.pass_time(2)
    assert not any(swarm.held().values()), swarm.held()


def test_a_closed_epoch_answers_the_same_and_fences_its_frames() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    client.decode(2)
    first = client.close_epoch()
    assert first == client.close_epoch()
    answer = first[peers[1]]
    assert (answer.positions, answer.retained) == (client.next_position, client.next_position)
    assert answer.traversals_received == answer.traversals_sent == 5
    assert first[peers[3]].retained == 0
    client.send(client.frame(client.next_position, (client.drawn[-1],), sample=True, close=False))
    swarm.run()
    assert (swarm.inbox, swarm.held()["jobs"]) == ([], 0)
    stage = swarm.nodes[peers[0]].stage
    request = session_pb2.CloseEpochRequest(session_id=client.terms.session_id, epoch=2)
    with pytest.raises(RemoteProtocolError):
        stage.close_epoch(request, CLIENT)
    request.epoch = 1
    with pytest.raises(RemoteProtocolError, match="only its client"):
        stage.close_epoch(request, peers[1])


def test_a_frame_under_way_when_the_epoch_closes_changes_nothing() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    client.decode(2)
    client.send(client.frame(client.next_position, (client.drawn[-1],), sample=True, close=False))
    swarm.deliver_one()
    node = swarm.nodes[peers[0]]
    assert node.worker.queued == 1
    client.close_epoch()
    node.compute_one()
    [session] = node.stage.sessions
    assert (session.sent, len(swarm.queue)) == (5, 0)
    assert node.stage.retained.end((session.id, "output")) == client.next_position
    swarm.kill(peers[2])
    client.reroute(peers[0], peers[1], peers[6], peers[3])
    client.decode(TOKENS - len(client.drawn))
    assert client.drawn == EXPECTED


def test_a_late_frame_of_the_epoch_before_is_dropped() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    late = client.frame(client.next_position, (client.drawn[-1],), sample=True, close=False)
    swarm.kill(peers[2])
    client.reroute(peers[0], peers[1], peers[6], peers[3])
    client.send(late)
    client.decode(TOKENS - len(client.drawn))
    assert client.drawn == EXPECTED


def test_a_replay_waits_for_room_and_live_results_wait_behind_it() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    client.decode(2)
    swarm.kill(peers[2])
    swarm.run()
    upstream = swarm.nodes[peers[1]]
    upstream.congested.add(peers[6])
    client.reroute(peers[0], peers[1], peers[6], peers[3])
    client.send(client.frame(client.next_position, (client.drawn[-1],), sample=True, close=True))
    swarm.run()
    assert (swarm.inbox, swarm.held()["jobs"]) == ([], 0)
    upstream.congested.clear()
    upstream.stage.on_room(peers[6])
    swarm.run()
    [(_, answer)] = swarm.inbox
    assert list(answer.result.ids) == [EXPECTED[3]]


def test_opening_again_needs_the_same_stint_a_closed_epoch_and_the_positions() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    stage = swarm.nodes[peers[0]].stage
    one = client.terms
    answers = dict.fromkeys(peers[:4], session_pb2.CloseEpochResponse(positions=99, retained=99))
    terms = client.next_terms(answers, *peers[:4])
    with pytest.raises(RemoteProtocolError, match="closed first"):
        stage.open(client.opening(terms, 0), CLIENT)
    client.close_epoch()
    with pytest.raises(RemoteProtocolError, match="open already"):
        stage.open(client.opening(one, 0), CLIENT)
    unknown = swarm.nodes[peers[4]].stage.open(client.opening(terms, 0), CLIENT)
    assert unknown.refusal.code in ("price", "terms")
    assert not stage.open(client.opening(terms, 0), CLIENT).HasField("refusal")


def test_a_stage_that_enters_starts_on_the_reservation_alone_and_epoch_1_does_not() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.terms = client.first_terms(*peers[:4])
    client.hold(client.terms)
    with pytest.raises(Rejected, match="credit"):
        client.confirm(peers[0], client.confirmation(client.terms, granted=False))


def test_without_a_grant_a_stage_takes_one_chunk_and_the_grant_may_come_an_epoch_later() -> None:
    for shown in (False, True):
        swarm, peers = swarm_of()
        client = PaperClient(swarm, PROMPT, TOKENS)
        client.open(*peers[:4])
        client.prefill()
        swarm.kill(peers[1])
        client.reroute(peers[0], peers[5], peers[2], peers[3], granted=False)
        client.decode(1)
        swarm.kill(peers[2])
        client.reroute(peers[0], peers[5], peers[6], peers[3], granted=False)
        if shown:
            client.show_grants()
            client.decode(TOKENS - len(client.drawn))
            assert client.drawn == EXPECTED
        else:
            with pytest.raises(Faulted, match="without a grant"):
                client.decode(5)


def test_a_hold_that_was_never_confirmed_gives_way_to_a_higher_epoch() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    swarm.kill(peers[1])
    swarm.run()
    answers = client.close_epoch()
    two = client.next_terms(answers, peers[0], peers[5], peers[2], peers[3])
    new = swarm.nodes[peers[5]]
    assert not new.stage.open(client.opening(two, 1), CLIENT).HasField("refusal")
    client.terms = replace(client.terms, epoch=2)
    three = client.next_terms(answers, peers[0], peers[5], peers[2], peers[3])
    assert not new.stage.open(client.opening(three, 1), CLIENT).HasField("refusal")
    [session] = new.stage.sessions
    assert (session.terms.epoch, session.phase) == (3, "held")
    assert new.held["kv_tokens"] == session.tokens_max


def test_frames_replayed_to_a_stage_that_is_not_rebuilt_end_its_session() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    frame = stage_pb2.Frame(
        session_id=client.terms.session_id,
        epoch=1,
        replay=True,
        token_ids=stage_pb2.TokenIds(ids=PROMPT),
    )
    client.send(frame)
    swarm.run()
    with pytest.raises(Faulted, match="not rebuilt"):
        client.result()


def test_a_gone_client_is_believed_when_both_ends_miss_it() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    for node in swarm.nodes.values():
        node.stage.on_link_lost(CLIENT, CLIENT, others_left=False)
    assert {s.phase for i in (0, 3) for s in swarm.nodes[peers[i]].stage.sessions} == {"suspended"}
    swarm.pass_time(500)
    assert not any(swarm.held().values()), swarm.held()


@pytest.mark.parametrize("order", [(0, 3), (3, 0)])
def test_a_gone_client_is_believed_although_the_ends_notice_at_different_times(
    order: tuple[int, int],
) -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    for index in order:
        swarm.nodes[peers[index]].stage.on_link_lost(CLIENT, CLIENT, others_left=False)
        swarm.pass_time(300)
    swarm.pass_time(300)
    assert not any(swarm.held().values()), swarm.held()


def test_a_client_that_only_one_end_misses_may_reroute() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    swarm.nodes[peers[0]].stage.on_link_lost(CLIENT, CLIENT, others_left=False)
    swarm.pass_time(500)
    assert swarm.held()["sessions"] == 4
    client.reroute(*peers[:4])
    client.decode(TOKENS - 1)
    assert client.drawn == EXPECTED


def test_while_settlements_are_unwitnessed_only_new_sessions_are_refused() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    swarm.nodes[peers[2]].unwitnessed = "the witnesses have not seen it"
    with pytest.raises(Rejected, match="the witnesses have not seen it") as caught:
        PaperClient(swarm, PROMPT, TOKENS, session=b"another").open(*peers[:4])
    assert "unwitnessed" in str(caught.value)
    client.reroute(peers[0], peers[1], peers[2], peers[7])
    client.decode(TOKENS - 1)
    assert client.drawn == undisturbed()


def test_draining_is_told_and_goes_on_serving() -> None:
    swarm, peers = swarm_of()
    client = PaperClient(swarm, PROMPT, TOKENS, chunk_tokens=32)
    client.open(*peers[:4])
    client.prefill()
    node = swarm.nodes[peers[2]]
    node.draining = True
    node.stage.drain()
    swarm.run()
    told = {(sender, answer.fault.peer_id, answer.fault.code) for sender, answer in swarm.inbox}
    assert told == {(peers[0], peers[2], "draining"), (peers[3], peers[2], "draining")}
    swarm.inbox.clear()
    client.decode(3)
    client.reroute(peers[0], peers[1], peers[6], peers[3])
    assert len(node.stage.sessions) == 1
    swarm.pass_time(5_000)
    assert len(node.stage.sessions) == 0, "a drained node is soon empty"
    assert client.drawn == EXPECTED[:4]
    client.decode(TOKENS - len(client.drawn))
    assert client.drawn == EXPECTED
