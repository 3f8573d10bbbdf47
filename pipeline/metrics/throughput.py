"""How much of the hardware a run uses: useful operations of its batches, over what the devices could do."""

from __future__ import annotations

import torch

from model.config import EmmaConfig
from pipeline.data.loader import GlobalBatch
from pipeline.distributed.ranks import Ranks
from pipeline.flops import flops_per_sample, mamba_layer_flops

# Dense bf16 operations per second, by the makers' data sheets; the longest of these words in a device's name counts.
PEAK_FLOPS = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989e12,
    "H800": 989e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX A6000": 154.8e12,
    "MI250X": 191.5e12,  # each of its two devices
    "MI300X": 1307.4e12,
}


def peak_flops(device_name: str) -> float | None:
    """None for a device that the table does not know."""
    words = f" {device_name.replace('-', ' ')} "
    known = [name for name in PEAK_FLOPS if f" {name} " in words]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def peak_of_ranks(ranks: Ranks) -> float | None:
    """Of all ranks together, taking their devices for alike; None on the CPU and on unknown devices."""
    if ranks.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(ranks.device))
    return peak and peak * ranks.world_size


class UsefulFlops:
    """Operations that a batch needs: nothing for padding, nothing for recomputing."""

    def __init__(self, config: EmmaConfig):
        self.llm = config.llm
        picture = flops_per_sample(config, text_tokens=0, supervised=0, segment_layers=0, keep_layers=0)
        self.per_supervised = (
            flops_per_sample(config, text_tokens=0, supervised=1, segment_layers=0, keep_layers=0).useful
            - picture.useful
        )
        # A picture's positions are counted with the text's, which follow in the same sequence.
        self.per_picture = picture.useful - self._language(config.vision.num_patches, config.vision.num_patches)

    def of(self, batch: GlobalBatch) -> float:
        """Of the whole global batch; its sequences are taken to be of one length, which windows make nearly true."""
        language = self._language(batch.tokens, round(batch.tokens / batch.samples))
        return language + self.per_picture * batch.images + self.per_supervised * batch.supervised_tokens

    def _language(self, positions: int, length: int) -> float:
        """Forward and backward passes of the layers over `positions`, in sequences of `length`."""
        return 3 * self.llm.num_layers * mamba_layer_flops(self.llm, length) / length * positions
