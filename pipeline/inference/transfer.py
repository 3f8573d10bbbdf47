"""Copies between the host and a GPU that do not wait for the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any] | Sequence[int], device: torch.device) -> Tensor:
    """Copy an array or integers to a device."""
    tensor = torch.from_numpy(np.asarray(values))
    # The host may go on only if the copy reads from pinned memory.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class HostCopy:
    """Copy of a tensor on the host, which begins when the object is created."""

    def __init__(self, tensor: Tensor) -> None:
        self.copied = torch.cuda.Event() if tensor.is_cuda else None
        self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.tensor.copy_(tensor, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def tolist(self) -> list[Any]:
        """Wait for the copy and return its values."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor.tolist()
