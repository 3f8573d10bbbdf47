"""Run several benchmark evaluations, each in its own fork, because importing lmms-eval takes ten seconds.

    python -m tests.programs.evaluate_benchmarks SCENARIOS.json

A scenario has the `words` of the command, the number of `ranks`, and the `log` file. If it has `answers`, these answers
by mark replace those of the model (see tests.support.tiny_benchmarks). `kill_after` kills the process after a number of
answers. With `plugin`, the model is used through lmms-eval's own interface. The exit codes of the ranks are written to
`log` with the suffix .codes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import run_cli
from pipeline import evaluate
from pipeline.evaluation import harness
from pipeline.evaluation.benchmarks import BENCHMARKS, Benchmark
from pipeline.inference.engine import InferenceEngine
from pipeline.inference.requests import Completion, Request
from tests.support.launch import REPOSITORY
from tests.support.tiny_benchmarks import grey_level

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

harness.require_lmms_eval()

import lmms_eval.evaluator  # noqa: E402
import lmms_eval.models  # noqa: E402
from lmms_eval.api.task import ConfigurableTask  # noqa: E402

from pipeline.evaluation import lmms_model, task_functions  # noqa: E402, F401


class ScriptedEngine(InferenceEngine):
    """Gives the scripted answer to each question."""

    answers: dict[str, str]
    kill_after: int | None = None
    answered = 0

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        for index, request in reversed(list(enumerate(requests))):  # answers may come in any order
            said = self._said(request)
            yield index, Completion(tokens=self.tokenizer.encode(said), text=said, finish_reason="stop")

    def log_likelihoods(self, request: Request, continuations: Sequence[list[int]]) -> list[float]:
        said = self._said(request)
        return [-1.0 if self.tokenizer.decode(tokens) == said else -5.0 for tokens in continuations]

    def _said(self, request: Request) -> str:
        if self.answered == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        ScriptedEngine.answered += 1
        [(mark, row)] = re.findall(r"(#[a-z0-9_]+-(\d+))", self.tokenizer.decode(request.prompt))
        assert request.image is not None
        assert np.abs(request.image.astype(int) - grey_level(int(row))).max() <= 2, f"{mark} got another row's image"
        return self.answers[mark]


def run(scenario: dict[str, Any], rank: int) -> None:
    """Run the command as one rank of a scenario. Does not return."""
    ranks = scenario["ranks"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = scenario["port"]
    log = os.open(scenario["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if scenario["answers"]:
        ScriptedEngine.answers, ScriptedEngine.kill_after = scenario["answers"], scenario["kill_after"]
        lmms_model.InferenceEngine = ScriptedEngine  # type: ignore[misc]
    sys.argv = ["pipeline.evaluate", *scenario["words"]]
    try:
        run_cli(use_as_plugin if scenario["plugin"] else evaluate_and_count)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def use_as_plugin() -> None:
    """Evaluate the model by its name in lmms-eval, on MME and on a task that compares log-likelihoods."""
    model, data = sys.argv[1], Path(sys.argv[sys.argv.index("--data") + 1])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["emma"].partition(":")
    lmms_eval.models.MODEL_REGISTRY_V2.register_manifest(
        getattr(importlib.import_module(module), name)(), overwrite=True
    )

    mme, pope = (_task(BENCHMARKS[name], data) for name in ("mme", "pope"))
    likelihood = {key: pope[key] for key in ("dataset_path", "dataset_kwargs", "test_split", "doc_to_visual")}
    likelihood |= {"task": "likelihood", "output_type": "multiple_choice", "doc_to_text": "question"}
    likelihood |= {"doc_to_choice": ["yes", "no"], "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    output = lmms_eval.evaluator.simple_evaluate(
        model="emma",
        model_args=f"pretrained={model}",
        batch_size="2",
        device="cpu",
        tasks=[ConfigurableTask(config=each, model_name="emma") for each in (mme, likelihood)],
        bootstrap_iters=0,
    )
    loglikelihoods = {sample["doc_id"]: sample["resps"] for sample in output["samples"]["likelihood"]}
    print(json.dumps({"results": output["results"], "loglikelihoods": loglikelihoods}, default=float))


def _task(benchmark: Benchmark, data: Path) -> dict[str, Any]:
    config = harness.task_config(benchmark)
    harness._add_files(config, benchmark.files(data))
    return config


def evaluate_and_count() -> None:
    evaluate.main()
    print(f"computed {ScriptedEngine.answered} answers")


def main() -> None:
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        children = []
        for rank in range(scenario["ranks"]):
            if (child := os.fork()) == 0:
                run(scenario, rank)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        Path(scenario["log"]).with_suffix(".codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
