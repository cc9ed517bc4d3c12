"""An accelerator that is not one: torch's CPU behind an accelerator's staging, for tests."""

from collections.abc import Callable

import torch

from plait.compute.device import Device
from plait.compute.device_memory import AcceleratorMemory


class FakeDriver:
    """Counts what is asked of it. ``on_wait`` is called whenever somebody waits for the device."""

    def __init__(
        self, free_bytes: int = 1 << 30, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.free = free_bytes
        self.waits = 0
        self.buffers: list[torch.Tensor] = []
        self._on_wait = on_wait

    def host_bytes(self, count: int) -> torch.Tensor:
        """Ordinary memory, remembered."""
        self.buffers.append(torch.zeros(count, dtype=torch.uint8))
        return self.buffers[-1]

    def synchronise(self) -> None:
        """Nothing is under way: it is counted."""
        self.waits += 1
        self._on_wait()

    def free_bytes(self) -> int:
        """What the test says."""
        return self.free


class ShapeMemory(AcceleratorMemory):
    """torch's meta device in an accelerator's place: its tensors have no numbers, and do not
    meet those of the host."""

    def __init__(self, device: Device) -> None:
        super().__init__(device, FakeDriver(), torch.device("meta"))


FAKE_MPS = Device("mps")
"""An accelerator without bf16, so without torch's 4-bit kernel, which no CPU has."""


def fake_memory(device: Device = FAKE_MPS, driver: FakeDriver | None = None) -> AcceleratorMemory:
    """An accelerator's memory, in the host's."""
    return AcceleratorMemory(device, driver or FakeDriver(), torch.device("cpu"))
