"""Model card of an exported folder, filled with the facts of the run."""

from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from model.presets import MAMBA1_2P8B, MAMBA2_2P7B
from model.transformers_layout import dtype_name
from pipeline.initial_model import llm_source, tower_source
from pipeline.metrics.history import History, read_history
from pipeline.recipe import Recipe
from preprocess.shards.manifest import Manifest

PACKAGES = ("emma-pipeline", "torch", "deepspeed", "timm", "transformers", "tokenizers")
APACHE, UNKNOWN = "Apache-2.0", "see its own page"
LICENCES = {
    MAMBA1_2P8B.weights: UNKNOWN,
    MAMBA2_2P7B.weights: APACHE,
    "vit_large_patch14_reg4_dinov2.lvd142m": APACHE,
    "vit_so400m_patch14_siglip_384": APACHE,
    "EleutherAI/gpt-neox-20b": APACHE,
}


def model_card(recipe: Recipe, manifest: Manifest, *, step: int, run: Path | None, dtype: torch.dtype) -> str:
    """Return the README.md of an exported folder.

    Args:
        recipe: Recipe of the run.
        manifest: Manifest of the shards that the run was trained on.
        step: Step of the exported checkpoint.
        run: Run folder, whose metrics the card cites; None for a model before its first step.
        dtype: Type of the exported weights.
    """
    sections = [
        _front_matter(recipe),
        _introduction(recipe, dtype),
        LOADING,
        _training(recipe, step, run),
        _data(manifest),
        _parts(recipe),
        _versions(),
        _recipe(recipe),
    ]
    return "\n".join(section.strip("\n") + "\n" for section in sections)


LOADING = """
## How to load it

With transformers 5.17 or newer, and without emma-pipeline:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
```

Replace `FOLDER` by this folder or its name on the hub. Then ask a question about an image:

```python
content = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What colour is the car?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The model sees one image per dialogue, and the image comes before the text. Batches must be padded on the left, as the
processor does.

For LoRA, choose the layers `in_proj`. Adapters on `out_proj` have no effect on a GPU with the kernels of mamba-ssm,
because the fused kernel reads the weight of `out_proj` directly.
"""


def _front_matter(recipe: Recipe) -> str:
    base = llm_source(recipe)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "license: other",
        "license_name: depends-on-parts-and-data",
        *([f"base_model: {base}"] if base and base == recipe.config.llm.weights else []),
        "tags: [emma, mamba, vision-language]",
        "---",
    ]
    return "\n".join(lines)


def _introduction(recipe: Recipe, dtype: torch.dtype) -> str:
    config = recipe.config
    image_px = config.vision.image_px
    mamba = {"mamba1": "Mamba-1", "mamba2": "Mamba-2"}[config.llm.kind]
    return f"""
# {recipe.model}

A vision-language model, trained by emma-pipeline as preset `{recipe.model}` of EMMA
([arXiv 2410.05938](https://arxiv.org/abs/2410.05938)).
Its language model is {mamba} with {config.llm.num_layers} layers of width {config.llm.d_model}.
It sees images of {image_px}×{image_px} pixels through the frozen vision towers
{" and ".join(tower.name for tower in config.vision.towers)}. The weights are stored as {dtype_name(dtype)}.
"""


def _training(recipe: Recipe, step: int, run: Path | None) -> str:
    if run is None:
        return "## Training\n\nThis is the initial model, before any training step."
    history = _history(run)
    rows: list[tuple[str, Any]] = [
        ("steps done", f"{step} of {history.total_steps or recipe.steps or 'unknown'}"),
        ("samples per step", recipe.optim.global_batch),
        ("peak learning rate", f"{recipe.optim.lr:g}"),
        ("weight of the alignment loss", f"{recipe.align_weight:g}"),
        ("precision", recipe.engine.precision),
        ("fingerprint of the recipe", f"`{recipe.fingerprint()}`"),
    ]
    before = [logged for logged in history.losses if logged <= step]
    if before:
        text, align = history.losses[max(before)]
        rows += _loss_rows(f"at step {max(before)}", text, align)
    measured = [logged for logged in history.heldout if logged <= step]
    if measured:
        text, align = history.heldout[max(measured)]
        rows += _loss_rows(f"on held-out samples at step {max(measured)}", text, align)
    note = "" if measured else "\nThe run measured no loss on held-out samples up to this step.\n"
    return f"## Training\n\n{_table(('what', 'value'), rows)}{note}"


def _history(run: Path) -> History:
    """Return the history of a run, which is empty if its metrics were lost."""
    try:
        return read_history(run)
    except UserError:
        return History()


def _loss_rows(when: str, text: float, align: float | None) -> list[tuple[str, str]]:
    losses = {"text loss": text, "alignment loss": align}
    return [
        (f"{name} {when}", f"{loss:.4f}") for name, loss in losses.items() if loss is not None and math.isfinite(loss)
    ]


def _data(manifest: Manifest) -> str:
    rows = [(name, counts["samples"]) for name, counts in manifest.sources.items()]
    counts = manifest.counts
    return f"""
## Data

{counts["samples"]} samples, {counts["with_image"]} of them with an image.
The manifest of the shard set has the sha256 `{manifest.sha256}`.

{_table(("source", "samples"), rows)}
The licence of each source applies to models that were trained on it. Check it before you publish or use this model.
"""


def _parts(recipe: Recipe) -> str:
    config = recipe.config
    if recipe.weights.init:
        init = f"the exported model `{Path(recipe.weights.init).name}`, sha256 `{recipe.init_sha256()}`"
        return f"## Parts\n\nTraining began from {init}. Its model card lists the parts and their licences."
    tower_origin = tower_source(recipe)
    towers = [
        (f"vision tower {tower.name}", tower.timm_name if tower_origin else "random weights")
        for tower in config.vision.towers
    ]
    source = llm_source(recipe) or "random weights"
    llm = ("language model", Path(source).name if Path(source).is_dir() else source)  # not the path on this machine
    rows = [llm, *towers, ("tokenizer", config.tokenizer or "the user's own")]
    licensed = [
        (part, name, LICENCES.get(name, "none" if name == "random weights" else UNKNOWN)) for part, name in rows
    ]
    return f"## Parts\n\n{_table(('part', 'origin', 'licence'), licensed)}\nThe code in this folder is Apache-2.0."


def _versions() -> str:
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    rows = [(package, installed[package]) for package in PACKAGES if package in installed]
    return f"## Versions\n\nExported with:\n\n{_table(('package', 'version'), rows)}"


def _recipe(recipe: Recipe) -> str:
    settings = {key: value for key, value in recipe.identity().items() if key != "architecture"}
    text = json.dumps(settings, indent=2)
    return f"## Recipe\n\nThe settings that determine the result of the training:\n\n```json\n{text}\n```"


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
