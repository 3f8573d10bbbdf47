"""CUDA source of the Mamba-1 scan: the compiler that comes with PyTorch accepts it, which needs no GPU."""

import pytest
import torch

from model.kernels.cuda_module import compile_source
from model.kernels.mamba1 import scan


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_scan_compiles_for_a100_and_h100(architecture):
    code = compile_source(scan.SOURCE, architecture)
    for name in ("scan_forward", "scan_backward"):
        assert all(f"{name}_{suffix}".encode() in code for suffix in scan.SUFFIXES.values())


def test_a_source_with_an_error_is_reported_with_its_line(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel() {\n  undefined_function();\n}\n")
    with pytest.raises(RuntimeError, match=r"(?s)broken\.cu cannot be compiled for sm_90: .*\(2\).*undefined_function"):
        compile_source(source, "sm_90")


def test_tensors_on_the_cpu_are_not_computed_by_the_cuda_kernels():
    assert not scan.supports(torch.zeros(1, 4, 8), channels=128, d_state=16, offset=8)
