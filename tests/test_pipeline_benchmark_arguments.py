"""Arguments of an evaluation on benchmarks: user errors that are reported before the model is loaded."""

import importlib.util
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import UserError
from pipeline.evaluate import main
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.evaluation.report import MARKS
from tests.support.launch import REPOSITORY


def evaluate(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, words)])
    main()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Make a folder that has the files of POPE, and one of two files of MMBench."""
    for path in ("pope/data/test-00000-of-00001.parquet", "mmbench/en/dev-00000-of-00002.parquet"):
        (tmp_path / path).parent.mkdir(parents=True)
        pq.write_table(pa.table({"question": ["Which?"]}), tmp_path / path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found neither, expected either a file of questions or --tasks"),
        (["questions.jsonl", "--tasks", "pope"], "found both, expected either"),
        (["--tasks", "pope"], "give the folder of the data sets as --data DIR"),
        (["--tasks", "popee", "--data", "."], "benchmark 'popee' is unknown, did you mean 'pope'"),
        (["--tasks", "pope", "--data", ".", "--batch", "0"], "--batch: found 0, expected 1 or more"),
    ],
)
def test_wrong_arguments_are_user_errors(monkeypatch, words, message):
    with pytest.raises(UserError, match=message):
        evaluate(monkeypatch, "no-such-model", *words)


def test_missing_and_incomplete_data_sets_are_named_before_the_model_is_loaded(monkeypatch, data):
    with pytest.raises(UserError) as raised:
        evaluate(monkeypatch, "no-such-model", "--tasks", "pope", "mmbench", "mme", "--data", data)
    assert "not all of them, of mmbench, mme." in str(raised.value)
    assert f"python -m pipeline.prefetch --benchmarks {data} mmbench mme" in str(raised.value)


def test_a_damaged_data_file_is_named_before_the_model_is_loaded(monkeypatch, data):
    path = data / "pope/data/test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{path}: not a whole parquet file"):
        evaluate(monkeypatch, "no-such-model", "--tasks", "pope", "--data", data)


def test_a_missing_model_card_is_reported_before_the_model_is_loaded(monkeypatch, data):
    monkeypatch.setattr("pipeline.evaluation.run_tasks.require_lmms_eval", lambda: None)
    with pytest.raises(UserError, match=r"--card: found no model card no-such-model/README\.md"):
        evaluate(monkeypatch, "no-such-model", "--tasks", "pope", "--data", data, "--card")


def test_without_lmms_eval_one_line_says_how_to_install_it(monkeypatch, data):
    monkeypatch.setattr("pipeline.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[eval\]'"):
        evaluate(monkeypatch, "no-such-model", "--tasks", "pope", "--data", data)


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs the extra [eval]")
@pytest.mark.parametrize("benchmark", [b for b in BENCHMARKS.values() if b.stock], ids=lambda b: b.name)
def test_hub_id_configuration_and_split_are_those_of_the_stock_task(benchmark):
    package = importlib.util.find_spec("lmms_eval")
    assert package and package.origin
    path = Path(package.origin).parent / "tasks" / benchmark.stock
    lines = path.read_text().splitlines()
    for included in [line.split(": ")[1] for line in lines if line.startswith("include:")]:
        lines = [*path.with_name(included).read_text().splitlines(), *lines]
    keys = ("dataset_path", "dataset_name", "test_split")
    found = {key: value.strip().strip('"') for key, _, value in (line.partition(":") for line in lines) if key in keys}
    expected = {"dataset_path": benchmark.hub_id, "test_split": benchmark.split}
    assert found == expected | ({"dataset_name": benchmark.config} if benchmark.config else {})


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda b: b.name)
def test_the_documentation_names_data_split_and_differences_of_each_benchmark(benchmark):
    text = (REPOSITORY / "docs/evaluation.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith(f"| `{benchmark.name}` | {benchmark.hub_id} |")]
    assert benchmark.split in row
    assert [kind for kind, (mark, _) in MARKS.items() if mark in row] == list(benchmark.differs)
    has_own_row = re.search(rf"^\|[^|]*`{benchmark.name}`[^|]*\|[^|]*\|[^|]*\|$", text, re.MULTILINE)
    assert bool(has_own_row) == bool(benchmark.own_task)
