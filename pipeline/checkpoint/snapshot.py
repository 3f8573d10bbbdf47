"""Snapshots: this rank's share of the training state, copied to host memory and written while training continues.

The host memory is allocated once and used for every save and for loading: 12 bytes per trainable parameter, divided by
the number of ranks.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.layout import VALUE_BYTES, Layout, bytes_of, read_into
from pipeline.engine import Engine
from pipeline.errors import retryable_oserrors
from pipeline.zero import KINDS, Buffer, Piece, adam_state, restore, zero_buffers
from preprocess.atomic import HashingFile, sync

THREADS = 4  # per rank; while one thread hashes, the others keep the disk busy
BLOCK_BYTES = 16 << 20
SYNC_BYTES = 256 << 20  # fsync interval, so that little unwritten data waits in the page cache


class Snapshot:
    """Host copies of this rank's ZeRO buffers. Only `restore` is a collective; the other methods are local."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.buffers = zero_buffers(engine)

    @functools.cached_property
    def memory(self) -> dict[tuple[int, str], torch.Tensor]:
        """Host copies by buffer index and kind. With a GPU they are page-locked, so that copying is fast."""
        sizes = [buffer.master.numel() for buffer in self.buffers]
        copies = {(index, kind): allocate_pages(size) for index, size in enumerate(sizes) for kind in KINDS}
        if self.engine.device.type == "cuda":
            self._page_lock(list(copies.values()))
        return copies

    def _page_lock(self, copies: Sequence[torch.Tensor]) -> None:
        """Touch the pages in several threads before locking them, because CUDA alone takes seven times as long."""
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(torch.Tensor.zero_, copies))
        if not all(page_lock(copy, torch.cuda.cudart().cudaHostRegister) for copy in copies):
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.engine.device)  # raises the pending CUDA error here, not in a later kernel

    @property
    def bytes(self) -> int:
        return sum(buffer.master.nbytes for buffer in self.buffers) * len(KINDS)

    def take(self) -> float:
        """Copy the current state to host memory. Return the number of updates that Adam has done."""
        for (index, kind), copy in self.memory.items():
            if (tensor := self._tensor(self.buffers[index], kind)) is None:
                copy.zero_()
            else:
                copy.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        [updates] = {float(adam_state(self.engine, buffer).get("step", 0)) for buffer in self.buffers}
        return updates

    def write(self, folder: Path, rank: int) -> dict[str, dict[str, Any]]:
        """Write and sync the host copies. Return the size and sha256 of each file. Raises: OSError."""
        with ThreadPoolExecutor(THREADS) as pool:
            tasks = {
                f"{file}.{kind}": pool.submit(_write, folder / f"{file}.{kind}", self.memory[index, kind])
                for index, file in self._files(rank)
                for kind in KINDS
            }
        return {name: task.result() for name, task in tasks.items()}

    def pieces(self, rank: int) -> dict[str, tuple[Piece, ...]]:
        """Map each file that `write` writes, without its suffix, to the parameter pieces in it."""
        return {file: self.buffers[index].pieces for index, file in self._files(rank)}

    def whole_files(self, layout: Layout, files: Mapping[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Find the checkpoint files that hold exactly one buffer of this rank. Map each to the copy that it fills."""
        named = {self._matching_file(layout, index, kind): copy for (index, kind), copy in self.memory.items()}
        return {name: copy for name, copy in named.items() if name in files and files[name]["bytes"] == copy.nbytes}

    def read(self, folder: Path, layout: Layout, *, already_read: Collection[str]) -> None:
        """Fill the host copies from a checkpoint of any world size, skipping those that are already filled.

        Args:
            already_read: names of files whose host copies are already filled.

        Raises: DamagedCheckpointError if values are missing; RetryableError if the file system fails.
        """
        with ThreadPoolExecutor(THREADS) as pool, retryable_oserrors(folder):
            tasks = [
                pool.submit(read_into, copy, folder, kind, layout.reads(self.buffers[index].pieces))
                for (index, kind), copy in self.memory.items()
                if self._matching_file(layout, index, kind) not in already_read
            ]
            for task in tasks:
                task.result()

    def restore(self, updates: float) -> None:
        """Load the host copies into the engine. Must be called on every rank, because ZeRO-3 gathers weights."""
        restore(self.engine, self.buffers, self.memory, updates)

    def _files(self, rank: int) -> Iterator[tuple[int, str]]:
        return ((index, f"rank-{rank:05d}.{index:02d}") for index in range(len(self.buffers)))

    def _matching_file(self, layout: Layout, index: int, kind: str) -> str:
        return f"{layout.file_of(self.buffers[index].pieces)}.{kind}"

    def _tensor(self, buffer: Buffer, kind: str) -> torch.Tensor | None:
        """Return a tensor of the engine, or None for moments before Adam's first update."""
        return buffer.master.detach() if kind == "master" else adam_state(self.engine, buffer).get(kind)


def allocate_pages(count: int) -> torch.Tensor:
    """Allocate `count` fp32 zeros in memory pages of their own, because a page cannot be locked twice."""
    memory = mmap.mmap(-1, max(1, count) * VALUE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel may lack huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)[:count]


def page_lock(copy: torch.Tensor, register: Callable[[int, int, int], Any]) -> bool:
    """Page-lock a tensor with `cudaHostRegister`. Return whether the system allowed it.

    torch's own page-locked memory is not used, because its size is rounded up to a power of two.
    """
    if code := int(register(copy.data_ptr(), copy.nbytes, 0)):
        reason = f"CUDA error {code}; `ulimit -l` may be low"
        print(f"host memory cannot be page-locked ({reason}): each save stops training for longer", flush=True)
    return not code


def _write(path: Path, tensor: torch.Tensor) -> dict[str, Any]:
    """Write a tensor in large blocks and hash each block as it is written."""
    data: Any = bytes_of(tensor)
    with path.open("wb") as raw:
        file = HashingFile(raw)
        for start in range(0, len(data), BLOCK_BYTES):
            file.write(data[start : start + BLOCK_BYTES])
            if file.size % SYNC_BYTES == 0:
                sync(raw)
        sync(raw)
    return {"bytes": file.size, "sha256": file.sha256}
