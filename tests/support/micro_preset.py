"""The preset `micro_v2`, which is so small that its checkpoints can be kept in git.

To run a command of the pipeline with this preset:

    python -m tests.support.micro_preset pipeline.train RECIPE key=value …
"""

import runpy
import sys
from dataclasses import replace

from model.config import EmmaConfig
from model.presets import PRESETS, alignment_weight, paper_taps

NAME = "micro_v2"


def config() -> EmmaConfig:
    full = PRESETS["tiny_v2"]
    assert full.alignment is not None
    towers = tuple(
        replace(tower, width=16, overrides={**tower.overrides, "embed_dim": 16, "num_heads": 2})
        for tower in full.vision.towers
    )
    vision = replace(full.vision, towers=towers)
    llm = replace(full.llm, d_model=32, num_layers=4, vocab_size=288, d_state=8, head_dim=16)
    alignment = replace(
        full.alignment,
        taps=paper_taps(llm.num_layers),
        head_dim=16,
        decoder_layers=1,
        weight=alignment_weight(full.alignment.num_values, vision.num_patches),
    )
    return replace(full, name=NAME, vision=vision, llm=llm, alignment=alignment)


if __name__ == "__main__":
    PRESETS[NAME] = config()
    module = sys.argv.pop(1)
    sys.argv[0] = module
    runpy.run_module(module, run_name="__main__")
