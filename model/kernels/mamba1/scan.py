"""Selective scan of Mamba-1 on a GPU with channels last: launch of the CUDA kernels in scan.cu.

Shapes, as in `model.kernels.reference.selective_scan`: x, dt, z [b, l, c]; A [c, k]; B, C [b, l, k]; D, dt_bias [c].
x, dt, z, B and C have the same type (bf16 or fp32) and contiguous last axes; A, D and dt_bias are fp32 and contiguous.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.cuda_module import CudaKernel, load_kernel, pointer

SOURCE = Path(__file__).with_name("scan.cu")
STATES, THREADS, CHUNK, UNROLL = 16, 128, 32, 4  # same values as in the source
WARPS = THREADS // 32
BACKWARD_SHARED_BYTES = 4 * (STATES * THREADS * CHUNK // UNROLL + 2 * UNROLL * WARPS * 2 * STATES)
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Gradients(NamedTuple):
    """Gradients of the scan's inputs, and its output, which is recomputed."""

    out: Tensor  # [b, l, c]
    x: Tensor
    dt: Tensor
    z: Tensor
    BC: Tensor  # fp32 [b, l, 2k]: the gradients of B and C
    A: Tensor
    D: Tensor
    dt_bias: Tensor


class _Inputs(ctypes.Structure):
    """Same fields as `Inputs` in the source. Strides are counted in elements."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dt", "z", "B", "C")),
        *((f"{name}_{axis}", ctypes.c_longlong) for name in ("x", "dt", "z", "bc") for axis in ("row", "batch")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias")),
        ("length", ctypes.c_int),
        ("channels", ctypes.c_int),
    ]


def supports(x: Tensor, channels: int, d_state: int, offset: int) -> bool:
    """Return whether the kernels can compute the scan.

    Args:
        x: Input of the scan or of its mixer, for the device and the type.
        channels: Number of channels.
        d_state: Number of states per channel.
        offset: Position of B in a row of the tensor that it is a slice of. B and C are loaded four values at a time.
    """
    sizes = d_state == STATES and channels % THREADS == 0 and offset % 4 == 0
    return sizes and x.is_cuda and x.dtype in SUFFIXES and not torch.is_autocast_enabled()


def scan_forward(
    x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gated output [b, l, c], the states for `scan_backward`, and the last state, fp32 [b, c, k]."""
    batch, length, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states = torch.empty(batch, (length - 1) // CHUNK, channels, STATES, device=x.device)
    last_state = torch.empty(batch, channels, STATES, device=x.device)
    arguments = [_inputs(x, dt, z, B, C, A, D, dt_bias), pointer(out), pointer(states), pointer(last_state)]
    _kernel("scan_forward", x).launch((channels // THREADS, batch), THREADS, arguments)
    return out, states, last_state


def scan_backward(
    grad: Tensor,
    states: Tensor,
    grad_z: Tensor,
    x: Tensor,
    dt: Tensor,
    z: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> Gradients:
    """Return the gradients of `scan_forward`.

    Args:
        grad: Gradient of the gated output, contiguous [b, l, c].
        states: States that `scan_forward` returned.
        grad_z: Tensor [b, l, c] for the gradient of z, which may be a slice of a larger tensor.
    """
    (batch, length, channels), blocks = x.shape, x.shape[-1] // THREADS
    out, grad_x, grad_dt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(3))
    grad_BC = torch.empty(blocks, batch, length, 2 * STATES, device=x.device)
    grad_A = torch.empty(batch, channels, STATES, device=x.device)
    grad_D, grad_bias = torch.empty(2, batch, channels, device=x.device)
    arguments = [
        _inputs(x, dt, z, B, C, A, D, dt_bias),
        *(pointer(tensor) for tensor in (grad, states, out, grad_x, grad_dt, grad_z)),
        ctypes.c_longlong(grad_z.stride(1)),
        *(pointer(tensor) for tensor in (grad_BC, grad_A, grad_D, grad_bias)),
    ]
    _kernel("scan_backward", x, BACKWARD_SHARED_BYTES).launch((blocks, batch), THREADS, arguments)
    return Gradients(out, grad_x, grad_dt, grad_z, grad_BC.sum(0), grad_A.sum(0), grad_D.sum(0), grad_bias.sum(0))


def _inputs(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> _Inputs:
    assert all(tensor.stride(-1) == 1 for tensor in (x, dt, z, B, C)) and B.stride() == C.stride()
    assert B.stride(1) % 4 == 0
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (A, D, dt_bias))
    strides = [stride for tensor in (x, dt, z, B) for stride in (tensor.stride(1), tensor.stride(0))]
    sizes = (x.shape[1], x.shape[2])
    return _Inputs(
        *(t.data_ptr() for t in (x, dt, z, B, C)), *strides, *(t.data_ptr() for t in (A, D, dt_bias)), *sizes
    )


def _kernel(name: str, x: Tensor, shared_bytes: int = 0) -> CudaKernel:
    return load_kernel(SOURCE, f"{name}_{SUFFIXES[x.dtype]}", x.get_device(), shared_bytes)
