"""Where a stage computes: on the CPU, on an NVIDIA card (CUDA) or on Apple's GPU (MPS).

What may run where, and how much KV cache fits, is decided here from values; only
``accelerators`` asks torch. Importing this module is cheap.

CUDA and MPS were written from torch's documentation and sources. They have been run on a
stand-in only (``plait.testing.devices``), never on a card.
"""

import re
from dataclasses import dataclass
from typing import Literal

from plait.errors import ConfigError

Kind = Literal["cpu", "cuda", "mps"]

AUTO = "auto"
"""CUDA's first card if there is one, else MPS, else the CPU."""
KV_SHARE = 0.8
"""Of the device's memory that is free once the weights are there, what KV pages may take. The
rest is for a step's own rows."""
_PAGE_TOKENS = 16
_BF16_CAPABILITY = (8, 0)
_NAME = re.compile(r"auto|cpu|mps|cuda(?::(\d{1,3}))?")


@dataclass(frozen=True, slots=True)
class Device:
    """One device. ``capability`` is CUDA's, and (0, 0) elsewhere."""

    kind: Kind = "cpu"
    index: int = 0
    capability: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """What torch and ``--device`` call it."""
        return f"cuda:{self.index}" if self.kind == "cuda" else self.kind

    @property
    def family(self) -> str:
        """Devices of one family run the same kernels; part of the numeric class."""
        major, minor = self.capability
        return f"cuda-sm{major}{minor}" if self.kind == "cuda" else self.kind

    @property
    def is_accelerator(self) -> bool:
        """Whether it has a memory of its own, or a queue that the CPU runs ahead of."""
        return self.kind != "cpu"

    @property
    def half(self) -> str:
        """The 16-bit type that it multiplies fast."""
        return "bf16" if self.kind == "cpu" or self.has_bf16 else "fp16"

    @property
    def has_bf16(self) -> bool:
        """Whether an accelerator has instructions for bf16, and so torch's 4-bit kernel."""
        return self.kind == "cuda" and self.capability >= _BF16_CAPABILITY


CPU = Device()


@dataclass(frozen=True, slots=True)
class Accelerators:
    """What torch finds in this machine: each CUDA card's compute capability, and MPS."""

    cuda: tuple[tuple[int, int], ...] = ()
    mps: bool = False


def accelerators() -> Accelerators:
    """Ask torch. It starts the driver: never in a process that forks afterwards."""
    import torch

    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return Accelerators(
        tuple(torch.cuda.get_device_capability(card) for card in cards),
        torch.backends.mps.is_available(),
    )


def check_device(name: str) -> None:
    """Raise ``ConfigError`` for what cannot be a device's name on any machine."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"there is no device {name!r}; auto, cpu, cuda, cuda:N and mps exist",
            remedy="--device cpu",
        )


def resolve(name: str, found: Accelerators) -> Device:
    """The device that ``name`` means here; raises ``ConfigError`` if it is not there."""
    check_device(name)
    if name == AUTO:
        name = "cuda" if found.cuda else "mps" if found.mps else "cpu"
    if name == "cpu":
        return CPU
    if name == "mps":
        if not found.mps:
            raise _missing(name, "torch finds no MPS here")
        return Device("mps")
    _, _, index = name.partition(":")
    card = int(index or 0)
    if card >= len(found.cuda):
        cards = len(found.cuda)
        raise _missing(name, f"torch finds {cards} CUDA cards here, counted from 0")
    return Device("cuda", card, found.cuda[card])


def _missing(name: str, why: str) -> ConfigError:
    return ConfigError(f"--device {name}: {why}", remedy="--device auto, or --device cpu")


def check_dtype(device: Device, dtype: str) -> None:
    """Raise ``ConfigError`` for a dtype that the device does not compute in.

    The CPU has no fast fp16, MPS and cards before compute capability 8.0 have no bf16.
    """
    if dtype == "fp16" and not device.is_accelerator:
        raise ConfigError("fp16 is for accelerators", remedy="--dtype bf16, or --device cuda")
    if dtype == "bf16" and device.is_accelerator and not device.has_bf16:
        raise ConfigError(f"{device.name} has no bf16 here", remedy="--dtype fp16")


def kernel_on(device: Device, dtype: str) -> str:
    """What multiplies on an accelerator, for the numeric class; the device's family first."""
    if dtype == "int4" and device.has_bf16:
        return f"{device.family}-tinygemm32"
    if dtype in ("int4", "int8"):
        return f"{device.family}-{device.half}-tiles"
    return f"{device.family}-tiles"


def kv_tokens_within(wanted: int, position_bytes: int, free_bytes: int | None) -> int:
    """How many tokens of KV cache to make: those wanted, or fewer if the device is too small.

    ``free_bytes`` is what is free on the device once the weights are there; None: the CPU's,
    where what is wanted is what the operator meant. Raises ``ConfigError`` if not one page fits.
    """
    if free_bytes is None:
        return wanted
    fits = int(free_bytes * KV_SHARE) // position_bytes
    if fits < min(wanted, _PAGE_TOKENS):
        raise ConfigError(
            "the device has no room for a KV cache beside these weights",
            remedy="fewer layers, with --span, or --device cpu",
        )
    return min(wanted, fits)
