"""Compatibility check: a shard set must have been built for the image size, prompt template and tokenizer in use."""

from __future__ import annotations

from model.errors import UserError
from pipeline.recipe import Recipe
from preprocess.prompts import load_tokenizer
from preprocess.shards.manifest import Manifest


def check_shards_match_model(manifest: Manifest, recipe: Recipe) -> None:
    """Check that image size, prompt template and tokenizer of the shards match the recipe. Raises: UserError."""
    config = recipe.config
    for name, actual, expected in (
        ("image size", manifest.image["px"], config.vision.image_px),
        ("prompt template", manifest.template, config.template),
    ):
        if actual != expected:
            raise UserError(
                f"data.shards: {recipe.data.shards}: {name} is {actual!r}, model {recipe.model!r} needs {expected!r}; "
                f"build shards with --model {recipe.model}"
            )
    _check_tokenizer(manifest, recipe)
    if manifest.tokenizer["vocab_size"] > config.llm.vocab_size:
        raise UserError(
            f"data.shards: {recipe.data.shards}: tokenizer {manifest.tokenizer['name']!r} has "
            f"{manifest.tokenizer['vocab_size']} entries, but model {recipe.model!r} has only "
            f"{config.llm.vocab_size} embeddings; build the shards with the model's own tokenizer"
        )


def _check_tokenizer(manifest: Manifest, recipe: Recipe) -> None:
    """Compare tokenizers by content if the recipe gives a tokenizer folder, otherwise by name."""
    folder, used = recipe.data.tokenizer, manifest.tokenizer
    expected = folder or recipe.config.tokenizer
    if expected is None:
        return
    matches = load_tokenizer(folder).sha256 == used["sha256"] if folder else expected == used["name"]
    if not matches:
        raise UserError(
            f"data.shards: {recipe.data.shards}: tokenized with {used['name']!r}, expected {expected!r}; build the "
            f"shards with --tokenizer {expected}, or set data.tokenizer to a copy of the tokenizer used"
        )
