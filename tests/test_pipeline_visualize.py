"""Visualization: maps and redrawn images against plain forward passes, the command, and drawings during training."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from model.alignment import align_target, unpatchify
from model.emma import Emma
from model.errors import UserError
from model.presets import PRESETS
from model.vision import Towers
from model.weights import LoadedModel, load_model, save_model
from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.engine import Engine
from pipeline.initial_model import initial_model
from pipeline.recipe import load_recipe
from pipeline.visualization.held_out import HeldOutImages
from pipeline.visualization.states import default_layers, look_inside
from preprocess.images.codec import read_image_file
from tests.support import micro_preset
from tests.support.launch import fork_python
from tests.support.tiny_data import write_byte_tokenizer

CONFIG = micro_preset.config()
VISION = CONFIG.vision


def save(folder: Path, config=CONFIG) -> Path:
    torch.manual_seed(1)
    tokenizer = (write_byte_tokenizer(folder.parent / "tokenizer") / "tokenizer.json").read_text()
    state, towers = Emma(config).state_dict(), Towers(config.vision)
    save_model(folder, config=config, state=state, towers=towers, tokenizer_json=tokenizer, extra={})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "emma")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model without a decoder, under the name of a folder that HTML must escape."""
    return save(tmp_path_factory.mktemp("models") / "a<b", replace(CONFIG, alignment=None))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def pixels(image: Path):
    return read_image_file(image, VISION.image_px)


def features_of(model: LoadedModel, pixels) -> torch.Tensor:
    return model.towers(torch.from_numpy(pixels).permute(2, 0, 1)[None])


def norms(states: torch.Tensor) -> np.ndarray:
    """Return the norm of each visual position, on the grid."""
    return states[0, : VISION.num_patches].square().sum(-1).sqrt().view(VISION.grid, VISION.grid).numpy()


@pytest.mark.parametrize("tap", ["mixer", "residual"])
def test_maps_equal_the_states_that_hooks_see_in_a_plain_forward_pass_with_text(model, pixels, tap):
    seen = []
    for layer in model.emma.llm.backbone.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        hidden, _ = model.emma.llm(torch.cat(model.emma.embed(tokens, features_of(model, pixels)), 1))
    for layer in model.emma.llm.backbone.layers:
        layer._forward_hooks.clear()
    layers = [0, 2, 3]
    maps = look_inside(model, pixels, layers, tap=tap, title="m")
    expected = [norms(seen[layer][0] if tap == "mixer" else seen[layer][0] + seen[layer][1]) for layer in layers]
    assert list(maps.depths) == ["layer 0", "layer 2", "layer 3", "final"]
    for found, values in zip(maps.depths.values(), [*expected, norms(hidden)], strict=True):
        np.testing.assert_allclose(found, values, rtol=1e-5)
    assert np.array_equal(maps.image, pixels[: VISION.seen_px, : VISION.seen_px])


def test_the_redrawn_images_are_the_decoders_predictions_at_each_fusion_stage(model, pixels):
    redrawn = look_inside(model, pixels, [0], tap="mixer", title="m").redrawn
    assert [each.stage for each in redrawn] == [
        "patch means only",
        "layer 1 alone",
        "+ layer 2",
        "+ layer 3",
        "+ final state",
    ]
    features = features_of(model, pixels)
    target = align_target(CONFIG, model.towers, torch.from_numpy(pixels).permute(2, 0, 1)[None], features)
    alignment = model.emma.alignment
    assert alignment is not None
    assert CONFIG.alignment is not None
    with torch.no_grad():
        hidden, tapped = model.emma.llm(
            model.emma.embed(torch.zeros(1, 0, dtype=torch.long), features)[0], CONFIG.alignment.taps
        )
        fused = [tapped[0]]
        for block, level in zip(alignment.fusion.blocks, [*tapped[1:], hidden], strict=True):
            fused.append(block(fused[-1], level))
        values = [torch.zeros_like(target.values), *(alignment.out(alignment.decoder(x)[0]) for x in fused)]
        loss = alignment((*tapped, hidden), target.values)
    for found, predicted in zip(redrawn, values, strict=True):
        drawn = unpatchify(VISION, predicted, target.mean, target.std)[0].permute(1, 2, 0).numpy()
        assert np.abs(found.pixels.astype(int) - drawn).max() <= 1
    assert redrawn[-1].error == pytest.approx(loss.item(), rel=1e-5)


def test_default_layers_contain_the_tapped_layers_or_the_papers(model):
    assert default_layers(PRESETS["emma_v2"]) == [0, 12, 24, 36, 48, 63]
    assert default_layers(PRESETS["no_mff_v2"]) == default_layers(PRESETS["cobra_v2"]) == [0, 12, 24, 36, 48, 63]


