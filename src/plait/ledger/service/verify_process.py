"""A process that does nothing but verify signatures; it imports little, so that it starts soon."""

import signal
from contextlib import suppress
from multiprocessing.connection import Connection

from plait.envelope import pae
from plait.errors import BadSignature
from plait.identity import verify
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import ExportResponse


def verify_all(asked: Connection) -> None:
    """Say that we have started, then answer each export page, to the end of the pipe.

    An answer has one byte per object: 1 for a good signature.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us ends us
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        asked.send_bytes(b"started")
        while True:
            page = ExportResponse.FromString(asked.recv_bytes())
            asked.send_bytes(bytes(map(_is_sound, page.objects)))


def _is_sound(envelope: SignedEnvelope) -> bool:
    try:
        verify(envelope.signer, envelope.signature, pae(envelope.payload_type, envelope.payload))
    except BadSignature:
        return False
    return True
