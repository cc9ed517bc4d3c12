"""Revoking a peer's older ledger keys: signed once, told to whoever passes it on."""

import asyncio
import time
from pathlib import Path

from plait.errors import PeerUnreachable
from plait.identity import load_key
from plait.ledger.certs import make_revocation
from plait.ledger.notices import NoticeBoard, Told
from plait.ledger.service.notices import NoticeExchange, NoticeFile, Post, posts_of
from plait.network_file import NetworkFile


async def revoke(folder: Path, network: NetworkFile, serial_min: int) -> int:
    """Void the certificates of the peer in a data folder; returns how many were told.

    Raises ``PeerUnreachable`` if nobody was: then it holds nowhere yet, but the node passes
    it on when it starts.
    """
    key = load_key(folder / "identity.key")
    now_ms = time.time_ns() // 1_000_000
    notices = NoticeExchange(
        NoticeBoard(network), network, tuple, file=NoticeFile(folder / "notices")
    )
    notices.take(Told(revocations=(make_revocation(key, network.network_id, serial_min, now_ms),)))
    posts = posts_of(network.authorities)
    posts += [Post(node.public_address, node.certificate) for node in network.bootstrap]
    told = sum(await asyncio.gather(*(notices.exchange(post) for post in posts)))
    if not told:
        raise PeerUnreachable(
            "nobody could be told of the revocation", remedy="run the same command again later"
        )
    return told
