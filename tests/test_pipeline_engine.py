"""The DeepSpeed configuration, optimizer parameter groups and learning-rate schedule."""

import json

import pytest

from model.emma import Emma
from model.errors import UserError
from model.presets import PRESETS, preset
from pipeline.engine import OWNED_BY_RECIPE, compose_config
from pipeline.lr_schedule import learning_rate
from pipeline.optimizer import parameter_groups
from pipeline.recipe import load_recipe

CONFIGS = ("ds_configs/zero3.json", "ds_configs/zero2.json", "ds_configs/zero3_small.json")
ZERO = {"zero_optimization": {"stage": 3}}


def recipe(recipe_file, *overrides):
    return load_recipe(recipe_file, ["data.shards=/s", "run.dir=/r", *overrides])


@pytest.mark.parametrize("ds_config", CONFIGS)
def test_every_shipped_deepspeed_config_accepts_the_recipes_settings(recipe_file, ds_config):
    config = compose_config(recipe(recipe_file, f"engine.ds_config={ds_config}", "engine.precision=bf16"), world_size=2)
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 8
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"]
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("key", OWNED_BY_RECIPE)
def test_a_deepspeed_config_that_sets_a_key_owned_by_the_recipe_is_a_user_error(recipe_file, tmp_path, key):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: 1, "zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match=rf"{key}.*the recipe owns"):
        compose_config(recipe(recipe_file, f"engine.ds_config={path}"), world_size=1)


def test_a_deepspeed_config_that_offloads_the_optimizer_is_a_user_error(recipe_file, tmp_path):
    path = tmp_path / "offload.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    with pytest.raises(UserError, match="offload_optimizer is not supported"):
        compose_config(recipe(recipe_file, f"engine.ds_config={path}"), world_size=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "zero_optimization: overlap_com: Extra inputs"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}}, "reduce_bucket_size: Input should be greater"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0, expected 1, 2 or 3"),
        ({"zero_optimization": True}, "stage is True, expected 1, 2 or 3"),
        ({"zero_optimisation": {"stage": 3}}, "the key 'zero_optimisation', did you mean 'zero_optimization'"),
        ({}, "stage is None, expected 1, 2 or 3"),
        ({**ZERO, "comunication_data_type": "fp32"}, "did you mean 'communication_data_type'"),
        ({**ZERO, "bfloat16": {"enabled": True}}, "which the recipe owns"),
        ({**ZERO, "my_own": 1}, "does not know the key 'my_own'$"),
        ({**ZERO, "amp": {"enabled": True}}, "NVIDIA Apex AMP integration has been removed"),
        ({**ZERO, "comms_logger": {"enabledd": True}}, "rejected by DeepSpeed: enabledd: Extra inputs"),
        ({**ZERO, "communication_data_type": "int3"}, "rejected by DeepSpeed: Invalid communication_data_type"),
        ([], "found a list, expected an object"),
    ],
)
def test_an_invalid_deepspeed_config_is_a_user_error_before_the_engine_is_built(
    recipe_file, tmp_path, content, message
):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        compose_config(recipe(recipe_file, f"engine.ds_config={path}"), world_size=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("communication_data_type", "fp32"),
        ("prescale_gradients", False),
        ("wall_clock_breakdown", True),
        ("comms_logger", {"enabled": True}),
        ("flops_profiler", {"enabled": False}),
        ("activation_checkpointing", {"partition_activations": False}),
        ("aio", {"block_size": 1048576}),
        ("compile", {"deepcompile": False}),
        ("vocabulary_size", 32000),
        ("sequence_parallel_size", 1),
    ],
)
def test_a_deepspeed_config_may_set_any_other_key_that_deepspeed_reads(recipe_file, tmp_path, key, value):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**ZERO, key: value}))
    assert compose_config(recipe(recipe_file, f"engine.ds_config={path}"), world_size=1)[key] == value


def test_a_global_batch_that_the_ranks_cannot_split_evenly_is_a_user_error(recipe_file):
    with pytest.raises(UserError, match=r"global_batch 8 is not a multiple of 3 ranks × optim\.micro_batch 4"):
        compose_config(recipe(recipe_file), world_size=3)


@pytest.mark.parametrize("name", ["tiny_v1", "tiny_v2", "tiny_csm", "tiny_release"])
def test_weight_decay_applies_only_to_weight_matrices(name):
    emma = Emma(preset(name))
    decayed, undecayed = ({id(p) for p in group["params"]} for group in parameter_groups(emma, 0.1))
    assert decayed.isdisjoint(undecayed)
    for parameter_name, parameter in emma.named_parameters():
        kind = parameter_name.rsplit(".", 1)[-1]
        exempt = parameter.ndim < 2 or kind in {"A_log", "D", "dt_bias"} or "conv1d" in parameter_name
        exempt = exempt or "embedding" in parameter_name or "queries" in parameter_name
        assert (id(parameter) in undecayed) == exempt, parameter_name
    assert len(decayed) + len(undecayed) == len(list(emma.parameters()))


def test_the_learning_rate_warms_up_from_above_zero_and_decays_to_nearly_zero(recipe_file):
    warm_up = recipe(recipe_file, "optim.lr=1.0", "optim.warmup_ratio=0.1")
    rates = [learning_rate(warm_up, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_every_full_size_preset_has_a_tiny_preset():
    for name in PRESETS:
        twin = name if name.startswith("tiny_") else f"tiny_{name.removeprefix('emma_')}"
        assert twin in PRESETS
