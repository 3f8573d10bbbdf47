"""Access to DeepSpeed's ZeRO internals: flat fp32 buffers, Adam's state, gradients. No other module touches them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)  # the fp32 tensors that ZeRO keeps for each buffer


@dataclass(frozen=True)
class Piece:
    """A range of a flattened parameter: `count` values that begin at `start`, stored at `offset` of a buffer."""

    name: str
    start: int
    count: int
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A flat fp32 buffer of this rank, which the optimizer updates as one parameter. Padding belongs to no piece."""

    master: torch.Tensor
    group: int  # index into the optimizer's param_groups
    pieces: tuple[Piece, ...]


def zero_buffers(engine: Engine) -> list[Buffer]:
    """Return the buffers of this rank, in the order of ZeRO's groups."""
    buffers = _stage_3_buffers if engine.zero_optimization_stage() == 3 else _stage_2_buffers
    return list(buffers(engine.optimizer, engine.param_names))


def _stage_3_buffers(zero: Any, names: Mapping[torch.nn.Parameter, str]) -> Iterator[Buffer]:
    """Yield the buffers of stage 3, which splits each parameter into one equal part per rank and pads the last."""
    rank = dist.get_rank()
    for index, parameters in enumerate(zero.fp16_groups):
        pieces, offset = [], 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = rank * size
            pieces.append(Piece(names[parameter], start, min(size, parameter.ds_numel - start), offset))
            offset += size
        yield Buffer(
            master=zero.fp32_partitioned_groups_flat[index],
            group=zero.sub_group_to_group_id[index],
            pieces=tuple(piece for piece in pieces if piece.count > 0),
        )


def _stage_2_buffers(zero: Any, names: Mapping[torch.nn.Parameter, str]) -> Iterator[Buffer]:
    """Yield the buffers of stages 1 and 2, which concatenate a group and split it into one equal part per rank."""
    rank = dist.get_rank()
    for group, parameters in enumerate(zero.round_robin_bit16_groups):
        master = zero.single_partition_of_fp32_groups[group]
        first = rank * master.numel()
        pieces = []
        for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
            begin, end = max(offset, first), min(offset + parameter.numel(), first + master.numel())
            if begin < end:
                pieces.append(Piece(names[parameter], begin - offset, end - begin, begin - first))
        yield Buffer(master=master, group=group, pieces=tuple(pieces))


def parameter_shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the shape of each trained parameter before sharding."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for p, name in engine.param_names.items()}


def tied_names(engine: Engine) -> dict[str, str]:
    """Map each additional name of a tied parameter to the name under which the parameter is saved."""
    named = engine.module.named_parameters(remove_duplicate=False)
    return {name: engine.param_names[p] for name, p in named if engine.param_names[p] != name}


def adam_state(engine: Engine, buffer: Buffer) -> dict[str, Any]:
    """Return `step`, `exp_avg` and `exp_avg_sq` of a buffer. The dict is empty before Adam's first update."""
    state: dict[str, Any] = engine.optimizer.optimizer.state.get(buffer.master, {})
    return state


def missing_moment_bytes(engine: Engine) -> int:
    """Return the bytes that Adam will allocate on this rank at its first update, or 0 after that."""
    missing = [buffer for buffer in zero_buffers(engine) if not adam_state(engine, buffer)]
    return sum(len(MOMENTS) * buffer.master.nbytes for buffer in missing)


def restore(
    engine: Engine, buffers: Sequence[Buffer], values: Mapping[tuple[int, str], torch.Tensor], updates: float
) -> None:
    """Overwrite masters and moments, then derive the compute weights from the masters.

    Must be called on every rank, because ZeRO-3 then gathers its persistent weights.

    Args:
        values: a flat tensor for each buffer index and each of KINDS.
        updates: the number of updates that Adam has done, on which its bias correction depends.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero.checkpoint_event_prologue()
    for index, buffer in enumerate(buffers):
        buffer.master.data.copy_(values[index, "master"])
        moments = {kind: values[index, kind].to(buffer.master.device, copy=True) for kind in MOMENTS}
        zero.optimizer.state[buffer.master] = {"step": _step_tensor(zero.optimizer, buffer, updates), **moments}
    if stage == 3:
        for low, high in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            low.data.copy_(high.data)
        zero.checkpoint_event_epilogue()
    else:
        zero.update_lp_params()


def _step_tensor(adam: torch.optim.Optimizer, buffer: Buffer, updates: float) -> torch.Tensor:
    """Allocate Adam's step count as AdamW does. Each buffer needs its own tensor, which AdamW increments in place."""
    group = adam.param_groups[buffer.group]
    device = buffer.master.device if group["fused"] or group["capturable"] else torch.device("cpu")
    return torch.tensor(updates, dtype=torch.float32, device=device)


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def clear_gradients(engine: Engine) -> None:
    """Set all gradients to zero. Must be called on every rank before the first backward pass of a step.

    Under ZeRO-3, a parameter that a step does not use keeps the gradient of an earlier step, and would be updated with
    that gradient again. In a text-only batch this would happen to the projector, the fusion and the decoder.
    """
    if torch.is_tensor(flat := _flat_gradients(engine)):
        flat.zero_()


def discard_gradients(engine: Engine) -> None:
    """Discard the gradients of a backward pass that no update follows."""
    engine.optimizer.zero_grad()
    clear_gradients(engine)


def check_partition(engine: Engine) -> None:
    """Raise RuntimeError if this DeepSpeed version lacks the buffer that `clear_gradients` sets to zero."""
    if engine.zero_optimization_stage() == 3 and not torch.is_tensor(_flat_gradients(engine)):
        raise RuntimeError(
            "this DeepSpeed version has no grad_partitions_flat_buffer; text-only steps would reuse stale gradients"
        )


def _flat_gradients(engine: Engine) -> Any:
    return getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
