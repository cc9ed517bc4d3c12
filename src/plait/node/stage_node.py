"""The stage role put together: control plane, compute, both ports, settlement."""

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio

from plait.compute.port import StageCompute
from plait.errors import PeerUnreachable
from plait.identity import load_or_create_key
from plait.ledger.policy import policy_of, read_policy
from plait.ledger.service.committee import Ledger
from plait.ledger.service.key_store import newest_ledger_key, newest_serial
from plait.ledger.service.notices import NoticeExchange, NoticeServicer
from plait.ledger.service.witness_edge import make_witness
from plait.ledger.witnessed import Patience
from plait.logs import get_logger
from plait.model.local import LocalModel
from plait.net.directory import DirectoryServicer, TrustedCertificates
from plait.net.gossip import Gossip
from plait.net.links import LinkMeter
from plait.net.tls import channel
from plait.net.watch import targets_of
from plait.node.admission import StageIdentity
from plait.node.audit_shell import Auditing
from plait.node.config import NodeConfig
from plait.node.neighbours import Neighbours
from plait.node.node_self import NodeSelf, Ports, key_cert
from plait.node.open_files import raise_file_limit, tapes_within
from plait.node.overload import Limits
from plait.node.own_offer import Facts, SpeedMeter, materially_different, offer_of
from plait.node.recent import RecentTimes
from plait.node.retained import Retained
from plait.node.service import StageServicer
from plait.node.settlement import Settler
from plait.node.spill import SpillFiles
from plait.node.stage_shell import StageShell
from plait.node.tape import Tape
from plait.router.view import Offer
from plait.task_scope import TaskScope
from plait.types import Microcredits, PeerId
from plait.v1 import log_pb2_grpc, offer_pb2, offer_pb2_grpc, stage_pb2_grpc
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

MEBIBYTE = 1024 * 1024
UPKEEP_PERIOD_S = 0.5
EXPIRY_PERIOD_S = 0.2
PARK_PERIOD_S = 2.0
STOP_GRACE_S = 1.0


