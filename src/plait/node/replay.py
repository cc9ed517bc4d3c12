"""Sending retained rows to a stage that is rebuilt: a few frames at a time. Pure.

What is replayed counts in the hand-off chain of the new epoch as any frame does, but not in
its price: the one who is rebuilt is paid for it, not the one who sends.
"""

from plait.node.ports import Links
from plait.node.retained import Key, Retained
from plait.node.sessions import Replay, StageSession
from plait.node.wire import REPLAY_BYTES_MAX, replay_frame
from plait.replay_cuts import cut
from plait.v1 import stage_pb2


def replay_while_room(session: StageSession, links: Links, retained: Retained, width: int) -> None:
    """Send what is still to be replayed, of rows of ``width``, while the link has room for what
    can wait.

    Raises ``NetworkError``, or ``CapacityError`` if rows are no longer retained.
    """
    while session.replay is not None and links.has_room(session.downstream):
        if session.replay.next_position < session.replay.end:
            _send_some(session, session.replay, links, retained, width)
        if session.replay.next_position >= session.replay.end:
            session.replay = None


def _send_some(
    session: StageSession, replay: Replay, links: Links, retained: Retained, width: int
) -> None:
    key: Key = (session.id, "output")
    first = replay.next_position
    fitting = max(1, REPLAY_BYTES_MAX // (retained.row_bytes(key) or 1))
    terms = session.terms
    rows = cut(first, replay.end, terms.prompt_tokens, terms.start.cached_prompt, fitting)
    data = retained.read(key, first, rows)
    session.require_books().sent(replay.traversal, first, rows, data)
    frame = replay_frame(
        session.id,
        terms.epoch,
        replay.traversal,
        first,
        rows=rows,
        width=width,
        data=data,
        wire_dtype=terms.wire_dtype,
    )
    links.send_down(session.downstream, stage_pb2.LinkRequest(frame=frame))
    replay.next_position += rows
    replay.traversal += 1
