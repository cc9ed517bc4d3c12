"""Moving a step's numbers to the device that computes and back.

On the CPU nothing moves. An accelerator is fed through page-locked buffers, which it reads and
writes by itself while the CPU goes on; they are used again step after step. The CPU waits
for the device once per group of sessions that are computed together, when it fetches their
results.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from plait.compute.device import CPU, Device


class DeviceMemory(Protocol):
    """The memory a stage's weights, KV pages and rows are in."""

    @property
    def device(self) -> Device:
        """Which device it belongs to."""

    @property
    def torch_device(self) -> torch.device:
        """The same, for torch."""

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """There for good: weights and tables."""

    def carry(self, tensor: torch.Tensor) -> torch.Tensor:
        """There for this step; the host's tensor may change afterwards."""

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """On the host, complete; waits for the device."""

    def free_bytes(self) -> int | None:
        """What is free there; None for the host's, which others share."""


class HostMemory:
    """The CPU's: everything is where it is."""

    device = CPU
    torch_device = torch.device("cpu")

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``DeviceMemory.put``."""
        return tensor

    def carry(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``DeviceMemory.carry``."""
        return tensor

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See ``DeviceMemory.fetch``."""
        return list(tensors)

    def free_bytes(self) -> int | None:
        """See ``DeviceMemory.free_bytes``."""
        return None


HOST = HostMemory()


class Driver(Protocol):
    """What is asked of CUDA or MPS itself."""

    def host_bytes(self, count: int) -> torch.Tensor:
        """[count] uint8 on the host, page-locked if the device wants that."""

    def synchronise(self) -> None:
        """Return when the device has done everything it was told."""

    def free_bytes(self) -> int:
        """Free memory of the device."""


class CudaDriver:
    """One NVIDIA card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # fp32 means fp32, and half-precision sums are kept in fp32.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def host_bytes(self, count: int) -> torch.Tensor:
        """See ``Driver.host_bytes``."""
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def synchronise(self) -> None:
        """See ``Driver.synchronise``."""
        torch.cuda.synchronize(self._device)

    def free_bytes(self) -> int:
        """See ``Driver.free_bytes``."""
        torch.cuda.empty_cache()  # loading leaves buffers behind that are free, too
        free, _ = torch.cuda.mem_get_info(self._device)
        return free


class MpsDriver:
    """Apple's GPU, which shares the host's memory."""

    def host_bytes(self, count: int) -> torch.Tensor:
        """See ``Driver.host_bytes``."""
        return torch.empty(count, dtype=torch.uint8)

    def synchronise(self) -> None:
        """See ``Driver.synchronise``."""
        torch.mps.synchronize()

    def free_bytes(self) -> int:
        """See ``Driver.free_bytes``."""
        torch.mps.empty_cache()
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()


class AcceleratorMemory:
    """An accelerator's, behind page-locked buffers. Used by the compute thread alone."""

    def __init__(self, device: Device, driver: Driver, torch_device: torch.device) -> None:
        self.device = device
        self.torch_device = torch_device
        self._driver = driver
        self._up = Staging(driver)
        self._down = Staging(driver)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``DeviceMemory.put``."""
        return tensor.to(self.torch_device)

    def carry(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``DeviceMemory.carry``."""
        staged = self._up.take(tensor.shape, tensor.dtype)
        staged.copy_(tensor)
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.torch_device)
        return there.copy_(staged, non_blocking=True)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See ``DeviceMemory.fetch``."""
        staged = []
        for tensor in tensors:
            staged.append(self._down.take(tensor.shape, tensor.dtype))
            staged[-1].copy_(tensor, non_blocking=True)
        self._driver.synchronise()
        self._up.reset()
        # Results outlive the step: they are retained and sent while the next one computes.
        here = [tensor.clone() for tensor in staged]
        self._down.reset()
        return here

    def free_bytes(self) -> int | None:
        """See ``DeviceMemory.free_bytes``."""
        return self._driver.free_bytes()


_ALIGNMENT = 256


class Staging:
    """One buffer of the host's, given out piece by piece until ``reset``.

    It grows to what a step needs and is then used again. After a step that failed, its
    pieces are given out until the next step that fetches its results.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._taken = 0
        self._outgrown: list[torch.Tensor] = []
        """Buffers whose pieces may still be read by the device."""

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A piece of that shape, whose numbers are whatever they were."""
        count = shape.numel() * dtype.itemsize
        if self._taken + count > len(self._buffer):
            self._outgrown.append(self._buffer)
            self._buffer = self._driver.host_bytes(max(count, 2 * len(self._buffer)))
            self._taken = 0
        piece = self._buffer[self._taken : self._taken + count]
        self._taken += -(-count // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype).view(shape)

    def reset(self) -> None:
        """Give out from the start again: the device has read and written everything."""
        self._taken = 0
        self._outgrown.clear()


def memory_of(device: Device) -> DeviceMemory:
    """The memory of a device that ``resolve`` found."""
    if device.kind == "cpu":
        return HOST
    there = torch.device(device.name)
    driver: Driver = CudaDriver(there) if device.kind == "cuda" else MpsDriver()
    return AcceleratorMemory(device, driver, there)
