"""Training of one run in plain torch (AdamW, bf16 autocast), which can be interrupted and continued.

The model, its losses and its parameter groups are those of `pipeline.train`. DeepSpeed is not used, because its
start-up would take longer than a run.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablation.configs import SIZES, Run, Size, variant_config
from benchmarks.ablation.data import Split
from model.alignment import align_target
from model.config import EmmaConfig
from model.emma import Emma
from model.vision import Towers
from pipeline.optimizer import parameter_groups

WARMUP_RATIO, BETAS, WEIGHT_DECAY, CLIP = 0.05, (0.9, 0.95), 0.1, 1.0
CURVE_EVERY = 50  # steps between points of the loss curve


@dataclass(kw_only=True)
class Progress:
    """A training, finished or not.

    Attributes:
        curve: (step, text loss, alignment error) every CURVE_EVERY steps; the error is None without alignment.
        seconds: Time spent in training steps, over all calls.
    """

    emma: Emma
    optimizer: torch.optim.AdamW
    step: int = 0
    curve: list[tuple[int, float, float | None]] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name) for name in ("step", "curve", "seconds")}
        state |= {"emma": self.emma.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.emma.load_state_dict(state["emma"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve = [tuple(point) for point in state["curve"]]


def start(run: Run, device: torch.device) -> Progress:
    """Return a training before its first step. The seed determines the initial weights."""
    torch.manual_seed(run.seed)
    emma = Emma(variant_config(SIZES[run.size], run.variant)).to(device)
    groups = parameter_groups(emma, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, run.lr, betas=BETAS, fused=device.type == "cuda")
    return Progress(emma=emma, optimizer=optimizer)


def train(progress: Progress, run: Run, towers: Towers, data: Batches, *, until: float, save_to: Path | None) -> bool:
    """Train to the last step, or to the time `until`; then save the progress. Return whether the training is finished.

    Args:
        until: Time at which to stop, in seconds since 1970.
        save_to: File of the progress; None: the progress is not saved.
    """
    size = SIZES[run.size]
    config = progress.emma.config
    weight = run.align_factor * config.alignment.weight if config.alignment else 0.0
    began = time.monotonic()
    while progress.step < size.steps and time.time() < until:
        for group in progress.optimizer.param_groups:
            group["lr"] = run.lr * _schedule(progress.step, size.steps)
        text, align = _losses(progress.emma, config, towers, data.at(run.seed, progress.step))
        (text if align is None else text + weight * align).backward()
        torch.nn.utils.clip_grad_norm_(progress.emma.parameters(), CLIP)
        progress.optimizer.step()
        progress.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        if progress.step % CURVE_EVERY == 0 or progress.step == size.steps:
            progress.curve.append((progress.step, text.item(), None if align is None else align.item()))
    if data.device.type == "cuda":
        torch.cuda.synchronize()
    progress.seconds += time.monotonic() - began
    finished = progress.step == size.steps
    if save_to and not finished:
        progress.save(save_to)
    return finished


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warm-up, then cosine decay to zero."""
    warmup = max(1, int(WARMUP_RATIO * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _losses(emma: Emma, config: EmmaConfig, towers: Towers, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the mean loss of the supervised tokens, and the mean alignment error."""
    features = towers(batch.pixels)
    target = align_target(config, towers, batch.pixels, features).values if config.alignment else None
    with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=batch.pixels.is_cuda):
        losses = emma(batch.tokens, batch.targets, features, target)
    align = losses.align_error
    return losses.text_nll.sum() / losses.text_tokens.sum(), None if align is None else align.mean()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of images and dialogues: pixels uint8 [b, 3, h, w], tokens and targets int64 [b, t]."""

    pixels: Tensor
    tokens: Tensor
    targets: Tensor


class Batches:
    """The training data on the device, in an order that depends on the seed of a run."""

    def __init__(self, size: Size, data: Split, device: torch.device) -> None:
        self.size, self.device = size, device
        self.pixels = torch.from_numpy(np.array(data.images)).to(device)  # [images, h, w, 3]
        self.tokens = torch.from_numpy(np.array(data.tokens)).to(device)
        self.targets = torch.from_numpy(np.array(data.targets)).to(device)
        self.steps_per_epoch = len(self.pixels) // size.batch
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def at(self, seed: int, step: int) -> Batch:
        """Return the batch of a step. Every image occurs once per epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            self._order = (seed, epoch), torch.randperm(len(self.pixels), generator=generator).to(self.device)
        rows = self._order[1][position * self.size.batch : (position + 1) * self.size.batch]
        return Batch(
            pixels=self.pixels[rows].permute(0, 3, 1, 2).contiguous(),
            tokens=self.tokens[rows].long(),
            targets=self.targets[rows].long(),
        )
