"""Feature fusion, compared with a direct implementation of EMMA Eq. 7 and 8."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.fusion import Cascade, Concatenation, CrossAttention, sine_cosine
from model.presets import preset

CONFIG = preset("tiny_v1")


def levels(num: int = 4) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 49, CONFIG.llm.d_model) for _ in range(num))


def rms(x: Tensor, norm: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def attention(x: Tensor, y: Tensor, module: CrossAttention, head_dim: int) -> Tensor:
    """Compute causal multi-head cross-attention head by head. Patch i of x attends to patches 0 to i of y."""
    q = x @ module.q_proj.weight.t()
    k, v = (y @ module.kv_proj.weight.t()).chunk(2, -1)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    heads = []
    for h in range(0, x.shape[-1], head_dim):
        part = slice(h, h + head_dim)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(head_dim)
        heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[..., part])
    return torch.cat(heads, -1) @ module.out_proj.weight.t()


def block(x: Tensor, y: Tensor, module: Any) -> Tensor:
    """Compute one fusion block (EMMA Eq. 8)."""
    x_hat = x + attention(rms(x, module.norm_x), rms(y, module.norm_y), module.attention, 32)
    return x_hat + module.mixer(rms(x_hat, module.norm))


def test_cascade_fusion_equals_the_papers_equations_7_and_8() -> None:
    shallow, middle, deep, final = levels()
    cascade = Cascade(CONFIG)
    b1, b2, b3 = cascade.blocks
    expected = block(block(block(shallow, middle, b1), deep, b2), final, b3)
    torch.testing.assert_close(cascade((shallow, middle, deep, final)), expected, rtol=1e-4, atol=1e-5)


def test_concatenation_mixes_all_levels_and_each_block_attends_to_one_slice() -> None:
    concatenation, inputs = Concatenation(preset("tiny_release")), levels()
    normed = torch.cat([rms(x, norm) for x, norm in zip(inputs, concatenation.norms, strict=True)], -1)
    slices = (normed @ concatenation.mix.weight.t() + concatenation.mix.bias).split(CONFIG.llm.d_model, -1)
    x = concatenation.queries.weight.expand(2, -1, -1)
    for y, module in zip(slices, concatenation.blocks, strict=True):
        x = block(x, y, module)
    torch.testing.assert_close(concatenation(inputs), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: Cascade(CONFIG), lambda: Concatenation(preset("tiny_release_v2"))])
def test_changing_later_patches_does_not_change_fused_earlier_patches(make: type) -> None:
    fusion, before = make(), levels()
    changed = tuple(level.clone() for level in before)
    for level in changed:
        level[:, 30:] += 1
    old, new = fusion(before), fusion(changed)
    assert torch.equal(old[:, :30], new[:, :30])
    assert (old[:, 30:] != new[:, 30:]).any(-1).all()


def test_position_codes_are_unique_and_encode_row_and_column_in_separate_halves() -> None:
    code = sine_cosine(7, 128).view(7, 7, 128)
    assert len(torch.unique(code.flatten(0, 1), dim=0)) == 49
    assert torch.equal(code[3, :, :64], code[3, :1, :64].expand(7, -1))  # the first half encodes the row
    assert torch.equal(code[:, 3, 64:], code[:1, 3, 64:].expand(7, -1))
