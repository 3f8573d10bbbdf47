"""Configuration of a training run: the sections of a recipe, with the type, range and meaning of every key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from preprocess.strict_toml import Range

REPOSITORY = Path(__file__).resolve().parents[1]  # the checkout, or the folder in which the wheel is installed

Count = Annotated[int, Range(least=0)]
Positive = Annotated[int, Range(least=1)]
NonNegative = Annotated[float, Range(least=0)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shard set, and how it is read."""

    shards: str
    """Folder of the shard set."""

    tokenizer: str | None = None
    """Folder or hub id of the tokenizer that the shards must have been built with; null: the preset's."""

    epochs: Positive = 2
    """Number of passes over the shard set."""

    window: Positive = 200
    """Number of global batches whose samples are sorted by length together. 200 keeps padding below 1 %."""

    workers: Count = 2
    """Number of DataLoader workers per rank."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: NonNegative = 2e-5
    """Peak learning rate."""

    betas: Annotated[tuple[float, float], Range(least=0, most=0.999999)] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""

    eps: NonNegative = 1e-8
    """Epsilon of AdamW."""

    weight_decay: NonNegative = 0.1
    """Weight decay of matrices. Norms, biases, embeddings and the scans' own parameters have none."""

    clip: NonNegative = 1.0
    """Largest norm of the gradient; larger gradients are scaled down to it."""

    warmup_ratio: Annotated[float, Range(least=0, most=1)] = 0.03
    """Share of all steps in which the learning rate rises."""

    global_batch: Positive = 128
    """Samples per optimizer step, over all ranks."""

    micro_batch: Positive = 16
    """Samples per forward pass of one rank. It affects memory and speed, but not the result of the training."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses."""

    text: Literal["token", "sample"] = "token"
    """Text loss. token: mean over the step's supervised tokens; sample: mean over its samples of each sample's mean."""

    align_weight: Annotated[float | None, Range(least=0)] = None
    """Weight of the alignment loss; null: the preset's."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every_steps: Positive = 500
    """Steps between checkpoints."""

    keep_last: Positive = 3
    """Number of newest good checkpoints to keep."""

    keep_every: Count = 0
    """Keep every checkpoint forever whose step is a multiple of this number; 0: none."""

    background: bool = True
    """Whether training continues while a checkpoint is written; this takes host memory for a copy of the state."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """DeepSpeed, device, precision and activation memory."""

    ds_config: str = "ds_configs/zero3.json"
    """DeepSpeed configuration file. It holds settings of memory and communication only."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: a GPU if there is one."""

    precision: Literal["bf16", "fp32", "autocast"] = "bf16"
    """Precision of weights and activations. Optimizer states are always fp32."""

    segment_layers: Count = 4
    """Activation checkpointing: largest number of layers that are recomputed together; 0: recompute none."""

    keep_layers: Count = 0
    """Number of final layers that keep their activations instead of recomputing them."""

    memory_gib: Annotated[float | None, Range(least=1e-3)] = None
    """Memory to use per GPU, in GiB. If set, each launch measures how many `keep_layers` fit into it."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging of metrics."""

    every_steps: Positive = 10
    """Steps between log lines."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Whether to log to Weights & Biases too."""

    project: str = "emma"
    """Project in Weights & Biases."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out losses during training."""

    shards: str | None = None
    """Folder of the held-out shard set; null: no evaluation."""

    every_steps: Positive = 1000
    """Steps between evaluations."""

    samples: Positive = 512
    """Number of samples to evaluate."""

    draw_every_steps: Count = 0
    """Steps between drawings of held-out images into the run folder; 0: none."""

    draw_images: Positive = 4
    """Number of held-out images to draw."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Time limits after which a run that makes no progress is stopped, so that the job can be requeued."""

    slow_factor: NonNegative = 20.0
    """Stop if a step takes this many times the median step; 0: never stop."""

    least_s: NonNegative = 300.0
    """Never stop a step that has taken fewer seconds than this."""

    first_s: Annotated[float, Range(least=1)] = 1800.0
    """Time limit in seconds for start-up, each of the first steps, a checkpoint, an evaluation, and shutdown."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Pretrained weights. `random` stands for weights that are initialised from the seed."""

    init: str | None = None
    """Folder of an exported EMMA model to start from, which replaces both keys below; null: start from the preset's."""

    llm: str | None = None
    """Folder or hub id of the language model's weights; null: the preset's."""

    towers: str | None = None
    """Folder of the vision towers' weights, or `timm` for timm's on the hub; null: the preset's."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder."""

    dir: str
    """Folder for checkpoints, metrics and the resolved recipe. A launch with the same folder resumes the run."""
