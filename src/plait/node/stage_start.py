"""Starting the stage role: what can be wrong is found before it is offered to anybody."""

import asyncio
import math
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import psutil

from plait.compute.device import CPU, Device, accelerators, resolve
from plait.compute.device_memory import memory_of
from plait.compute.load import check_loadable, load_stage
from plait.compute.port import StageCompute
from plait.compute.spill import DiskRoom
from plait.errors import ConfigError
from plait.ledger.notices import NoticeBoard
from plait.ledger.service.committee import connect
from plait.ledger.service.notices import NoticeExchange, NoticeFile
from plait.logs import get_logger
from plait.model.catalog import load
from plait.model.local import LocalModel
from plait.model.manifest import FP32_BYTES, Manifest
from plait.net.directory import TrustedCertificates
from plait.net.gossip import Gossip
from plait.net.libp2p import Libp2pControlPlane, check_free
from plait.net.membership import Membership
from plait.network_file import NetworkFile
from plait.node.config import NodeConfig
from plait.node.first_look import look_around
from plait.node.node_self import NodeSelf, Ports, posts_in_view, read_identity
from plait.node.stage_node import MEBIBYTE, StageNode
from plait.node.state import Incarnations
from plait.router.placement import choose_span
from plait.router.view import View
from plait.task_scope import TaskScope
from plait.types import PeerId, Span

log = get_logger(__name__)

LAYER_TENSOR = re.compile(r"blk\.(\d+)\.")
"""How GGUF names the tensors of a layer."""
MEMORY_SHARE = 0.5
"""Of the free memory, what an automatically chosen span may take."""


async def start_stage(
    config: NodeConfig, network: NetworkFile, stack: AsyncExitStack, clock_ms: Callable[[], int]
) -> "StageNode":
    """Start the role; it runs until ``stack`` is closed, which withdraws the offer first.

    Raises ``ConfigError`` for what the operator can mend and ``ModelError`` for weights
    that are missing or corrupt.
    """
    me = read_identity(config, network, clock_ms)
    if not network.authorities:
        raise ConfigError("the network file names no ledger authority")
    local = load(config.model or "")
    device = await asyncio.to_thread(_device, config.device)
    check_loadable(local, config.span, config.dtype, device)
    listen = f"/ip4/{config.host}/tcp/{config.p2p_port}"
    check_free(listen)
    trusted = TrustedCertificates()
    ports = Ports.bind(me, trusted)
    view = await look_around(network, me.peer, ports.public_address)
    compute, speed_us = await _load_compute(me, local, view, device)
    tasks = await stack.enter_async_context(TaskScope())
    control = Libp2pControlPlane(
        me.peer_key,
        listen=listen,
        bootstrap=_bootstrap(me),
        announce=_announced(config, me.peer),
    )
    await stack.enter_async_context(control)
    membership = Membership(network)
    digest = local.manifest.digest
    gossip = Gossip(
        control,
        membership,
        network,
        me.peer_key,
        digest,
        me.incarnation,
        clock_ms,
        Incarnations(config.data_dir).note_issued,
    )
    tasks.create_task(gossip.run(), name="gossip")
    notices = NoticeExchange(
        NoticeBoard(network),
        network,
        lambda: posts_in_view(me, gossip.view()),
        file=NoticeFile(config.data_dir / "notices"),
    )
    tasks.create_task(notices.run(), name="notices")
    ledger = await connect(network, notices, config.data_dir / "missed")
    stack.push_async_callback(ledger.close)
    node = StageNode(me, local, compute, speed_us, gossip, ledger, tasks, trusted, notices)
    await node.serve(stack, ports, control.multiaddrs)
    return node


def _announced(config: NodeConfig, peer: PeerId) -> list[str]:
    """Our multiaddr if others dial us elsewhere than we listen, which needs a fixed port."""
    host = config.announce_host
    return [f"/ip4/{host}/tcp/{config.p2p_port}/p2p/{peer}"] if host else []


def _bootstrap(me: NodeSelf) -> list[str]:
    named = [node.multiaddr for node in me.network.bootstrap if node.peer != me.peer]
    return [*named, *me.config.extra_bootstrap]


async def _load_compute(
    me: NodeSelf, local: LocalModel, view: View, device: Device
) -> tuple[StageCompute, tuple[int, int]]:
    config, span = me.config, me.config.span
    memory = await asyncio.to_thread(memory_of, device)
    if span is None:
        span = _automatic_span(me, local, view, memory.free_bytes())
        log.info("span chosen", span=str(span))
    threads = config.threads or psutil.cpu_count() or 1
    disk = DiskRoom(config.data_dir / "prefixes", config.prefix_disk_mb * MEBIBYTE)
    load_it = partial(load_stage, disk=disk, memory=memory)
    compute = await asyncio.to_thread(
        load_it, local, span, config.dtype, threads, config.kv_tokens_max
    )
    speed_us = await asyncio.to_thread(compute.measure)
    log.info(
        "weights loaded",
        span=str(span),
        device=compute.device,
        kv_tokens=compute.kv_tokens_total,
        decode_us=speed_us[0],
    )
    return compute, speed_us


def _device(name: str) -> Device:
    # torch need not look for accelerators where none was asked for.
    return CPU if name == CPU.name else resolve(name, accelerators())


def _automatic_span(me: NodeSelf, local: LocalModel, view: View, device_bytes: int | None) -> Span:
    free_bytes = psutil.virtual_memory().available if device_bytes is None else device_bytes
    fits = int(free_bytes * MEMORY_SHARE // bytes_per_layer(local.manifest))
    try:
        return choose_span(view, local.manifest.shape, fits, me.clock_ms(), besides=me.peer)
    except ValueError as error:
        raise ConfigError(
            f"no layer of {local.name} fits in half of the free memory",
            remedy="free some memory, or name the layers with --span",
        ) from error


def bytes_per_layer(manifest: Manifest) -> int:
    """Memory of the largest layer's weights in fp32."""
    sizes: dict[str, int] = {}
    for tensor in manifest.tensors:
        layer, weights = LAYER_TENSOR.match(tensor.name), FP32_BYTES * math.prod(tensor.shape)
        if layer:
            sizes[layer[1]] = sizes.get(layer[1], 0) + weights
    return max(sizes.values())
