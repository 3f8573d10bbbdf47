"""Training, resuming and generation with small models on GPUs. The tests need a GPU and the fused kernels."""

import json
import time

import pytest
import torch

from model.weights import load_model
from pipeline.checkpoint.folder import list_steps
from pipeline.data.shard_reader import ShardReader
from pipeline.inference.engine import InferenceEngine
from pipeline.recipe import load_recipe
from preprocess.prompts import load_tokenizer
from tests.support.launch import finish, run_python, torchrun
from tests.support.plain_torch import train_plainly
from tests.support.tiny_data import build_shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the kernel packages and Triton call deprecated torch functions
]

KINDS = ("v1", "v2")
STEPS = 6  # one epoch: image batches and text-only batches; the last batch of each kind is incomplete
GPUS = min(2, torch.cuda.device_count())
ON_GPU = ["engine.device=cuda", "engine.ds_config=ds_configs/zero3.json"]


@pytest.fixture(scope="module", params=KINDS)
def base(request, recipe_file, raw_mix, tmp_path_factory):
    """Build shards for the tiny V1 or V2 preset. Return the training arguments for them."""
    folder = build_shards(raw_mix, tmp_path_factory.mktemp(request.param) / "shards", f"tiny_{request.param}")
    return [recipe_file, f"model=tiny_{request.param}", f"data.shards={folder}", *ON_GPU]


@pytest.mark.skipif(GPUS < 2, reason="two GPUs are needed")
def test_two_gpus_with_zero_3_have_the_losses_and_gradients_of_plain_torch(base, tmp_path):
    """Compare losses of all steps, but gradients only in the first step, because updates amplify rounding errors."""
    recipe = load_recipe(base[0], [*base[1:], f"steps={STEPS}", "optim.micro_batch=8", f"run.dir={tmp_path}"])
    expected = train_plainly(recipe, "cuda")
    out = tmp_path / "gradients.pt"
    program = [
        "tests/programs/train_on_ranks.py",
        out,
        *base,
        f"steps={STEPS}",
        "optim.micro_batch=2",
        f"run.dir={tmp_path}/run",
    ]
    finish(torchrun(2, program))
    kept = torch.load(out, weights_only=False, map_location="cpu")
    losses = [report["total"] for report in kept["reports"]]
    assert losses == pytest.approx([step.loss for step in expected], rel=2e-3)
    first, oracle = kept["gradients"][0], expected[0].gradients
    whole = torch.cat([gradient.flatten() for gradient in oracle.values()]).norm()
    for name, gradient in oracle.items():
        off = (first[name] - gradient).norm()
        assert off <= 1e-2 * gradient.norm() + 1e-4 * whole, f"{name}: off by {off:.1e} of {gradient.norm():.1e}"


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_the_training_loss_on_repeated_batches_stays_finite_and_falls(base, tmp_path, precision):
    arguments = [*base, "steps=36", f"engine.precision={precision}", "engine.segment_layers=2", f"run.dir={tmp_path}"]
    done = run_python("-m", "pipeline.train", *arguments, "checkpoint.every_steps=36", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line["loss/text"] for line in steps_of(tmp_path)]
    assert len(losses) == 36
    assert all(loss is not None for loss in losses)
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])


def test_a_resumed_run_repeats_its_losses_and_answers_equally_on_cpu_and_gpu(base, tmp_path):
    """The losses agree only approximately, because Mamba's backward pass on a GPU sums in no fixed order."""
    run = [*base, "steps=12", f"run.dir={tmp_path / 'run'}"]
    train = ["-m", "pipeline.train", *run]
    finish(torchrun(GPUS, train))
    uninterrupted = [line["loss/text"] for line in steps_of(tmp_path / "run")]
    for gpus in sorted({GPUS, 1}, reverse=True):
        (tmp_path / "run/checkpoints/step-00000012/manifest.json").unlink()
        assert "resuming from" in finish(torchrun(gpus, train))
        resumed = [line["loss/text"] for line in steps_of(tmp_path / "run")][-4:]
        assert resumed == pytest.approx(uninterrupted[8:], rel=2e-2), f"on {gpus}"

    done = run_python("-m", "pipeline.export", tmp_path / "run", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    image = ShardReader(base[2].removeprefix("data.shards=")).read(0)[1]
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    engines = [InferenceEngine(load_model(tmp_path / "model", device), tokenizer) for device in ("cpu", "cuda")]
    requests = [engines[0].request("Which colour?", image), engines[0].request("Say 3")]
    assert engines[0].complete(requests) == engines[1].complete(requests)


def test_a_stop_request_saves_and_ends_the_run(base, tmp_path):
    process = torchrun(GPUS, ["-m", "pipeline.train", *base, "steps=1000", f"run.dir={tmp_path}"])
    while process.poll() is None and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.1)
    (tmp_path / "control/stop").touch()
    output = finish(process)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["outcome"] == "stopped", output
    assert list_steps(tmp_path / "checkpoints")[-1] == outcome["step"]


def test_a_run_whose_losses_are_not_finite_fails(base, tmp_path):
    run = [*base, f"run.dir={tmp_path}", "optim.lr=1e30", "optim.clip=0.0"]
    output = finish(torchrun(GPUS, ["-m", "pipeline.train", *run]), code=1)
    assert "error: no finite loss or gradient" in output
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "failed"


def test_too_little_gpu_memory_is_a_one_line_error_that_suggests_a_remedy(base, tmp_path):
    memory_limit = {"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.0005"}  # a limit of 40 MB on a GPU with 80 GB
    done = run_python("-m", "pipeline.train", *base, f"run.dir={tmp_path}", timeout=300, **memory_limit)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "out of memory" in line
    assert "lower optim.micro_batch (now 4)" in line


def steps_of(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "event" not in line and "loss/text" in line]
