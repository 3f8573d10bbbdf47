"""Mamba-1 and Mamba-2: mixers and blocks, with mamba_ssm's parameter names and initial values.

In training, a mixer is computed by one fused kernel on CUDA, as in mamba_ssm. On other devices, it is composed of the
operations in `model.kernels.dispatch`. `prefill` is composed of these operations on every device, because the fused
kernel does not return the states.

Mixers read the weights of their child modules directly, so ZeRO-3 must gather a mixer as one unit (a leaf module). A
forward pass calls each mixer at most once, with positional arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import MambaConfig
from model.kernels import dispatch
from model.kernels.mamba1 import scan
from model.kernels.mamba1.inner import mamba1_inner

NO_WEIGHT_DECAY = ("A_log", "D", "dt_bias")


class State(NamedTuple):
    """Recurrent state of a mixer. Decoding updates both tensors in place."""

    conv: Tensor  # [b, c, d_conv - 1]
    ssm: Tensor  # fp32; Mamba-1 [b, c, k], Mamba-2 [b, h, p, k]


Cache = list[State]


class Mixer(nn.Module):
    """Base class of both mixers, with their projections and convolution."""

    A_log: nn.Parameter

    def __init__(self, config: MambaConfig, in_width: int, conv_width: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.d_model, in_width, bias=False)
        self.conv1d = nn.Conv1d(conv_width, conv_width, config.d_conv, groups=conv_width, padding=config.d_conv - 1)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, d] -> [b, l, d]
        return self.fused(x) if x.is_cuda else self.prefill(x)[0]

    def fused(self, x: Tensor) -> Tensor:
        """Compute `forward` by one fused CUDA kernel."""
        raise NotImplementedError

    def prefill(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Return the output of `forward` and the state after the last position.

        Args:
            x: Inputs [b, l, d]. Positions of padding must be zero.
            mask: 0 at positions of padding, 1 elsewhere, in the type of `x` [b, l, 1]. Padding comes before the row's
                sequence. The convolution's output is multiplied by the mask, because the bias makes the output differ
                from zero where all inputs are zero. Then the state and the output stay zero until the sequence begins.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> Tensor:  # [b, d] -> [b, d]
        """Compute the output of one more position, and update `state` in place."""
        raise NotImplementedError

    @property
    def conv_parameters(self) -> tuple[Tensor, Tensor]:  # [c, d_conv], [c]
        """Weight and bias of the convolution."""
        assert self.conv1d.bias is not None
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    @property
    def decay_rates(self) -> Tensor:
        """A of the Mamba papers, in fp32. The values are negative, and the decay per position is exp(dt · A)."""
        return -torch.exp(self.A_log.float())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Mixer:
        """Mark the parameters without weight decay again, because `to_empty` on a meta module replaces them."""
        super()._apply(fn, recurse)
        mark_no_weight_decay(self)
        return self


class Mamba1Mixer(Mixer):
    """Mamba-1 mixer, the counterpart of mamba_ssm's `Mamba`."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config, 2 * config.d_inner, config.d_inner)
        self.x_proj = nn.Linear(config.d_inner, config.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, config.d_inner)
        self.dt_proj.bias = nn.Parameter(initial_dt_bias(config.d_inner))
        self.A_log = nn.Parameter(torch.arange(1.0, config.d_state + 1).log().repeat(config.d_inner, 1))
        self.D = nn.Parameter(torch.ones(config.d_inner))
        mark_no_weight_decay(self)

    def fused(self, x: Tensor) -> Tensor:
        if dispatch.use_own_scan() and scan.supports(x, self.config.d_inner, self.config.d_state, self.config.dt_rank):
            dt, constants = self.dt_proj, (self.dt_proj.bias.float(), self.decay_rates, self.D.float())
            weights = (*self.conv_parameters, self.x_proj.weight, dt.weight, *constants, self.out_proj.weight)
            return mamba1_inner(self.in_proj(x), *weights)
        batch, length, _ = x.shape
        # The kernel wants time last. Multiplying by the weight from the left gives this layout without a copy.
        xz = self.in_proj.weight @ x.flatten(0, 1).t()  # [2c, b * l]
        xz = xz.view(-1, batch, length).transpose(0, 1)  # [b, 2c, l]
        return dispatch.fused().mamba_inner_fn(
            xz,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            None,
            self.decay_rates,
            None,  # B and C depend on the input
            None,
            self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )

    def prefill(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, State]:
        x, z = self.in_proj(x).chunk(2, -1)  # [b, l, c]
        conv_state = dispatch.conv_state(x, self.config.d_conv)
        x = _masked(dispatch.causal_conv(x, *self.conv_parameters), mask)
        y, ssm_state = dispatch.selective_scan(x, *self._scan_inputs(x), z, self.dt_proj.bias.float())
        return self.out_proj(y), State(conv_state, ssm_state)

    def step(self, x: Tensor, state: State) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)  # [b, c]
        x = dispatch.causal_conv_step(x, state.conv, *self.conv_parameters)
        y = dispatch.selective_scan_step(state.ssm, x, *self._scan_inputs(x), z, self.dt_proj.bias.float())
        return self.out_proj(y)

    def _scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dt (before its bias), A, B, C and D of the scan over x [..., c]."""
        sizes = [self.config.dt_rank, self.config.d_state, self.config.d_state]
        dt, B, C = self.x_proj(x).split(sizes, -1)
        return dt @ self.dt_proj.weight.t(), self.decay_rates, B, C, self.D.float()


class Mamba2Mixer(Mixer):
    """Mamba-2 mixer, the counterpart of mamba_ssm's `Mamba2`. `in_proj` returns [z, x, B, C, dt]."""

    def __init__(self, config: MambaConfig) -> None:
        conv_width = config.d_inner + 2 * config.num_groups * config.d_state
        super().__init__(config, config.d_inner + conv_width + config.num_heads, conv_width)
        self.dt_bias = nn.Parameter(initial_dt_bias(config.num_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(config.num_heads))
        self.norm = GatedRMSNorm(config)
        mark_no_weight_decay(self)

    def fused(self, x: Tensor) -> Tensor:
        return dispatch.fused().mamba_split_conv1d_scan_combined(
            self.in_proj(x),
            *self.conv_parameters,
            self.dt_bias,
            self.decay_rates,
            D=self.D,
            chunk_size=self.config.chunk_size,
            activation="silu",
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.eps,
            outproj_weight=self.out_proj.weight,
            outproj_bias=None,
            headdim=self.config.head_dim,
            ngroups=self.config.num_groups,
            norm_before_gate=False,
        )

    def prefill(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, State]:
        z, xBC, dt = self._split_in_proj(x)
        conv_state = dispatch.conv_state(xBC, self.config.d_conv)
        x, B, C = self._split_conv(_masked(dispatch.causal_conv(xBC, *self.conv_parameters), mask))
        y, ssm_state = dispatch.ssd(x, dt, self.decay_rates, B, C, self.D, self.dt_bias, self.config.chunk_size)
        return self.out_proj(self.norm(y.flatten(-2), z)), State(conv_state, ssm_state)

    def step(self, x: Tensor, state: State) -> Tensor:
        z, xBC, dt = self._split_in_proj(x)
        x, B, C = self._split_conv(dispatch.causal_conv_step(xBC, state.conv, *self.conv_parameters))
        y = dispatch.ssd_step(state.ssm, x, dt, self.decay_rates, B, C, self.D, self.dt_bias)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _split_in_proj(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(x).split([self.config.d_inner, self.conv1d.in_channels, self.config.num_heads], -1)

    def _split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's output into x [..., h, p], B and C [..., g, k]."""
        groups = (self.config.num_groups, self.config.d_state)
        x, B, C = xBC.split([self.config.d_inner, math.prod(groups), math.prod(groups)], -1)
        return x.unflatten(-1, (-1, self.config.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


MIXERS: dict[str, Callable[[MambaConfig], Mixer]] = {"mamba1": Mamba1Mixer, "mamba2": Mamba2Mixer}


def mark_no_weight_decay(module: nn.Module) -> None:
    """Mark A_log, D and dt_bias as mamba_ssm does, so that the optimizer applies no weight decay to them."""
    for name, parameter in module.named_parameters(recurse=False):
        if name in NO_WEIGHT_DECAY:
            parameter._no_weight_decay = True  # type: ignore[attr-defined]


def initial_dt_bias(num: int) -> Tensor:
    """Return the inverse softplus of step sizes drawn log-uniformly from [0.001, 0.1], as in mamba_ssm."""
    dt = torch.exp(torch.rand(num) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


class GatedRMSNorm(nn.Module):
    """RMSNorm of x · silu(z), with a separate rms for each group of channels."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_inner))
        self.eps, self.groups = 1e-5, config.num_groups  # fixed in mamba_ssm; `norm_eps` is for the other norms

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return dispatch.gated_norm(x, z, self.weight, self.eps, self.groups)


class RMSNorm(nn.Module):
    """Add `hidden` to the fp32 residual stream, and normalise the sum. Returns (normalised sum, sum)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return dispatch.add_norm(hidden, residual, self.weight, self.eps)


class MambaBlock(nn.Module):
    """Add `hidden` to the residual stream, normalise the sum, and apply the mixer. Returns (mixer output, sum).

    The next block adds the mixer output to the residual stream.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[config.kind](config)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm(hidden, residual)
        return self.mixer(normed), residual

    def prefill(
        self, hidden: Tensor, residual: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        normed, residual = self.norm(hidden, residual)
        branch, state = self.mixer.prefill(normed, mask)
        return branch, residual, state

    def step(self, hidden: Tensor, residual: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm(hidden, residual)
        return self.mixer.step(normed, state), residual