def test_the_command_writes_a_png_and_a_page_that_needs_no_other_file(folder, baseline, image, tmp_path):
    words = [folder, "--image", image, "--compare", baseline, "--question", "What <is> it?", "--device", "cpu"]
    done = fork_python("-m", "pipeline.visualize", *words, "--layers", "3", "0", "--out", tmp_path / "a/b")
    assert done.returncode == 0, done.stderr
    [note] = done.stderr.splitlines()
    assert note.startswith(f"{baseline}: this folder has no decoder")
    with Image.open(tmp_path / "a/b/maps.png") as drawn:
        assert drawn.width > 500
    page = (tmp_path / "a/b/maps.html").read_text()
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 1 + 2 * 3 * 2 + 6  # the image; two maps of three depths of two models; the redrawn images
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    assert "What &lt;is&gt; it?" in page
    assert "a&lt;b" in page


def test_the_errors_of_the_command_are_one_line(folder, image, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    cases = [
        ([folder, "--image", tmp_path / "text.png"], "text.png cannot be used"),
        ([folder, "--image", tmp_path / "absent.png"], "absent.png cannot be used"),
        ([folder, "--image", image, "--layers", "4"], f"--layers: {folder} has no layer 4 (expected 0 to 3)"),
        ([folder, "--image", image, "--layers", "-1"], "has no layer -1"),
        ([tmp_path, "--image", image], "not the configuration of a saved model"),
        ([folder, "--image", image, "--compare", tmp_path / "none"], "not the configuration of a saved model"),
    ]
    cases = [([*words, "--out", tmp_path / "out"], message) for words, message in cases]
    cases += [(["no_model", "--image", image, "--out", image], "found a file, expected a folder")]
    for words, message in cases:
        done = fork_python("-m", "pipeline.visualize", *words)
        assert done.returncode == 2
        [line] = done.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "out").exists()


# -- During training ---------------------------------------------------------------------------------------------------


class PlainEngine:
    """A model with the part of the engine's interface that drawing uses."""

    device = torch.device("cpu")

    def __init__(self, emma: Emma):
        self.module = emma
        self.eval, self.train = emma.eval, emma.train

    def __call__(self, *arguments):
        return self.module(*arguments)


@pytest.mark.parametrize("preset", ["tiny_v2", "tiny_cobra_v2"])
def test_drawings_during_training_show_what_the_exported_model_shows(recipe_file, shards, preset):
    words = [f"data.shards={shards}", f"evaluate.shards={shards}", "run.dir=unused", "evaluate.draw_every_steps=3"]
    recipe = load_recipe(recipe_file, [*words, "evaluate.draw_images=3", f"model={preset}"])
    data = TrainData(recipe, Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")))
    emma, towers, _ = initial_model(recipe)
    held_out = HeldOutImages(recipe, data)
    assert [step for step in range(1, 8) if held_out.due(step)] == [3, 6]
    drawn = held_out.maps(cast(Engine, PlainEngine(emma)), towers)
    model = LoadedModel(
        config=recipe.config, emma=emma, towers=towers, tokenizer=None, extra={}, device=torch.device("cpu")
    )
    assert len({maps.image.tobytes() for maps in drawn}) == 3
    assert held_out.batch.pixels is not None
    for maps, pixels in zip(drawn, held_out.batch.pixels.permute(0, 2, 3, 1).numpy(), strict=True):
        expected = look_inside(model, pixels, held_out.layers, tap="mixer", title="m")
        assert maps.depths.keys() == expected.depths.keys()
        for name, values in maps.depths.items():
            np.testing.assert_allclose(values, expected.depths[name], rtol=1e-4)
        assert [each.error for each in maps.redrawn] == pytest.approx(
            [e.error for e in expected.redrawn[-1:]], rel=1e-4
        )
        assert len(maps.redrawn) == (preset == "tiny_v2")


def test_drawing_without_held_out_images_is_a_user_error(recipe_file, shards):
    words = [f"data.shards={shards}", "run.dir=unused", "evaluate.draw_every_steps=3"]
    with pytest.raises(UserError, match=r"evaluate\.draw_every_steps needs held-out images; set evaluate\.shards"):
        load_recipe(recipe_file, words)
    recipe = load_recipe(recipe_file, [*words, f"evaluate.shards={shards}"])
    data = TrainData(recipe, Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")))
    data.plan.has_image[:] = False
    with pytest.raises(UserError, match=r"evaluate\.shards: .* has no images"):
        HeldOutImages(recipe, data)
