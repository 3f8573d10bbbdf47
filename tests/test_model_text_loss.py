"""The chunked text loss, compared with torch's cross entropy in fp32."""

import pytest
import torch
from torch.nn import functional as F

from model import text_loss
from model.text_loss import token_nll


@pytest.mark.parametrize("rows", [0, 1, 4, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_nll_equals_fp32_cross_entropy_with_any_number_of_chunks(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_loss, "CHUNK_ROWS", 4)
    torch.manual_seed(0)
    logits = (5 * torch.randn(rows, 50)).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, 50, (rows,)), torch.randn(rows)
    found, expected = token_nll(logits, targets), F.cross_entropy(logits.float(), targets, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((nll * weights).sum(), logits)[0] for nll in (found, expected)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients)


def test_very_large_logits_have_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    nll = token_nll(logits, torch.tensor([1]))
    nll.sum().backward()
    assert nll.item() == 2e4
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0]]))
