"""Whatever happens in whatever order, a stage that has ended its sessions holds nothing."""

import contextlib
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from plait.errors import PlaitError
from plait.node.overload import Limits
from plait.testing.stages import CLIENT, Faulted, PaperClient, PaperSwarm, Rejected
from plait.types import PeerId, Span
from plait.v1 import stage_pb2

SPANS = (Span(0, 2), Span(2, 3), Span(3, 4))
EXPECTED_FAULTS = (PlaitError, Faulted, Rejected)
PROMPT = tuple(range(1, 12))


class Stages(RuleBasedStateMachine):
    """Three spans on two hosts each; two sessions; everything may go wrong at any time."""

    @initialize(memory=st.sampled_from([10**6, 600, 0]), retain_inputs=st.booleans())
    def start(self, memory: int, retain_inputs: bool) -> None:
        self.swarm = PaperSwarm(
            memory=memory,
            retain_inputs=retain_inputs,
            kv_tokens=72,
            limits=Limits(frames_queued_max=2, peer_queued_bytes_max=2_000),
        )
        for copy in "ab":
            for index, span in enumerate(SPANS):
                self.swarm.add(f"{copy}{index}", span)
        self.names = list(self.swarm.nodes)
        self.clients = [self.client(0), self.client(1)]
        for client in self.clients:
            client.open(*self.route(0))

    def client(self, number: int) -> PaperClient:
        return PaperClient(self.swarm, PROMPT, 20, session=bytes([number]))

    def route(self, choice: int) -> list[PeerId]:
        return [self.names[index + 3 * (choice >> index & 1)] for index in range(3)]

    def attempt(self, action: Callable[[], object]) -> None:
        with contextlib.suppress(*EXPECTED_FAULTS):
            action()

    @rule(who=st.integers(0, 1), choice=st.integers(0, 7))
    def open(self, who: int, choice: int) -> None:
        client = self.client(who)
        self.attempt(lambda: client.open(*self.route(choice)))
        if hasattr(client, "books"):
            self.clients[who] = client

    @rule(who=st.integers(0, 1), choice=st.integers(0, 7))
    def only_hold(self, who: int, choice: int) -> None:
        client = self.clients[who]
        self.attempt(lambda: client.hold(client.first_terms(*self.route(choice))))

    @rule(who=st.integers(0, 1), tokens=st.integers(1, 5))
    def generate(self, who: int, tokens: int) -> None:
        client = self.clients[who]
        self.attempt(lambda: client.decode(tokens) if client.drawn else client.prefill())

    @rule(who=st.integers(0, 1), position=st.integers(0, 31), rows=st.integers(0, 3))
    def send_something(self, who: int, position: int, rows: int) -> None:
        client = self.clients[who]
        self.attempt(
            lambda: client.send(client.frame(position, (1,) * rows, sample=True, close=False))
        )

    @rule(who=st.integers(0, 1), rows=st.integers(1, 20), epoch=st.integers(1, 3))
    def replay_something(self, who: int, rows: int, epoch: int) -> None:
        client = self.clients[who]
        frame = stage_pb2.Frame(
            session_id=client.terms.session_id,
            epoch=epoch,
            replay=True,
            token_ids=stage_pb2.TokenIds(ids=(1,) * rows),
        )
        self.attempt(lambda: client.send(frame))

    @rule(who=st.integers(0, 1), choice=st.integers(0, 7))
    def reroute(self, who: int, choice: int) -> None:
        self.attempt(lambda: self.clients[who].reroute(*self.route(choice)))

    @rule(who=st.integers(0, 1))
    def close_epoch(self, who: int) -> None:
        self.attempt(self.clients[who].close_epoch)

    @rule(who=st.integers(0, 1))
    def close(self, who: int) -> None:
        self.attempt(self.clients[who].close)

    @rule(times=st.integers(1, 4))
    def deliver(self, times: int) -> None:
        for _ in range(min(times, len(self.swarm.queue))):
            self.swarm.deliver_one()

    @rule(index=st.integers(0, 5))
    def compute(self, index: int) -> None:
        node = self.swarm.nodes.get(self.names[index])
        if node is not None and node.worker.jobs:
            node.compute_one()

    @rule(index=st.integers(0, 5), who=st.integers(0, 1))
    def fail_a_step(self, index: int, who: int) -> None:
        node = self.swarm.nodes.get(self.names[index])
        if node is not None:
            session = self.clients[who].terms.session_id
            node.compute.fail_next(session, ValueError("a bug"))

    @rule(index=st.integers(0, 5), full=st.booleans())
    def fill_the_disk(self, index: int, full: bool) -> None:
        if node := self.swarm.nodes.get(self.names[index]):
            node.spill.broken = full

    @rule(index=st.integers(0, 5), other=st.integers(0, 5))
    def congest(self, index: int, other: int) -> None:
        if node := self.swarm.nodes.get(self.names[index]):
            node.congested ^= {self.names[other]}
            node.stage.on_room(self.names[other])

    @rule(index=st.integers(0, 5), other=st.integers(0, 5))
    def break_a_link(self, index: int, other: int) -> None:
        if node := self.swarm.nodes.get(self.names[index]):
            node.stage.on_peer_lost(self.names[other], "cut")

    @rule(index=st.integers(0, 5))
    def lose_the_client(self, index: int) -> None:
        if node := self.swarm.nodes.get(self.names[index]):
            node.stage.on_link_lost(CLIENT, CLIENT, others_left=False)

    @precondition(lambda self: len(self.swarm.nodes) > 4)
    @rule(index=st.integers(0, 5))
    def kill(self, index: int) -> None:
        self.swarm.kill(self.names[index])

    @rule(index=st.integers(0, 5))
    def drain(self, index: int) -> None:
        if node := self.swarm.nodes.get(self.names[index]):
            node.draining = True
            node.stage.drain()

    @rule(time_ms=st.sampled_from([100, 600, 2_100, 31_000]))
    def wait(self, time_ms: int) -> None:
        self.swarm.pass_time(time_ms)

    @invariant()
    def bounds_hold(self) -> None:
        for node in self.swarm.nodes.values():
            assert node.compute.kv_tokens_free >= 0
            assert node.stage.retained.memory_bytes <= self.swarm.memory
            assert node.stage.queued_bytes >= 0

    def teardown(self) -> None:
        if not hasattr(self, "swarm"):
            return
        for _ in range(3):
            self.swarm.pass_time(61_000)
        assert not any(self.swarm.held().values()), self.swarm.held()


Stages.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestStages = Stages.TestCase
