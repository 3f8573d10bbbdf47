"""Greedy decoding of a Mamba language model with static buffers and fused kernels, captured as one CUDA graph.

A batch of up to `decode.MAX_VECTORS` sequences is decoded by matrix-vector products. A Mamba-2 layer then consists of
three kernels: in_proj with the norm and the convolution, the state update with the gate, and out_proj with the gated
norm and the residual. A Mamba-1 layer has a fourth kernel for x_proj.

A larger batch is decoded by matrix products on tensor cores. Each layer then has one more kernel, which adds up the
partial sums of out_proj, adds the result to the residual and normalises it. PyTorch computes the products with x_proj,
dt_proj and the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import decode
from model.kernels.cuda_graph import capture
from model.kernels.decode import Conv, Tile
from model.language_model import MambaLM
from model.mamba import Cache, Mamba1Mixer, Mamba2Mixer, MambaBlock, State


class Layer(NamedTuple):
    """Weights and states of a layer. A, D and dt_bias are converted to fp32 once, because every step needs them."""

    norm: Tensor  # [d]
    in_proj: Tensor  # [outputs, d]
    conv: Conv
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    ssm_state: Tensor  # Mamba-1 [b, c, k], Mamba-2 [b, h, p, k]
    out_proj: Tensor  # [d, c]
    gate_norm: Tensor | None  # Mamba-2
    x_proj: Tensor | None  # Mamba-1
    dt_weight: Tensor | None  # Mamba-1


class DecodeGraph:
    """Decoder of a fixed number of sequences, which it advances together.

    The decoder shares the weights of the model. Do not replace the weight tensors while the decoder is in use, because
    its CUDA graph has recorded their addresses.

    Args:
        llm: A `MambaLM` on a CUDA device, bf16 or fp32, with one group (`num_groups` 1).
        batch: Number of sequences; every step advances all of them.
        state_dtype: Type in which the SSM states are kept; arithmetic is fp32.
        dependent_launch: Whether kernels start before the previous kernel ends (programmatic dependent launch); None:
            if the GPU supports it (compute capability 9.0).
        graph: Whether a step replays a CUDA graph. Without it, the kernels are launched one by one.
        choose: Function that chooses the next tokens [b] from the logits [b, vocab], as part of the CUDA graph. None:
            choose the tokens with the largest logits.

    Raises: ValueError if the model has more than one group.
    """

    gate_eps = 1e-5  # same value as in `GatedRMSNorm`

    def __init__(
        self,
        llm: MambaLM,
        batch: int,
        *,
        state_dtype: torch.dtype = torch.float32,
        dependent_launch: bool | None = None,
        graph: bool = True,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config = llm.config
        if config.kind == "mamba2" and config.num_groups != 1:
            raise ValueError(f"num_groups is {config.num_groups}; the fused decode step supports 1")
        weight = llm.backbone.embedding.weight.detach()
        self.embedding, self.final_norm = weight, llm.backbone.norm_f.weight.detach()
        self.choose = choose
        self.batch, self.dtype, self.device = batch, weight.dtype, weight.device
        self.vectors = batch <= decode.MAX_VECTORS
        self.pdl = decode.supports_dependent_launch(self.device) if dependent_launch is None else dependent_launch
        self.layers = [self._layer(block, state_dtype) for block in llm.backbone.layers]
        self._allocate()
        self.graph = self._capture() if graph else None

    # -- Public --------------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> Cache:
        """Views of the decoder's states, in the layout of a prefill's states."""
        return [State(layer.conv.state.permute(1, 2, 0), layer.ssm_state) for layer in self.layers]

    def load(self, cache: Cache, rows: slice = slice(None)) -> None:
        """Copy the states that a prefill returned into the given rows of the batch."""
        for own, given in zip(self.cache, cache, strict=True):
            own.conv[rows].copy_(given.conv)
            own.ssm[rows].copy_(given.ssm)

    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Advance each sequence by one token, and return the logits [b, vocab].

        Afterwards, `self.tokens` [b] holds the token that was chosen for each row. The next step overwrites the logits
        and `self.tokens`.

        Args:
            tokens: Token of each sequence [b]; None: the tokens that the previous step chose.
        """
        if tokens is not None:
            self.tokens.copy_(tokens)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.logits

    # -- Buffers -----------------------------------------------------------------------------------------------------

    def _layer(self, block: MambaBlock, state_dtype: torch.dtype) -> Layer:
        mixer, config = block.mixer, self.config
        assert isinstance(mixer, Mamba1Mixer | Mamba2Mixer)
        second = isinstance(mixer, Mamba2Mixer)
        weight, bias = (part.detach() for part in mixer.conv_parameters)
        conv_state = torch.zeros(config.d_conv - 1, self.batch, len(bias), dtype=self.dtype, device=self.device)
        ssm_shape = (config.num_heads, config.head_dim) if second else (config.d_inner,)
        dt_bias = mixer.dt_bias if isinstance(mixer, Mamba2Mixer) else mixer.dt_proj.bias
        return Layer(
            norm=block.norm.weight.detach(),
            in_proj=mixer.in_proj.weight.detach(),
            conv=Conv(conv_state, weight.t().contiguous(), bias, start=config.d_inner if second else 0),
            A=mixer.decay_rates.detach().contiguous(),
            D=mixer.D.detach().float(),
            dt_bias=dt_bias.detach().float(),
            ssm_state=self._zeros(*ssm_shape, config.d_state, dtype=state_dtype),
            out_proj=mixer.out_proj.weight.detach(),
            gate_norm=mixer.norm.weight.detach() if isinstance(mixer, Mamba2Mixer) else None,
            x_proj=mixer.x_proj.weight.detach() if isinstance(mixer, Mamba1Mixer) else None,
            dt_weight=mixer.dt_proj.weight.detach() if isinstance(mixer, Mamba1Mixer) else None,
        )

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(self.batch, *shape, dtype=dtype or self.dtype, device=self.device)

    def _allocate(self) -> None:
        config, layer, fp32 = self.config, self.layers[0], torch.float32
        weights = {"in": layer.in_proj, "x": layer.x_proj, "out": layer.out_proj, "head": self.embedding}
        self.tiles: dict[str, Tile] = {name: decode.tile_for(w) for name, w in weights.items() if w is not None}
        self.tokens = self._zeros(dtype=torch.int64)
        self.residual = self._zeros(config.d_model, dtype=fp32)
        self.x = self._zeros(config.d_model)
        self.projected = self._zeros(layer.in_proj.shape[0])
        self.y = self._zeros(config.d_inner)
        self.y_sums = None
        if layer.gate_norm is not None:
            block = decode.mamba2_block(config.head_dim)
            self.y_sums = self._zeros(config.d_inner // block, dtype=fp32)
        if layer.x_proj is not None:
            self.dbc = self._zeros(layer.x_proj.shape[0])
        if self.vectors:
            self.sums: Tensor | None = self._zeros(decode.num_programs(layer.out_proj, self.tiles["out"]), dtype=fp32)
            num_best = decode.num_programs(self.embedding, self.tiles["head"])
            self.best_value = self._zeros(num_best, dtype=fp32)
            self.best_index = self._zeros(num_best, dtype=torch.int32)
            self.logits = self._zeros(config.vocab_size, dtype=fp32)
        else:
            self.sums = None
            self.in_tile = decode.matmul_tile_for(layer.in_proj, split=False)
            self.out_tile = decode.matmul_tile_for(layer.out_proj, split=True)
            self.branch = torch.zeros(self.out_tile.splits, self.batch, config.d_model, dtype=fp32, device=self.device)
            self.dt = self._zeros(config.d_inner)
            self.logits = self._zeros(config.vocab_size)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record a step as a CUDA graph, and reset the states to zero."""
        graph, _ = capture(self._run, self.device)
        self.tokens.zero_()
        for layer in self.layers:
            layer.conv.state.zero_()
            layer.ssm_state.zero_()
        return graph

    # -- One step ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        eps = self.config.norm_eps
        first = self.layers[0].norm
        decode.embed(self.tokens, self.embedding, first, self.residual, self.x, self.sums, eps)
        run_layer = self._vector_layer if self.vectors else self._matrix_layer
        for layer, next_norm in self._layers_with_next_norm():
            run_layer(layer, next_norm)
        if self.sums is None:
            torch.mm(self.x, self.embedding.t(), out=self.logits)
            values, indices = self.logits, None
        else:
            tile, best = self.tiles["head"], (self.best_value, self.best_index)
            decode.project_vocabulary(self.embedding, self.x, self.sums, eps, self.logits, *best, tile, self.pdl)
            values, indices = best
        if self.choose is None:
            decode.argmax(values, indices, self.tokens, self.pdl)
        else:
            self.tokens.copy_(self.choose(self.logits))

    def _layers_with_next_norm(self) -> Iterator[tuple[Layer, Tensor]]:
        norms = [layer.norm for layer in self.layers[1:]] + [self.final_norm]
        return zip(self.layers, norms, strict=True)

    def _vector_layer(self, layer: Layer, next_norm: Tensor) -> None:
        assert self.sums is not None
        eps, tiles, pdl = self.config.norm_eps, self.tiles, self.pdl
        decode.project(layer.in_proj, self.x, self.sums, eps, self.projected, layer.conv, tiles["in"], pdl)
        if layer.x_proj is not None:
            x = self.projected[:, : self.config.d_inner]
            decode.project(layer.x_proj, x, None, eps, self.dbc, None, tiles["x"], pdl)
        self._update(layer, None)
        decode.project_residual(
            layer.out_proj,
            self.y,
            self.y_sums,
            self.gate_eps,
            self.residual,
            next_norm,
            self.x,
            self.sums,
            tiles["out"],
            pdl,
        )

    def _matrix_layer(self, layer: Layer, next_norm: Tensor) -> None:
        decode.matmul(layer.in_proj, self.x, self.projected[None], layer.conv, self.in_tile, self.pdl)
        dt = None
        if layer.x_proj is not None and layer.dt_weight is not None:
            torch.mm(self.projected[:, : self.config.d_inner], layer.x_proj.t(), out=self.dbc)
            dt = torch.mm(self.dbc[:, : self.config.dt_rank], layer.dt_weight.t(), out=self.dt)
        self._update(layer, dt)
        decode.matmul(layer.out_proj, self.y, self.branch, None, self.out_tile, self.pdl)
        decode.add_norm(
            self.branch,
            self.y_sums,
            self.config.d_inner,
            self.gate_eps,
            self.residual,
            next_norm,
            self.x,
            self.config.norm_eps,
            self.pdl,
        )

    def _update(self, layer: Layer, dt: Tensor | None) -> None:
        constants, state = (layer.A, layer.D), layer.ssm_state
        if layer.gate_norm is not None and self.y_sums is not None:
            decode.mamba2_update(
                self.projected, state, *constants, layer.dt_bias, layer.gate_norm, self.y, self.y_sums, self.pdl
            )
        elif layer.dt_weight is not None:
            decode.mamba1_update(
                self.projected, self.dbc, dt, layer.dt_weight, layer.dt_bias, *constants, state, self.y, self.pdl
            )
