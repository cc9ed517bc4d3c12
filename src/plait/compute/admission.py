"""The checks every backend makes before it computes. Pure."""

import numpy as np

from plait.compute.port import Work
from plait.errors import RemoteProtocolError


def check_work(
    work: Work,
    *,
    first_stage: bool,
    width: int,
    vocabulary_size: int,
    cached: int,
    reserved: int,
) -> None:
    """Refuse work that is malformed or does not continue the session.

    ``cached`` positions are in the KV cache, ``reserved`` may ever be. Raises
    ``RemoteProtocolError``.
    """
    if first_stage:
        _check_ids(work, vocabulary_size)
    else:
        _check_hidden(work, width)
    if work.drafts:
        _check_drafts(work, vocabulary_size)
    if work.scored:
        _check_scored(work, vocabulary_size)
    if not 0 <= work.first_position <= cached:
        raise RemoteProtocolError(
            f"rows at position {work.first_position}, but only {cached} positions are cached"
        )
    if work.first_position + work.rows > reserved:
        end = work.first_position + work.rows
        raise RemoteProtocolError(f"rows up to position {end}, but {reserved} are reserved")


def _check_ids(work: Work, vocabulary_size: int) -> None:
    if work.ids is None or work.hidden is not None or not work.ids:
        raise RemoteProtocolError("the first stage takes token ids")
    if not all(0 <= token < vocabulary_size for token in work.ids):
        raise RemoteProtocolError(f"a token id outside of 0…{vocabulary_size - 1}")


def _check_drafts(work: Work, vocabulary_size: int) -> None:
    drafts = work.drafts
    if not work.sample or len(drafts) >= work.rows:
        raise RemoteProtocolError(f"{len(drafts)} drafts among {work.rows} rows")
    if not all(0 <= token < vocabulary_size for token in drafts):
        raise RemoteProtocolError(f"a draft outside of 0…{vocabulary_size - 1}")
    if work.ids is not None and work.ids[-len(drafts) :] != drafts:
        raise RemoteProtocolError("the last rows are not the drafts")


def _check_scored(work: Work, vocabulary_size: int) -> None:
    if len(work.scored) > work.rows or work.drafts:
        raise RemoteProtocolError(f"{len(work.scored)} ids to score behind {work.rows} rows")
    if not all(0 <= token < vocabulary_size for token in work.scored):
        raise RemoteProtocolError(f"an id to score outside of 0…{vocabulary_size - 1}")


def _check_hidden(work: Work, width: int) -> None:
    hidden = work.hidden
    if hidden is None or work.ids is not None:
        raise RemoteProtocolError("a later stage takes activations")
    if hidden.dtype != np.float32 or hidden.ndim != 2 or hidden.shape[1] != width:
        raise RemoteProtocolError(
            f"activations of {hidden.dtype} {hidden.shape}, not float32 [rows, {width}]"
        )
    if len(hidden) == 0:
        raise RemoteProtocolError("activations without rows")
    if not np.isfinite(hidden).all():
        raise RemoteProtocolError("activations that are not finite")
