"""Measurements of a trained model: answers, reconstruction error, and what linear probes read from its states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablation.configs import Size
from benchmarks.ablation.data import Split
from benchmarks.ablation.scenes import KINDS, NONE, ORDINARY
from model.alignment import TARGET_EPS, align_target, patchify
from model.emma import Emma
from model.vision import Towers
from model.weights import LoadedModel
from pipeline.inference.engine import InferenceEngine
from pipeline.inference.requests import Request
from pipeline.visualization.states import default_layers
from preprocess.prompts import load_tokenizer

MAX_NEW_TOKENS = 12
IMAGES_PER_PASS = 32
RIDGE = 1e-3  # regularisation of the probes, relative to the mean variance of the states
TAPS = ("mixer", "residual")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model on its device, with its towers and the folder of its tokenizer."""

    emma: Emma
    towers: Towers
    tokenizer: Path
    device: torch.device

    def loaded(self) -> LoadedModel:
        """Return the model as the inference engine takes it: in bf16 on a GPU, like an exported model."""
        emma = Emma(self.emma.config).to(self.device)
        emma.load_state_dict(self.emma.state_dict())
        emma = emma.to(torch.bfloat16 if self.device.type == "cuda" else torch.float32).requires_grad_(False).eval()
        return LoadedModel(
            config=emma.config,
            emma=emma,
            towers=self.towers,
            tokenizer=self.tokenizer / "tokenizer.json",
            extra={},
            device=self.device,
        )


def measure_answers(model: Trained, data: Split) -> dict[str, Any]:
    """Answer every question about a split with the inference engine, each in a dialogue of its own.

    Returns: for each kind the number of questions (`total`), of right answers (`right`), and of questions whose answer
        is the most common one (`most_common`). As pairs of a number and the number of questions: `false_yes`, answers
        "yes" where the truth is "no"; and `false_none`, answers "none" to ordinary questions.
    """
    # CUDA graphs would take longer to capture than they save for so small a model.
    engine = InferenceEngine(model.loaded(), load_tokenizer(model.tokenizer), use_graphs=False)
    asked = [(question, image) for image, questions in enumerate(data.questions) for question in questions]

    def requests() -> Iterator[Request]:
        for question, image in asked:
            pixels = np.array(data.images[image])
            yield engine.request(question.question, pixels, max_new_tokens=MAX_NEW_TOKENS)

    texts = {index: completion.text for index, completion in engine.run(requests())}
    truths: dict[str, list[str]] = {kind: [] for kind in KINDS}
    right, false_yes, false_none = dict.fromkeys(KINDS, 0), 0, 0
    for index, (question, _) in enumerate(asked):
        truths[question.kind].append(question.answer)
        right[question.kind] += texts[index] == question.answer
        false_yes += question.answer == "no" and texts[index] == "yes"
        false_none += question.kind in ORDINARY and texts[index] == NONE
    return {
        "right": right,
        "total": {kind: len(answers) for kind, answers in truths.items()},
        "most_common": {kind: max(Counter(answers).values(), default=0) for kind, answers in truths.items()},
        "false_yes": [false_yes, truths["exists"].count("no")],
        "false_none": [false_none, sum(len(truths[kind]) for kind in ORDINARY)],
    }


@torch.no_grad()
def measure_reconstruction(model: Trained, data: Split) -> float | None:
    """Return the mean squared error of the model's own decoder, or None if it has no decoder of pixels."""
    config, alignment = model.emma.config, model.emma.alignment
    if alignment is None or config.alignment is None or config.alignment.target != "pixels":
        return None
    errors = []
    for pixels in _passes(data, len(data.images), model.device):
        features = model.towers(pixels)
        target = align_target(config, model.towers, pixels, features)
        with _autocast(model.device):
            visual = model.emma.projector(features.float())
            final, tapped = model.emma.llm(visual, config.alignment.taps, config.alignment.tap)
            errors.append(alignment((*tapped, final), target.values))
    return float(torch.cat(errors).mean())


# -- Linear probes -----------------------------------------------------------------------------------------------------


