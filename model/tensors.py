"""Tensor files (safetensors and pickles): lazy reading, and strict loading into a module."""

from __future__ import annotations

import json
import pickle
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.errors import UserError, first_line, read_error
from model.hashing import file_sha256

PUBLISHED_NAMES = (  # file names of transformers and mamba_ssm, whole or sharded, in order of preference
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class TensorFiles(Mapping[str, Tensor]):
    """Tensors of one or more files by name. Each tensor is read when it is accessed; pickles are memory-mapped."""

    def __init__(self, paths: list[Path], sources: dict[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self.paths, self._sources = paths, sources

    def __getitem__(self, name: str) -> Tensor:
        source, name_there = self._sources[name]
        return source[name_there]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def renamed(self, names: Mapping[str, str]) -> TensorFiles:
        """Return the tensors under new names. `names` maps new names to old names; all other tensors are left out."""
        return TensorFiles(self.paths, {new: self._sources[old] for new, old in names.items()})

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of each file, by path."""
        return {str(path): file_sha256(path) for path in self.paths}


def open_tensors(*paths: Path) -> TensorFiles:
    """Open tensor files, which may be safetensors or pickles.

    Raises: UserError if a file is missing or unreadable, or is a pickle that holds objects other than tensors.
    """
    sources: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for path in paths:
        source = _open(path)
        sources |= {name: (source, name) for name in source}
    return TensorFiles(list(paths), sources)


def open_published(folder: Path) -> TensorFiles:
    """Open the weight files in the folder of a published model. Raises: UserError if the folder has none."""
    for path in (folder / name for name in PUBLISHED_NAMES):
        if path.exists():
            return open_tensors(*(_shards(path) if path.name.endswith(".index.json") else [path]))
    raise UserError(f"{folder}: no model in this folder; expected one of {', '.join(PUBLISHED_NAMES)}")


def _shards(index: Path) -> list[Path]:
    shards = sorted({index.parent / name for name in json.loads(index.read_text())["weight_map"].values()})
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise UserError(f"{index}: shards are missing in its folder ({', '.join(missing)}); complete the download")
    return shards


class _Safetensors(Mapping[str, Tensor]):
    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open(path: Path) -> Mapping[str, Tensor]:
    try:
        path.open("rb").close()  # because safetensors reports a file that may not be read as missing
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise read_error(error, path) from None
    try:
        if path.suffix == ".safetensors":
            return _Safetensors(path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because this pickle holds objects other than tensors and could run code; "
            "convert it to safetensors"
        ) from error
    except Exception as error:  # for a damaged file, safetensors and torch raise exceptions of many types
        raise UserError(f"{path}: not a readable tensor file ({error})") from error


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str, ignore: Collection[str] = ()) -> None:
    """Copy tensors into a module, whose state dict must have exactly the same names and shapes.

    Args:
        module: Module to load into.
        tensors: Tensors by their names in the module's state dict.
        source: Origin of the tensors, such as a path, for messages.
        ignore: Names to ignore on both sides, such as of tensors that share their values with another tensor.

    Raises: UserError that names every missing, unexpected and mis-shaped tensor.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if name not in ignore}
    problems = [f"unexpected {name}" for name in tensors if name not in own and name not in ignore]
    for name, tensor in own.items():
        given = tensors.get(name)
        if given is None:
            problems.append(f"missing {name} {list(tensor.shape)}")
        elif given.shape != tensor.shape:
            problems.append(f"{name} is {list(given.shape)}, expected {list(tensor.shape)}")
        else:
            tensor.copy_(given)
    if problems:
        raise UserError(f"{source}: does not fit this model: {'; '.join(problems)}")


@contextmanager
def report_write_errors(folder: Path) -> Iterator[None]:
    """Create the folder of a model. Raises: UserError if creating it or a write inside the block fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        message = f"{folder}: the model could not be written ({first_line(error)})"
        raise UserError(
            f"{message}; free some space or choose another folder, and run the same command again"
        ) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file atomically, with the permissions that the umask allows.

    safetensors itself gives its files to their owner only, whatever the umask is.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        converted = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        save_file(converted, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
