"""Which node of a testnet hosts which span. Pure arithmetic."""

import itertools
from dataclasses import dataclass

from plait.errors import ConfigError
from plait.types import Span

STAGES_DEFAULT = 3
NODES_DEFAULT = 4
NODES_MAX = 64
AUTHORITIES_MAX = 16
WITNESSES_DEFAULT = 3


@dataclass(frozen=True, slots=True)
class Placed:
    """One stage node: its name and the span it hosts."""

    name: str
    span: Span


def ledger_names(authorities: int) -> tuple[str, ...]:
    """The names of the ledger authorities; raises ``ConfigError`` unless 1, 4, 7, … 16."""
    if not 1 <= authorities <= AUTHORITIES_MAX or authorities % 3 != 1:
        raise ConfigError(
            f"{authorities} authorities are no committee",
            remedy="3f + 1 of them, of which f may fail: 1, 4, 7, 10, 13 or 16",
        )
    return tuple(f"ledger-{number}" for number in range(1, authorities + 1))


def witness_quorum(witnesses: int) -> int:
    """How many must cosign: more than half, but one of two, so that one may always fail."""
    return witnesses // 2 + 1 if witnesses > 2 else min(witnesses, 1)


def witnesses_among(nodes: int, wanted: int | None) -> int:
    """How many of the nodes are witnesses; by default three. Raises ``ConfigError``."""
    if wanted is None:
        return min(WITNESSES_DEFAULT, nodes)
    if not 0 <= wanted <= nodes:
        raise ConfigError(f"{wanted} of {nodes} nodes cannot be witnesses")
    return wanted


def equal_spans(layers: int, stages: int) -> tuple[Span, ...]:
    """Cut ``layers`` in ``stages`` equal spans, the remainder to the earlier ones.

    Raises ``ConfigError`` unless ``1 <= stages <= layers``.
    """
    if not 1 <= stages <= layers:
        raise ConfigError(
            f"{layers} layers cannot be cut in {stages} stages",
            remedy=f"a number of stages from 1 to {layers}",
        )
    length, remainder = divmod(layers, stages)
    starts = [stage * length + min(stage, remainder) for stage in range(stages + 1)]
    return tuple(Span(start, end) for start, end in itertools.pairwise(starts))


def place(
    layers: int,
    *,
    nodes: int | None = None,
    stages: int | None = None,
    replicas: int | None = None,
) -> tuple[Placed, ...]:
    """Name the stage nodes and give each a span; node k hosts span k modulo the stages.

    With ``stages`` or ``replicas`` there are stages x replicas nodes and ``nodes`` is
    refused; else ``nodes`` (default 4) on at most 3 spans, the rest being further hosts.
    Raises ``ConfigError`` for numbers that cannot be.
    """
    if stages is not None or replicas is not None:
        if nodes is not None:
            raise ConfigError(
                "-n cannot be combined with --stages or --replicas: "
                "they give stages x replicas nodes",
                remedy="leave -n out",
            )
        stages = min(STAGES_DEFAULT, layers) if stages is None else stages
        nodes = stages * (1 if replicas is None else replicas)
    else:
        nodes = NODES_DEFAULT if nodes is None else nodes
        stages = min(STAGES_DEFAULT, nodes, layers)
    if nodes < 1:
        raise ConfigError(f"a testnet needs at least one node, not {nodes}")
    if nodes > NODES_MAX:
        raise ConfigError(f"a testnet has at most {NODES_MAX} nodes, not {nodes}")
    spans = equal_spans(layers, stages)
    return tuple(Placed(f"node-{index + 1}", spans[index % stages]) for index in range(nodes))