def measure_probes(model: Trained, size: Size, fit: Split, test: Split) -> dict[str, dict[str, float]]:
    """Fit linear probes on the states of each depth by ridge regression, and measure them on other images.

    A probe predicts the row, the column, the mean colour and the normalised pixels of a patch from the state at its
    position. The depths are "towers" (the input of the projector), "<tap> <layer>", and "final".

    Returns by depth: `position`, the share of right rows and columns; `colour` and `pixels`, the explained share of the
        variance (R²), which is below zero if the probe is worse than the mean.
    """
    states, targets = _states(model, fit, size.probe_images), _probe_targets(model, fit, size.probe_images)
    test_states, truth = _states(model, test, size.probe_images), _probe_targets(model, test, size.probe_images)
    widths = [size.grid, size.grid, 3, truth.shape[1] - 2 * size.grid - 3]
    found = {}
    for depth, x in states.items():
        rows, columns, colour, pixels = _ridge(x, targets, test_states[depth]).split(widths, 1)
        true_rows, true_columns, true_colour, true_pixels = truth.split(widths, 1)
        right = [(a.argmax(1) == b.argmax(1)).float().mean() for a, b in ((rows, true_rows), (columns, true_columns))]
        found[depth] = {
            "position": float(sum(right)) / 2,
            "colour": _explained(colour, true_colour),
            "pixels": _explained(pixels, true_pixels),
        }
    return found


@torch.no_grad()
def _states(model: Trained, data: Split, count: int) -> dict[str, Tensor]:  # [images * n, d] each
    """Return the visual states of the first images at each depth."""
    emma, layers = model.emma, default_layers(model.emma.config)
    kept: dict[str, list[Tensor]] = {}
    for pixels in _passes(data, count, model.device):
        features = model.towers(pixels).float()
        with _autocast(model.device):
            visual = emma.projector(features)
            final, mixers = emma.llm(visual, layers, "mixer")
            _, residuals = emma.llm(visual, layers, "residual")
        states = {"towers": features, "final": final}
        states |= {f"mixer {layer}": state for layer, state in zip(layers, mixers, strict=True)}
        states |= {f"residual {layer}": state for layer, state in zip(layers, residuals, strict=True)}
        for depth, state in states.items():
            kept.setdefault(depth, []).append(state.float().flatten(0, 1))
    return {depth: torch.cat(parts) for depth, parts in kept.items()}


def _probe_targets(model: Trained, data: Split, count: int) -> Tensor:  # [images * n, 2 * grid + 3 + values]
    """Return what the probes predict for each patch: row and column (one-hot), mean colour, normalised pixels."""
    vision, parts = model.emma.config.vision, []
    eye = torch.eye(vision.grid, device=model.device)
    rows, columns = eye.repeat_interleave(vision.grid, 0), eye.repeat(vision.grid, 1)
    for pixels in _passes(data, count, model.device):
        values = patchify(vision, pixels.float() / 255)  # [b, n, values]
        colour = values.unflatten(2, (-1, 3)).mean(2)
        normalised = (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True) + TARGET_EPS).sqrt()
        position = torch.cat([rows, columns], 1).expand(len(pixels), -1, -1)
        parts.append(torch.cat([position, colour, normalised], 2).flatten(0, 1))
    return torch.cat(parts)


def _ridge(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Fit y by a linear function of x [rows, d], and return its values for `x_test`."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = (x - mean_x).double()
    covariance = centred.T @ centred
    penalty = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), device=x.device, dtype=torch.float64)
    weights = torch.linalg.solve(covariance + penalty, centred.T @ (y - mean_y).double())
    return ((x_test - mean_x).double() @ weights).float() + mean_y


def _explained(predicted: Tensor, truth: Tensor) -> float:
    """Return R²: the explained share of the variance, over all values together."""
    return 1 - float((predicted - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def _passes(data: Split, count: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the first images of a split on the device, uint8 [b, 3, h, w]."""
    for start in range(0, min(count, len(data.images)), IMAGES_PER_PASS):
        images = np.array(data.images[start : min(start + IMAGES_PER_PASS, count)])
        yield torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