def _limits(config: NodeConfig) -> Limits:
    # Even a gateway, which is one client, leaves some room for another.
    per_client = max(1, config.sessions_max * 3 // 4)
    return Limits(
        sessions_max=config.sessions_max,
        sessions_per_client_max=per_client,
        keep_alive_s_max=config.keep_alive_s_max,
    )


def _retained(config: NodeConfig, spill: SpillFiles) -> Retained:
    return Retained(
        spill,
        memory_bytes_max=config.retained_mb * MEBIBYTE,
        spill_bytes_max=config.spill_mb * MEBIBYTE,
    )


def _tape(config: NodeConfig, files: SpillFiles) -> Tape | None:
    if not config.retain_inputs:
        return None
    return Tape(
        files,
        bytes_max=config.tape_mb * MEBIBYTE,
        window_ms=config.audit_window_s * 1000,
        sessions_max=tapes_within(raise_file_limit()),
    )


class StageNode:
    """The running role: servers, upkeep, and an orderly end."""

    def __init__(
        self,
        me: NodeSelf,
        local: LocalModel,
        compute: StageCompute,
        speed_us: tuple[int, int],
        gossip: Gossip,
        ledger: Ledger,
        tasks: TaskScope,
        trusted: TrustedCertificates,
        notices: NoticeExchange,
    ) -> None:
        self._notices = notices
        self._me = me
        self._compute = compute
        self._speed = SpeedMeter(speed_us[0])
        self._prefill_us_per_token = speed_us[1]
        self._gossip = gossip
        self._tasks = tasks
        self._draining = False
        self._loop_late = RecentTimes()
        self._told: Offer | None = None
        self._facts: Facts
        self._shape = local.manifest.shape
        self._context_length = local.manifest.context_length
        self._trusted = trusted
        self._meter = LinkMeter(
            lambda: targets_of(gossip.view(), me.peer),
            lambda target, reason: gossip.peer_down(target.peer, target.incarnation, reason),
            time.monotonic,
        )
        self._serial = newest_serial(me.config.data_dir)
        self._settler = Settler(
            key=me.ledger_key,
            cert=key_cert(me, me.ledger_key, self._serial),
            ledger=ledger,
            spool_dir=me.config.data_dir / "settlements",
            clock_ms=me.clock_ms,
            tasks=tasks,
            policy=read_policy(policy_of(me.network).encode()),
            patience=Patience(
                Microcredits(me.config.unwitnessed_max), me.config.unwitnessed_s * 1000
            ),
        )
        self._spill = SpillFiles(me.config.data_dir / "spill")
        self._tape_files = SpillFiles(me.config.data_dir / "tape")
        self._limits = _limits(me.config)
        self._stage = StageShell(
            compute=compute,
            network=me.network,
            settler=self._settler,
            neighbours=Neighbours(tasks, self._dial),
            retained=_retained(me.config, self._spill),
            identify=self._identify,
            view=gossip.view,
            clock_ms=me.clock_ms,
            speeds_us=lambda: (self._speed.decode_us, self._prefill_us_per_token),
            vocabulary=local.manifest.vocabulary_size,
            limits=self._limits,
            tape=_tape(me.config, self._tape_files),
            on_step=self._speed.stepped,
            trusted=notices.board.trusted,
            caught=lambda fork: notices.perform(notices.board.caught(fork)),
        )

    async def serve(
        self, stack: AsyncExitStack, ports: "Ports", multiaddrs: tuple[str, ...]
    ) -> None:
        """Serve both ports, offer, and leave the rest to tasks."""
        directory = DirectoryServicer(
            self._gossip, self._me.network, self._trusted, self._probe, self._me.clock_ms
        )
        offer_pb2_grpc.add_DirectoryServiceServicer_to_server(directory, ports.public)
        self._serve_notices(ports.public)
        servicer = StageServicer(
            self._stage, self._trusted.peer_of, self._learn, self._make_auditing()
        )
        stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, ports.peer)
        for server in (ports.public, ports.peer):
            await server.start()
            stack.push_async_callback(server.stop, STOP_GRACE_S)
        self._facts = self._gather_facts(ports, multiaddrs)
        self._upkeep()
        self._tasks.create_task(self._stage.compute_forever(), name="compute")
        self._tasks.create_task(self._settler.retry_forever(), name="settlement retries")
        self._tasks.create_task(self._settler.confirm_forever(), name="witnessed settlements")
        self._tasks.create_task(self._meter.run(), name="link meter")
        self._tasks.create_task(self._upkeep_forever(), name="upkeep")
        self._tasks.create_task(self._expire_forever(), name="expiry")
        self._tasks.create_task(self._park_forever(), name="prefixes to disk")
        stack.callback(self._spill.close)
        stack.callback(self._tape_files.close)
        stack.push_async_callback(self._leave)

    def _make_auditing(self) -> Auditing:
        async def connect(peer: PeerId) -> grpc.aio.Channel:
            return self._dial(peer)

        return Auditing(
            network=self._me.network,
            me=self._me.peer,
            key=lambda: self._settler.key,
            tape=self._stage.core.tape,
            compute=self._compute,
            submit=self._stage.submit_audit,
            connect=connect,
            clock_ms=self._me.clock_ms,
        )

    def drain(self) -> None:
        """Offer nothing, take nothing new, and tell every session's client to move."""
        if not self._draining:
            self._draining = True
            self._upkeep()
            self._stage.core.drain()

    @property
    def is_empty(self) -> bool:
        """Whether no session is left."""
        return not self._stage.core.sessions

    def status(self) -> dict[str, Any]:
        """What holds anything: all but the prefixes is zero again once every session has ended."""
        core, compute = self._stage.core, self._compute
        prefixes = compute.prefixes
        phases = Counter(session.phase for session in core.sessions)
        return {
            "model": self._shape.name,
            "span": [compute.span.start, compute.span.end],
            "device": compute.device,
            "numeric_class": compute.numeric_class(),
            "sessions": len(core.sessions),
            "sessions_suspended": phases["suspended"],
            "kv_tokens_total": compute.kv_tokens_total,
            "kv_bytes_total": compute.kv_bytes_total,
            "kv_tokens_free": compute.kv_tokens_free,
            "kv_tokens_used": compute.kv_tokens_total - compute.kv_tokens_free,
            "frames_queued": self._stage.frames_queued,
            "frames_queued_bytes": core.queued_bytes,
            "prefix_tokens_cached": prefixes.cached_tokens,
            "prefix_tokens_parked": prefixes.parked_tokens,
            "prefix_bytes_parked": prefixes.parked_bytes,
            "retained_bytes": core.retained.memory_bytes,
            "spill_bytes": core.retained.spill_bytes,
            "spill_files": len(self._spill),
            "audit_sessions_kept": len(core.tape) if core.tape is not None else 0,
            "audit_bytes_kept": core.tape.bytes_kept if core.tape is not None else 0,
            "audit_bytes_max": self._me.config.tape_mb * MEBIBYTE,
            "settlements_waiting": self._settler.waiting,
            "settlements_unwitnessed": len(self._settler.awaiting),
            "unwitnessed_microcredits": self._settler.awaiting.credit,
            "links": self._stage.links,
            "gossip_tasks": self._gossip.network_tasks(),
            "loop_late_ms_p50": self._loop_late.quantile_ms(0.5),
            "loop_late_ms_p99": self._loop_late.quantile_ms(0.99),
            "refusals": self._stage.refusals.count,
            "refusal_ms_p50": self._stage.refusals.quantile_ms(0.5),
            "refusal_ms_p99": self._stage.refusals.quantile_ms(0.99),
        }

    def _renew_ledger_key(self) -> None:
        """Adopt a rotated key once no session is open: each keeps the key it began with."""
        if (
            len(self._stage.core.sessions)
            or newest_serial(self._me.config.data_dir) == self._serial
        ):
            return
        key, self._serial = newest_ledger_key(self._me.config.data_dir)
        self._settler.renew(key, key_cert(self._me, key, self._serial))
        log.info("ledger key rotated", serial=self._serial)

    def _serve_notices(self, public: grpc.aio.Server) -> None:
        """What the public port has beside the directory: notices, and the witness role."""
        config, network = self._me.config, self._me.network
        notices = NoticeServicer(self._notices, network.network_id)
        log_pb2_grpc.add_NoticeServiceServicer_to_server(notices, public)
        if "witness" in config.roles:
            witness = make_witness(
                config.data_dir / "witness",
                network,
                load_or_create_key(config.data_dir / "witness.key"),
                on_fork=lambda fork: self._notices.perform(self._notices.board.caught(fork)),
            )
            log_pb2_grpc.add_WitnessServiceServicer_to_server(witness, public)

    async def _leave(self) -> None:
        """Take nothing new, end what runs, settle it, withdraw the offer."""
        self._draining = True
        await self._gossip.withdraw()
        self._stage.core.end_all("the node is stopping")
        await self._settler.idle(STOP_GRACE_S)

    def _gather_facts(self, ports: "Ports", multiaddrs: tuple[str, ...]) -> Facts:
        return Facts(
            peer=self._me.peer,
            incarnation=self._me.incarnation,
            model_digest=self._shape.digest,
            span=self._compute.span,
            numeric_class=self._compute.numeric_class(),
            kv_tokens_total=self._compute.kv_tokens_total,
            prefill_us_per_token=self._prefill_us_per_token,
            public_address=ports.public_address,
            peer_address=ports.peer_address,
            certificate=self._me.tls.cert_der,
            multiaddrs=multiaddrs,
        )

    async def _expire_forever(self) -> None:
        while True:
            due_s = time.monotonic() + EXPIRY_PERIOD_S
            await asyncio.sleep(EXPIRY_PERIOD_S)
            self._loop_late.note(time.monotonic() - due_s)
            self._stage.core.expire()

    async def _park_forever(self) -> None:
        while True:
            await asyncio.sleep(PARK_PERIOD_S)
            await asyncio.to_thread(self._compute.park_prefixes)

    async def _upkeep_forever(self) -> None:
        while True:
            await asyncio.sleep(UPKEEP_PERIOD_S)
            self._upkeep()

    def _learn(self, envelope: SignedEnvelope) -> None:
        """Know a peer by its signed offer, and let it in, before gossip brings it."""
        self._gossip.learn(envelope)
        self._trusted.refresh(self._gossip.view(), self._me.clock_ms())

    def _upkeep(self) -> None:
        """Trust the peers in view, keep offer and links current."""
        self._renew_ledger_key()
        self._trusted.refresh(self._gossip.view(), self._me.clock_ms())
        self._gossip.set_links(self._meter.rtts_us())
        offer = offer_of(
            self._me.config,
            self._facts,
            decode_us=self._speed.decode_us,
            kv_tokens_free=self._compute.kv_tokens_free,
            sessions_active=len(self._stage.core.sessions),
            draining=self._draining,
            now_ms=self._me.clock_ms(),
        )
        changed = materially_different(self._told, offer)
        if changed:
            self._told = offer
        self._gossip.set_offer(offer, at_once=changed)

    def _identify(self) -> StageIdentity:
        return StageIdentity(
            network_id=self._me.network.network_id,
            peer=self._me.peer,
            shape=self._shape,
            context_length=self._context_length,
            offers=self._gossip.recent_offers,
            draining=self._draining,
            revoked=self._notices.board.revoked,
            unwitnessed=self._settler.refusal,
        )

    def _probe(self, request: offer_pb2.ProbeRequest) -> offer_pb2.ProbeResponse:
        wanted = request.prompt_tokens + request.max_tokens
        free = self._compute.kv_tokens_free
        reason = ""
        if self._draining:
            reason = "draining"
        elif request.model_digest and request.model_digest != self._shape.digest:
            reason = "another model is served here"
        elif wanted > free:
            reason = f"{free} KV tokens are free"
        elif len(self._stage.core.sessions) >= self._limits.sessions_max:
            reason = "all sessions are taken"
        else:
            reason = self._settler.refusal
        return offer_pb2.ProbeResponse(
            would_accept=not reason,
            reason=reason,
            predicted_start_us=self._stage.core.wait_us,
            kv_tokens_free=free,
            incarnation=self._me.incarnation,
        )

    def _dial(self, peer: PeerId) -> grpc.aio.Channel:
        offer = self._gossip.view().offers.get(peer)
        if offer is None:
            raise PeerUnreachable(f"{peer} has no valid offer here")
        return channel(offer.peer_address, offer.certificate, self._me.tls)
