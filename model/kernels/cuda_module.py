"""CUDA source files, compiled when they are first used by NVRTC, the compiler that comes with PyTorch's CUDA wheels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute of the CUDA driver


class CudaKernel:
    """A compiled kernel of one device. A launch takes a few microseconds of host time.

    Args:
        function: Handle of the kernel.
        shared_bytes: Size of the dynamic shared memory of a block.
    """

    def __init__(self, function: ctypes.c_void_p, shared_bytes: int) -> None:
        self.function, self.shared_bytes = function, shared_bytes
        _check(_driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes))

    def launch(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> None:
        """Launch the kernel on PyTorch's current stream with ctypes values of the types of its parameters."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            _driver().cuLaunchKernel(self.function, *grid, 1, threads, 1, 1, self.shared_bytes, stream, pointers, None)
        )


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def load_kernel(source: Path, name: str, device: int, shared_bytes: int = 0) -> CudaKernel:
    """Return a kernel of a source file, which is compiled for the device unless this has already been done.

    Raises: RuntimeError if the file cannot be compiled, or if the device has too little shared memory.
    """
    function = ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), _load_module(source, device), name.encode()))
        return CudaKernel(function, shared_bytes)


@functools.cache
def _load_module(source: Path, device: int) -> ctypes.c_void_p:
    module, (major, minor) = ctypes.c_void_p(), torch.cuda.get_device_capability(device)
    torch.cuda.current_stream().synchronize()  # PyTorch creates the context of the device when it first uses a stream
    _check(_driver().cuModuleLoadData(ctypes.byref(module), compile_source(source, f"sm_{major}{minor}")))
    return module


def compile_source(source: Path, architecture: str) -> bytes:
    """Compile a file for an architecture such as "sm_90". Raises: RuntimeError with the messages of the compiler."""
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"-default-device"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if failed:
        raise RuntimeError(f"{source} cannot be compiled for {architecture}: {log.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _check(result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Load the NVRTC library of the CUDA version that PyTorch was built for.

    Raises: OSError if there is no such library on the library path or among the installed nvidia packages.
    """
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    folders = [folder for root in torch.__path__ for folder in (Path(root).parent / "nvidia").glob("*/lib")]
    for folder in folders:
        if (folder / name).exists():
            for part in folder.glob("libnvrtc-builtins.so.*"):  # NVRTC loads it by name, which works once it is loaded
                ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(folder / name))
    return ctypes.CDLL(name)
