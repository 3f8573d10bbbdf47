"""Selection of GPU kernels or plain torch operations."""

from importlib.util import find_spec

import pytest
import torch

from model.errors import UserError
from model.kernels.dispatch import fused, kernel_report


def test_the_kernel_report_says_plain_torch_on_the_cpu() -> None:
    assert kernel_report("cpu") == f"Mamba in plain torch {torch.__version__} on cpu"


@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="the kernels are installed here")
def test_the_error_for_missing_gpu_kernels_names_the_install_script() -> None:
    with pytest.raises(UserError, match=r"No module named .*slurm/install_kernels\.sh"):
        fused()
