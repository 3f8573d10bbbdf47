"""Assignment of GPUs to ranks under SLURM and torchrun. The tests set the environment variables of SLURM 22.05."""

import pytest
import torch

from model.errors import UserError
from pipeline.distributed.ranks import find_ranks

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NODEID": "0"}
RENDEZVOUS = {"MASTER_PORT": "1", "MASTER_ADDR": "gpu7"}
SHELL = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0", "SLURM_NTASKS": "8"}
TORCHRUN = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
FOUR, OWN, LAST = "0,1,2,3", "3", {"SLURM_NODEID": "1"}


@pytest.fixture
def rank_on(monkeypatch):
    """Return a function (local rank, number of visible GPUs, environment variables) -> device of that rank."""

    def rank_on(local_rank: int, gpus: int, variables: dict[str, str]) -> torch.device:
        word = str(local_rank)
        if "LOCAL_WORLD_SIZE" in variables:
            environment = {**variables, "RANK": word, "LOCAL_RANK": word}
        else:
            environment = {**STEP, **RENDEZVOUS, **variables, "SLURM_PROCID": word, "SLURM_LOCALID": word}
        monkeypatch.setattr("pipeline.distributed.ranks.os.environ", environment)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        return find_ranks("cuda").device

    return rank_on


def on_node(tasks, gpus, visible):
    words = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": gpus, "CUDA_VISIBLE_DEVICES": visible}
    return {name: word for name, word in words.items() if word}


@pytest.mark.parametrize("local_rank", [0, 3, 7])
@pytest.mark.parametrize(
    ("gpus", "variables"),
    [
        pytest.param(4, on_node("8", "4", FOUR), id="--gpus-per-node=4"),
        pytest.param(4, on_node("8(x2)", "4", FOUR) | LAST, id="--gpus-per-node=4 on two nodes"),
        pytest.param(1, on_node("8", "4", OWN), id="two tasks bound to each GPU"),
        pytest.param(4, on_node("8", "", ""), id="a SLURM without GPU support"),
        pytest.param(4, TORCHRUN, id="torchrun"),
    ],
)
def test_eight_ranks_on_four_gpus_are_a_user_error_on_every_rank(rank_on, local_rank, gpus, variables):
    with pytest.raises(UserError, match=r"8 ranks on 4 GPU.*--ntasks-per-node=4"):
        rank_on(local_rank, gpus, variables)


@pytest.mark.parametrize(
    ("gpus", "variables", "device"),
    [
        pytest.param(4, on_node("4", "4", FOUR), "cuda:3", id="--gpus-per-node=4 --ntasks-per-node=4"),
        pytest.param(4, on_node("2,4", "4", FOUR) | LAST, "cuda:3", id="the fuller one of two nodes"),
        pytest.param(1, on_node("8", "8", OWN), "cuda:0", id="--gpus-per-task=1"),
        pytest.param(2, on_node("4", "8", "6,7"), "cuda:1", id="--gpus-per-task=2"),
        pytest.param(1, on_node("8", "", OWN), "cuda:0", id="bound by the user's own wrapper"),
        pytest.param(1, TORCHRUN | {"CUDA_VISIBLE_DEVICES": OWN}, "cuda:0", id="bound by a wrapper under torchrun"),
        pytest.param(8, TORCHRUN, "cuda:3", id="torchrun"),
    ],
)
def test_a_rank_uses_its_own_gpu_however_gpus_are_assigned_to_tasks(rank_on, gpus, variables, device):
    assert str(rank_on(3, gpus, variables)) == device


def test_an_interactive_shell_in_an_allocation_of_eight_tasks_is_a_single_rank(monkeypatch):
    monkeypatch.setattr("pipeline.distributed.ranks.os.environ", {**SHELL, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert find_ranks("cpu").world_size == 1


def test_two_ranks_on_a_single_gpu_are_a_user_error(rank_on):
    with pytest.raises(UserError, match="2 ranks on 1 GPU"):
        rank_on(1, 1, on_node("2", "1", "0"))
