"""Who this process is among the ranks, whether torchrun, srun or nobody started it."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

import torch

from model.errors import UserError

# Of the step: SLURM_NTASKS is the job's, and a shell in an allocation, which is a step of one task, has it too.
SLURM_NAMES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"


def find_ranks(device: str) -> Ranks:
    """Read the launcher's variables and set the ones that DeepSpeed reads; it knows none of SLURM's.

    Raises: UserError if the recipe asks for a GPU and there is none, or too few for the ranks of this node.
    """
    if "RANK" not in os.environ:
        inside_srun = "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ
        for name in ALONE:
            os.environ[name] = os.environ[SLURM_NAMES[name]] if inside_srun else ALONE[name]
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    local_rank = int(os.environ["LOCAL_RANK"])
    return Ranks(int(os.environ["RANK"]), local_rank, int(os.environ["WORLD_SIZE"]), _device(device, local_rank))


def _device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by DeepSpeed when it is first imported
        return torch.device("cpu")
    if torch.cuda.device_count() == 0:
        raise UserError(
            "engine.device is 'cuda', but torch sees no GPU here; use engine.device=cpu or a node that has one"
        )
    ranks = _ranks_here(local_rank)
    gpus = _gpus_here(ranks)
    if ranks > gpus:
        raise UserError(
            f"{socket.gethostname()}: {ranks} ranks on {gpus} GPU(s), but each needs one of its own; "
            f"give as many tasks as GPUs: sbatch --ntasks-per-node={gpus}, torchrun --nproc-per-node={gpus}"
        )
    # A task that SLURM bound to its own GPU sees that one alone.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _gpus_here(ranks: int) -> int:
    """GPUs of this node that the ranks share out among them; a rank that was bound to some of them sees only those."""
    seen = torch.cuda.device_count()
    if "LOCAL_WORLD_SIZE" not in os.environ and "SLURM_GPUS_ON_NODE" in os.environ:
        return max(seen, int(os.environ["SLURM_GPUS_ON_NODE"]))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return ranks if seen == 1 and len(names) == 1 and names[0] else seen


def _ranks_here(local_rank: int) -> int:
    """As the launcher says: "8", or "8(x2),4" by node. Without a word from it, as far as this rank can tell."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    told = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    by_node = [int(tasks) for tasks, nodes in told for _ in range(int(nodes or 1))]
    return max(local_rank + 1, by_node[int(os.environ["SLURM_NODEID"])] if by_node else 0)
