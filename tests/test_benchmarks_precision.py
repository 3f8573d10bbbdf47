"""Benchmark of training precisions: distances between loss curves, the result table, and the reduced models."""

import pytest

from benchmarks.precision import distance, draw, reduced, smoothed, table
from model.emma import Emma


def curve(offset: float) -> list[dict]:
    """Return the metrics of 40 steps, one in four text-only. The last 20 text losses are higher by `offset`."""
    return [
        {
            "loss/text": 2.0 + (offset if step >= 20 else 0.0),
            "loss/align": None if step % 4 == 0 else 0.5,
            "time/step_s": 0.1,
            "memory/peak_gib": 1.5,
        }
        for step in range(40)
    ]


def test_the_distance_of_two_runs_averages_smoothed_losses_over_the_second_half():
    assert distance(curve(0.0), curve(0.0)) == 0
    assert distance(curve(1.0), curve(0.0)) == pytest.approx(sum(range(1, 21)) / 20 / 20)
    assert smoothed([1.0, 2.0, 3.0], width=2) == [1.0, 1.5, 2.5]


def test_the_precision_table_has_a_row_per_run_and_the_figure_is_written(tmp_path):
    curves = {"fp32": curve(0.0), "bf16": curve(0.2)}
    assert "| bf16 | 2.2000 | 0.5000 | 0.1050 | 100 | 1.5 |" in table(curves).splitlines()
    draw(curves, "title", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_each_reduced_model_has_more_than_ten_million_parameters(kind):
    assert sum(parameter.numel() for parameter in Emma(reduced(kind)).parameters()) > 10_000_000
