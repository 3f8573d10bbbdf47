"""Mamba operations by device: fused kernels for CUDA tensors, `model.kernels.reference` for all other tensors.

Only this module imports mamba_ssm and causal_conv1d, and only when the first CUDA tensor is processed. The functions
have the arguments and tensor layouts of `model.kernels.reference`. Where a kernel expects another layout, the function
converts its inputs and outputs.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from importlib.metadata import version
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from model.kernels import reference
from model.kernels.mamba1 import scan

KERNELS = {
    "causal_conv1d_bwd_function": "causal_conv1d.cpp_functions",
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_fwd_function": "causal_conv1d.cpp_functions",
    "causal_conv1d_update": "causal_conv1d",
    "layer_norm_fn": "mamba_ssm.ops.triton.layer_norm",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "mamba_inner_fn": "mamba_ssm.ops.selective_scan_interface",
    "mamba_split_conv1d_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "rmsnorm_fn": "mamba_ssm.ops.triton.layernorm_gated",
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
}


@lru_cache(maxsize=1)
def fused() -> SimpleNamespace:
    """Import the fused kernels.

    Raises: UserError if they cannot be imported. There is no fallback, because plain PyTorch would be slow on a GPU.
    """
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # keeps autotuning results for later runs
    try:
        return SimpleNamespace(**{name: getattr(importlib.import_module(KERNELS[name]), name) for name in KERNELS})
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"a tensor is on a GPU but the Mamba kernels cannot be imported ({error}): "
            "install them with slurm/install_kernels.sh, or run on the CPU"
        ) from error


def use_own_scan() -> bool:
    """Return whether Mamba-1 trains with our own scan. Set EMMA_MAMBA1_SCAN=mamba_ssm to train with mamba_ssm's."""
    return os.environ.get("EMMA_MAMBA1_SCAN") != "mamba_ssm"


def kernel_report(device: torch.device | str) -> str:
    """Describe, in one line for the log of a run, which implementation is used for tensors on this device."""
    if torch.device(device).type != "cuda":
        return f"Mamba in plain torch {torch.__version__} on {torch.device(device).type}"
    fused()
    versions = f"mamba_ssm {version('mamba_ssm')}, causal_conv1d {version('causal_conv1d')}"
    return f"Mamba by fused kernels ({versions}) on {torch.cuda.get_device_name(device)}"


def add_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return RMSNorm(hidden + residual) in the type of `hidden`, and the sum hidden + residual in fp32."""
    if hidden.is_cuda:
        return fused().layer_norm_fn(
            hidden, weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=eps, is_rms_norm=True
        )
    total = hidden.float() if residual is None else hidden.float() + residual
    return reference.rms_norm(total, weight, eps).to(hidden.dtype), total


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """Compute `reference.gated_rms_norm`."""
    if x.is_cuda:
        group_size = x.shape[-1] // groups
        return fused().rmsnorm_fn(x, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=False)
    return reference.gated_rms_norm(x, z, weight, eps, groups)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `reference.causal_conv`."""
    if x.is_cuda:
        # For this kernel, x is in the channels-last layout, which needs strides that are multiples of 8.
        x = x if x.stride(0) % 8 == x.stride(1) % 8 == 0 else x.contiguous()
        return fused().causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT
    return reference.causal_conv(x, weight, bias)


def causal_conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `reference.causal_conv_step`."""
    if x.is_cuda:
        return fused().causal_conv1d_update(x, state, weight, bias, "silu")
    return reference.causal_conv_step(x, state, weight, bias)


def conv_state(x: Tensor, width: int) -> Tensor:
    """Return the state [b, c, width - 1] with which `causal_conv_step` continues after the inputs x [b, l, c].

    The state is the last `width - 1` positions of `x`, padded with zeros in front if `x` is shorter.
    """
    return F.pad(x.mT, (width - 1 - x.shape[1], 0)).contiguous()


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `reference.selective_scan`. On CUDA, the returned state carries no gradient."""
    if not x.is_cuda:
        return reference.selective_scan(x, dt, A, B, C, D, z, dt_bias)
    if (
        z is not None
        and not torch.is_grad_enabled()
        and scan.supports(x, A.shape[0], A.shape[1], int(B.storage_offset()))
    ):
        y, _, state = scan.scan_forward(x, dt, z, B, C, A, D, dt_bias)
        return y, state
    # The kernel needs time as the last axis, and the same type for all inputs.
    x, dt, B, C = (part.to(x.dtype).mT.contiguous() for part in (x, dt, B, C))
    z = None if z is None else z.mT.contiguous()
    y, state = fused().selective_scan_fn(
        x, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
    )
    return y.mT, state.float().contiguous()


def selective_scan_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """Compute `reference.selective_scan_step`."""
    if x.is_cuda:
        update = fused().selective_state_update
        return update(state, x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=True)
    return reference.selective_scan_step(state, x, dt, A, B, C, D, z, dt_bias)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute `reference.ssd`."""
    if not x.is_cuda:
        return reference.ssd(x, dt, A, B, C, D, dt_bias, chunk_size)
    y, state = fused().mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True, return_final_states=True
    )
    return y, state.float().contiguous()


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """Compute `reference.ssd_step`."""
    if not x.is_cuda:
        return reference.ssd_step(state, x, dt, A, B, C, D, dt_bias)
    # The kernel recognises by strides of 0 that all channels of a head share their dt, A, D and dt_bias.
    _, heads, head_dim, d_state = state.shape
    dt, D, dt_bias = (part[..., None].expand(*part.shape, head_dim) for part in (dt, D, dt_bias))
    A = A[:, None, None].expand(heads, head_dim, d_state)
    return fused().selective_state_update(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)
