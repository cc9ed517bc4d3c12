"""Evidence errors that say whose evidence is false."""

from collections.abc import Iterator
from contextlib import contextmanager

from plait.errors import BadProof, RemoteProtocolError, VerificationError


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Prefix errors about evidence with its subject; what is malformed becomes ``BadProof``."""
    try:
        yield
    except VerificationError as error:
        raise type(error)(f"{subject}: {error}") from error
    except (RemoteProtocolError, ValueError, OverflowError) as error:
        raise BadProof(f"{subject}: {error}") from error
