"""Rank, world size and device of this process, from the environment that torchrun or srun sets."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

import torch

from model.errors import UserError

# These variables describe the job step, whereas SLURM_NTASKS describes the whole job. A shell inside an allocation is a
# step with one task. If the world size came from SLURM_NTASKS, the shell would wait for ranks that do not exist.
SLURM_NAMES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank and device of this process, and the number of ranks."""

    rank: int
    local_rank: int  # number of this rank among the ranks on the same node
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"


def find_ranks(device: str) -> Ranks:
    """Find this process's rank and device, and set the environment variables that DeepSpeed reads.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises: UserError if the device is "cuda" and there is no GPU, or if this node has fewer GPUs than ranks.
    """
    if "RANK" not in os.environ:
        inside_srun = "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ
        for name in ALONE:
            os.environ[name] = os.environ[SLURM_NAMES[name]] if inside_srun else ALONE[name]
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    local_rank = int(os.environ["LOCAL_RANK"])
    return Ranks(
        rank=int(os.environ["RANK"]),
        local_rank=local_rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        device=_device(device, local_rank),
    )


def _device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is first imported
        return torch.device("cpu")
    if torch.cuda.device_count() == 0:
        raise UserError("engine.device is 'cuda', but torch finds no GPU. Use engine.device=cpu, or a node with a GPU.")
    ranks = _count_local_ranks(local_rank)
    gpus = _count_local_gpus(ranks)
    if ranks > gpus:
        raise UserError(
            f"{socket.gethostname()}: {ranks} ranks on {gpus} GPU(s), but each rank needs its own GPU. "
            f"Start one rank per GPU: sbatch --ntasks-per-node={gpus}, torchrun --nproc-per-node={gpus}."
        )
    # A task that SLURM has bound to one GPU finds only that GPU, as device 0.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _count_local_gpus(ranks: int) -> int:
    """Count the GPUs that the ranks of this node may use. Torch may find only some of them."""
    visible = torch.cuda.device_count()
    if "LOCAL_WORLD_SIZE" not in os.environ and "SLURM_GPUS_ON_NODE" in os.environ:
        return max(visible, int(os.environ["SLURM_GPUS_ON_NODE"]))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return ranks if visible == 1 and len(names) == 1 and names[0] else visible


def _count_local_ranks(local_rank: int) -> int:
    """Count the ranks on this node from the launcher's variables.

    SLURM lists the tasks of each node, for example "8(x2),4". Without a launcher, the local rank is a lower bound.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    by_node = [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]
    return max(local_rank + 1, by_node[int(os.environ["SLURM_NODEID"])] if by_node else 0)
