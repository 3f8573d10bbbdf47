"""Model FLOP utilisation (MFU): useful operations of the batches, and peak operations per second of the devices."""

from __future__ import annotations

import torch

from model.config import EmmaConfig
from pipeline.data.batch import GlobalBatch
from pipeline.distributed.ranks import Ranks
from pipeline.flops import flops_per_sample, mamba_layer_flops

# Dense bf16 operations per second, from the vendors' data sheets. If several names match a device, the longest wins.
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
    "MI250X": 191.5e12,  # for each of its two devices
    "MI300X": 1307.4e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return a device's peak operations per second, or None for a device that is not in the table."""
    words = f" {device_name.replace('-', ' ')} "
    matches = [name for name in PEAK_FLOPS if f" {name} " in words]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def peak_flops_of_ranks(ranks: Ranks) -> float | None:
    """Return the peak operations per second of all ranks together, assuming equal devices.

    Return None on the CPU and for a device that is not in the table.
    """
    if ranks.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(ranks.device))
    return peak and peak * ranks.world_size


class UsefulFlops:
    """Count the operations that a batch needs, without padding and recomputation."""

    def __init__(self, config: EmmaConfig):
        self.llm = config.llm
        image = flops_per_sample(config, text_tokens=0, supervised=0, segment_layers=0, keep_layers=0)
        image_and_one = flops_per_sample(config, text_tokens=0, supervised=1, segment_layers=0, keep_layers=0)
        self.per_supervised_token = image_and_one.useful - image.useful
        # The language model's share is subtracted, because `of_batch` counts visual and text tokens as one sequence.
        num_patches = config.vision.num_patches
        self.per_image = image.useful - self._language_model(num_patches, length=num_patches)

    def of_batch(self, batch: GlobalBatch) -> float:
        """Return the floating-point operations of a global batch.

        All sequences are assumed to have the mean length, which is nearly exact because batches are sorted by length.
        """
        language_model = self._language_model(batch.tokens, length=round(batch.tokens / batch.samples))
        return language_model + self.per_image * batch.images + self.per_supervised_token * batch.supervised_tokens

    def _language_model(self, tokens: int, *, length: int) -> float:
        """Return the operations of a forward and backward pass over `tokens`, in sequences of `length`."""
        return 3 * self.llm.num_layers * mamba_layer_flops(self.llm, length) / length * tokens
