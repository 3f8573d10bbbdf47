"""The table of benchmark scores, its section in the model card, and the figure."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.errors import UserError
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.evaluation.report import BEGIN, END, markdown, write_card
from pipeline.figures.benchmarks import draw_benchmarks


def results(**scores: float) -> dict[str, Any]:
    benchmarks = {name: {"score": score, "questions": 9} for name, score in scores.items()}
    return {"settings": {"weights_sha256": "abc"}, "benchmarks": benchmarks}


def test_the_table_lists_benchmarks_in_the_papers_order_and_explains_used_marks_only():
    table = markdown(results(mmbench=50.0, pope=80.0))
    assert [line.split(" | ")[0] for line in table.splitlines()[2:4]] == ["| POPE", "| MMBenchʲ"]
    assert "| POPE | 80.0 | 88.0 (-8.0) | 87.3 (-7.3) | 87.2 (-7.2) | 9 |" in table
    assert "\nʲ " in table
    assert "\nˢ " not in table
    assert "sha256 abc" in table


def test_a_second_table_replaces_the_first_in_the_model_card(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Model\n")
    write_card(card, "first\n")
    with card.open("a") as file:
        file.write("\n## Licence\n")
    write_card(card, "second\n")
    assert card.read_text() == f"# Model\n\n{BEGIN}\n## Benchmarks\n\nsecond\n{END}\n\n## Licence\n"


def test_a_missing_or_damaged_model_card_is_a_user_error(tmp_path):
    card = tmp_path / "README.md"
    with pytest.raises(UserError, match="found no model card"):
        write_card(card, "table\n")
    card.write_text(f"{BEGIN}\nno end\n")
    with pytest.raises(UserError, match="Delete that line"):
        write_card(card, "table\n")
    assert card.read_text() == f"{BEGIN}\nno end\n"


@pytest.mark.parametrize("names", [list(BENCHMARKS), ["mmbench_cn"]], ids=["all", "one that the paper does not report"])
def test_the_figure_is_drawn_for_any_number_of_benchmarks(names: list[str], tmp_path: Path):
    draw_benchmarks(results(**dict.fromkeys(names, 50.0)), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width >= 600
