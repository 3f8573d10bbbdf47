#!/usr/bin/env python
"""Train EMMA from shards. The same command resumes.

    sbatch slurm/train_emma.sh pipeline/recipes/emma_v2.toml data.shards=/data/shards run.dir=/runs/v2
    torchrun --nproc-per-node 2 -m pipeline.train pipeline/recipes/demo.toml data.shards=SHARDS run.dir=RUN
    python -m pipeline.train pipeline/recipes/demo.toml data.shards=SHARDS run.dir=RUN     # one rank

Exit codes: 0 done, or stopped on request (run.dir/outcome.json says which); 2 a mistake that you can mend; 3 the
training failed in a way that trying again would not mend; 4 a rank was lost or hung: try again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from model.emma import Emma
from model.errors import UserError, first_line
from model.vision import Towers
from pipeline.activation_memory import fit_kept_layers
from pipeline.checkpoint.context import CheckpointContext
from pipeline.checkpoint.folder import CHECKPOINTS, list_steps
from pipeline.checkpoint.manifest import Identity
from pipeline.checkpoint.probe import Probe
from pipeline.checkpoint.resumer import Resumer
from pipeline.checkpoint.saver import Saved, Saver
from pipeline.data.loader import GlobalBatch, TrainData, worker_death
from pipeline.data.shard_reader import DamagedShardError
from pipeline.distributed.collectives import broadcast_from_main, collectively
from pipeline.distributed.ranks import Ranks, find_ranks
from pipeline.engine import Engine, build_engine, init_distributed
from pipeline.errors import RetryableError, from_oserror
from pipeline.initial_model import RANDOM, check_towers_unchanged, empty_model, initial_model, make_towers
from pipeline.lr_schedule import learning_rate
from pipeline.metrics.history import has_event
from pipeline.metrics.logger import MetricsLogger, append_event
from pipeline.metrics.spikes import SpikeDetector
from pipeline.metrics.timers import GarbageCollection, StartupTimer, TowerTimer
from pipeline.recipe import Recipe, load_recipe
from pipeline.run.control import Control
from pipeline.run.folder import RunFolder
from pipeline.run.out_of_memory import explain_out_of_memory
from pipeline.run.preflight import preflight, within
from pipeline.run.watchdog import EXIT_LOST, Watchdog, bound_collectives
from pipeline.step import Requests, Seconds, StepReport, optimizer_step
from pipeline.validation import Validation
from pipeline.zero import check_partition

MAX_NONFINITE = 3  # steps in a row without a finite loss and gradient, after which the run has failed
MEETING_S = 600.0  # from the first rank that is there to the last one
MAIN_SPEAKS_S = 10.0  # for the main rank to leave its word, before another one does


class DivergedError(RuntimeError):
    """No finite loss or gradient for several steps; the same command would fail again at the same place."""


def train(run: RunFolder, ranks: Ranks, start: StartupTimer) -> int:
    """Run the recipe to its end or to a stop request; the steps done. Every rank calls it."""
    recipe = run.recipe
    saved_steps = broadcast_from_main(ranks, lambda: list_steps(run.folder / CHECKPOINTS))
    with Watchdog(run, ranks) as watchdog, explain_out_of_memory(recipe, ranks):
        data = collectively(ranks, lambda: TrainData(recipe, ranks))
        validation = collectively(ranks, lambda: Validation(recipe, ranks) if recipe.evaluate.shards else None)
        data.start_workers(max(saved_steps, default=0))
        start.phase_done("data")
        emma, towers, weights = collectively(ranks, lambda: build_model(run, ranks, resume=bool(saved_steps)))
        start.phase_done("model")
        engine = build_engine(emma, recipe, ranks)
        check_partition(engine)
        start.phase_done("engine")
        probe = Probe(engine, towers, recipe, ranks, data)
        context = CheckpointContext(
            recipe=recipe, ranks=ranks, identity=_identity(recipe, data), engine=engine, probe=probe
        )
        step, report = Resumer(context).resume(saved_steps)
        start.phase_done("checkpoint")
        fitted = fit_memory(engine, towers, recipe, data)
        start.phase_done("memory")
        run.begin(step, weights)
        with MetricsLogger(recipe, ranks, data) as metrics, watchdog.before_the_end():
            metrics.log_start(step, start, [*fitted, *report])
            loop = Loop(run, engine, towers, data, validation, Saver(context, resumed_from=step), metrics, watchdog)
            step = loop.train_from(step)
            end(run, metrics, step, done=step == data.total_steps)
    return step


@dataclass
class Loop:
    """The steps, and what is done between them; every rank has one."""

    run: RunFolder
    engine: Engine
    towers: Towers
    data: TrainData
    validation: Validation | None
    saver: Saver
    metrics: MetricsLogger
    watchdog: Watchdog
    spikes: SpikeDetector = field(default_factory=SpikeDetector)
    nonfinite: int = 0  # steps in a row without a finite loss or gradient

    def train_from(self, step: int) -> int:
        """From `step` on; returns the steps done when it ended."""
        if self._missed_evaluation(step):
            self._evaluate(step)
        clock, towers_s = TowerTimer(self.towers, self.engine.device), 0.0
        with GarbageCollection() as garbage:
            for batch in self.data.from_step(step):
                lr = learning_rate(self.run.recipe, step, self.data.total_steps)
                requests = Requests(*self.run.control.requests(), self.saver.writing)
                spent = Seconds(batch.wait_s, towers_s, garbage.pop_seconds())
                report = optimizer_step(self.engine, self.towers, self.run.recipe, batch, lr, requests, spent)
                towers_s = clock.pop_seconds()  # now that the device has done the step; the next reduction tells of it
                step += 1
                self.watchdog.step_done(step)
                self.metrics.log_step(step, batch, report, lr)
                if self.saver.in_progress and not report.writing:
                    self._save(self.saver.commit)
                self._look_for_trouble(step, batch, report)
                # Not after a step that updated nothing: what led here is better kept than overwritten.
                if report.finite or step == self.data.total_steps:
                    self._save_and_evaluate(step, report)
                    clock.pop_seconds()  # an evaluation's, or a probe's, are no step's
                if report.stop and report.finite:
                    break
                garbage.after_step(step)
        return step

    def _look_for_trouble(self, step: int, batch: GlobalBatch, report: StepReport) -> None:
        """Mark what stands out in a step. Raises: DivergedError on all ranks after too many steps without an update."""
        for shard, key, seconds in batch.slow:
            facts = {"rank": self.run.ranks.rank, "shard": shard, "key": key, "seconds": round(seconds, 1)}
            append_event(self.run.folder, "slow_read", step, **facts)
        for spike in self.spikes.check(report, has_images=batch.images > 0):
            self.metrics.log_event("spike", step, **spike.facts(), samples=batch.ids.tolist())
        if report.finite:
            self.nonfinite = 0
            return
        self.nonfinite += 1
        self.metrics.log_event("nonfinite", step, samples=batch.ids.tolist())
        if self.nonfinite == MAX_NONFINITE:
            self._save(self.saver.finish)
            raise DivergedError(f"no finite loss or gradient in steps {step - MAX_NONFINITE + 1} to {step}")

    def _save_and_evaluate(self, step: int, report: StepReport) -> None:
        last = step == self.data.total_steps
        if self.saver.due(step) or report.stop or report.save or last:
            self._save(lambda: self.saver.save(step))
            if report.stop or report.save or last:
                self._save(self.saver.finish)
                self.run.control.done("save")
        # A stop has no time to lose; the next start makes up for it.
        if not report.stop and self._evaluation_due(step):
            self._evaluate(step)

    def _evaluation_due(self, step: int) -> bool:
        return self.validation is not None and (step == self.data.total_steps or self.validation.due(step))

    def _missed_evaluation(self, step: int) -> bool:
        """Whether the start before saved here, and ended before it had evaluated."""
        folder = self.run.folder
        due = step > 0 and self._evaluation_due(step)
        return due and broadcast_from_main(self.run.ranks, lambda: not has_event(folder, "heldout", step))

    def _evaluate(self, step: int) -> None:
        assert self.validation is not None
        begun = time.monotonic()
        with self.watchdog.during("the evaluation"), self.metrics.exclude_time("heldout"):
            losses = self.validation.losses(self.engine, self.towers)
        self.metrics.log_validation(step, losses, seconds=time.monotonic() - begun)

    def _save(self, act: Callable[[], Saved | None]) -> None:
        """Do a part of saving, and tell of the checkpoint that is there by it."""
        with self.watchdog.during("the save"), self.metrics.exclude_time("save"):
            saved = act()
        if saved:
            seconds = {"seconds": round(saved.stall_s, 2), "whole_s": round(saved.whole_s, 2)}
            self.metrics.log_event("save", saved.step, **seconds)


def end(run: RunFolder, metrics: MetricsLogger, step: int, done: bool) -> None:
    """Tell how it ended while the request to stop is still there, and before wandb's last words, which may take long.

    The batch script goes by this word, whatever signals it gets until the ranks are gone.
    """
    if run.ranks.is_main:
        outcome, reason = ("done", "") if done else ("stopped", run.control.who_asked_to_stop())
        metrics.log_event(outcome, step, **({"reason": reason} if reason else {}))
        run.end(outcome, step, reason)
        run.control.done("stop")


def fit_memory(engine: Engine, towers: Towers, recipe: Recipe, data: TrainData) -> list[str]:
    """Recompute as little as the recipe's memory budget allows, if it has one; what was decided.

    Not before the weights are there: measuring with what happens to be in memory could leave a NaN behind.
    """
    if recipe.engine.memory_gib is None:
        return []
    return [fit_kept_layers(engine, towers, recipe, data.heaviest_micro_batch(), recipe.engine.memory_gib)]


def build_model(run: RunFolder, ranks: Ranks, *, resume: bool) -> tuple[Emma, Towers, dict[str, Any]]:
    """The model that trains, the frozen towers, and what was loaded.

    Only the main rank reads the language model, and only if there is no checkpoint: all trained weights are in that,
    and a run that has one never starts without.
    """
    recipe = run.recipe
    if ranks.is_main and not resume:
        emma, towers, loaded = initial_model(recipe)
    else:
        emma, towers = empty_model(recipe.config), make_towers(recipe)
        loaded = {"llm": "from a checkpoint", "towers": towers.loaded or RANDOM}
    if ranks.is_main:
        check_towers_unchanged(run.weights_file, towers)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    return emma, towers.to(ranks.device, dtype), loaded


def _identity(recipe: Recipe, data: TrainData) -> Identity:
    return Identity(
        recipe=recipe.identity(),
        fingerprint=recipe.fingerprint(),
        shards_sha256=data.reader.manifest.sha256,
        total_steps=data.total_steps,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a TOML file; pipeline/recipes has the ones that ship")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in optim.lr=1e-5")
    args = parser.parse_args()
    # DeepSpeed calls collectives by names that newer versions of torch deprecate.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    recipe: Recipe | None = None
    run: RunFolder | None = None
    start = StartupTimer()
    start.phase_done("imports")
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        ranks = find_ranks(recipe.engine.device)
        bound_collectives(recipe)
        with within(MEETING_S, "the meeting of the ranks", ranks):
            init_distributed(ranks)
        start.phase_done("meeting")
        for line in preflight(recipe, ranks):
            say(ranks, line)
        run = collectively(ranks, lambda: RunFolder(recipe, ranks))
        run.control.stop_on_signals()
        start.phase_done("preflight")
        train(run, ranks, start)
    except UserError as error:
        fail(error, recipe, run, code=2)
    except DivergedError as error:
        fail(error, recipe, run, code=3)
    except RetryableError as error:
        fail(error, recipe, run, code=EXIT_LOST)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and isinstance(told := from_oserror(error), UserError):
            fail(told, recipe, run, code=2)
        if isinstance(error, RuntimeError) and (lost := worker_death(error, ranks)):
            fail(lost, recipe, run, code=EXIT_LOST)
        crash(error, run)
    dist.barrier()
    dist.destroy_process_group()


def say(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        print(line, flush=True)


def crash(error: Exception, run: RunFolder | None) -> NoReturn:
    """What nobody foresaw: a traceback, and out at once, so that the other ranks hear of it."""
    traceback.print_exception(error)
    reason = f"{type(error).__name__}: {first_line(error)}"
    with contextlib.suppress(OSError):
        if run is not None and run.begun_at is not None:
            append_event(run.folder, "failed", None, reason=reason)
        elif run is not None:
            run.record_failed_start(f"failed: {reason}")
    os._exit(1)


def fail(error: Exception, recipe: Recipe | None, run: RunFolder | None, code: int) -> NoReturn:
    """One line on the console, a word that says whether to try again, and an exit code. Never a traceback."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in here if a loading process ended
    is_main = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
    if not (is_main or isinstance(error, (DamagedShardError, RetryableError))):
        # The main rank met it too and speaks; the launcher ends us all as soon as one ends, so let that one be first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(MAIN_SPEAKS_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # the disk may be what failed
        write_outcome(str(error), recipe, run, "lost" if code == EXIT_LOST else "failed")
    # Other ranks may wait in a collective for this one: leave without the goodbyes that would wait for them.
    os._exit(code)


def write_outcome(reason: str, recipe: Recipe | None, run: RunFolder | None, outcome: str) -> None:
    """In the run folder, for status and for the batch script."""
    if run is not None:
        run.end(outcome, None, reason)
        if run.begun_at is not None:
            append_event(run.folder, outcome, None, reason=reason)
    if outcome == "failed" and recipe is not None and (run is None or run.begun_at is None):
        Control(Path(recipe.run.dir)).refuse(reason)


if __name__ == "__main__":
    main()
