"""The vision projector and its optional cross-scan."""

import torch
from torch.nn import functional as F

from model.presets import preset
from model.projector import CrossScan, Projector


def test_the_projector_is_a_three_layer_gelu_mlp() -> None:
    torch.manual_seed(0)
    projector, features = Projector(preset("tiny_v2")), torch.randn(2, 49, 160)
    first, second, third = (projector.expand, projector.reduce, projector.out)
    hidden = F.gelu(F.linear(features, first.weight, first.bias))
    expected = F.linear(F.gelu(F.linear(hidden, second.weight, second.bias)), third.weight, third.bias)
    torch.testing.assert_close(projector(features), expected)


def test_the_full_size_projector_has_widths_2176_8704_2560_2560() -> None:
    with torch.device("meta"):
        projector = Projector(preset("emma_v2"))
    layers = [(layer.in_features, layer.out_features) for layer in (projector.expand, projector.reduce, projector.out)]
    assert layers == [(2176, 8704), (8704, 2560), (2560, 2560)]
    assert sum(parameter.numel() for parameter in projector.parameters()) == 47_789_568


def test_the_cross_scan_visits_rows_and_columns_forwards_and_backwards() -> None:
    rows, columns, rows_back, columns_back = (order.tolist() for order in CrossScan(32, 3).orders(torch.device("cpu")))
    assert rows == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert columns == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert (rows_back, columns_back) == (rows[::-1], columns[::-1])


def test_each_cross_scan_direction_changes_only_patches_that_it_visits_later() -> None:
    """Changing patch 4 of a 3 × 3 grid must change only patch 4 and the patches that the direction visits later."""
    torch.manual_seed(0)
    cross_scan, features = CrossScan(32, 3), torch.randn(1, 9, 32)
    changed = features.clone()
    changed[:, 4] += torch.randn(32)
    for scan, order in zip(cross_scan.scans, cross_scan.orders(features.device), strict=True):
        before, after = (scan(x[:, order])[:, order.argsort()] for x in (features, changed))
        differs = (before != after).any(-1)[0]
        reached = order[order.tolist().index(4) :]
        assert set(differs.nonzero().flatten().tolist()) == set(reached.tolist())


def test_the_projector_adds_the_cross_scan_output_to_its_input_features() -> None:
    torch.manual_seed(0)
    projector, features = Projector(preset("tiny_csm")), torch.randn(2, 49, 160)
    assert projector.cross_scan is not None
    scanned = features + projector.cross_scan(features)
    projector.cross_scan = None
    with_scan = projector(scanned)
    torch.manual_seed(0)
    torch.testing.assert_close(Projector(preset("tiny_csm"))(features), with_scan)
